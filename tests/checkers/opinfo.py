"""The oracle over every operator of PyTorch's OpInfo database; the only module here that touches OpInfo.

For an operator and one of its samples, a composition such as ``vmap(vjp)`` is run three times: by functrans, by
torch.func, and by ``Plain``, which knows nothing but ``torch.autograd.grad`` and a Python loop. Batches have
distinct rows, so that a rule that mixes rows cannot pass.

    python tests/checkers/opinfo.py                                   # the table of all operators and compositions
    python tests/checkers/opinfo.py --op linalg.svd --composition "vmap(vjp)" --all-samples
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compositions import COMPOSITIONS, RECORDED, make_case
from opinfo_problem import UNINITIALIZED, Problem
from plain import Numeric, Plain, closer, difference
from sampling import reseed, sampling
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from functrans.pytorch.versions import INSTALLED

DEFAULT_SAMPLES = 4

# Operators whose result is amplified rounding error. The value is the tolerance relative to the largest entry.
ILL_CONDITIONED = {
    "linalg.lstsq": 1e-6,  # cond(A)**2 in the derivative of the normal equations
    "linalg.lstsq.grad_oriented": 1e-6,
    "linalg.pinv.singular": 1e-5,  # products A @ B of random factors, derivative in pinv(A)**2
}


@dataclass
class Result:
    """What came of one operator, composition and sample."""

    op: str
    composition: str
    sample: int
    outcome: str  # match | refused (by torch.func: not counted) | error | wrong
    detail: str = ""
    looped: tuple[str, ...] = field(default_factory=tuple)


# They read storage, not elements: which example a storage position belongs to is only clear with the batch in front.
STORAGE = {"as_strided", "as_strided.partial_views", "as_strided_copy", "as_strided_scatter"}

# PyTorch's own backward is wrong at the base (finite differences say so): it drops the saved statistics' derivatives,
# that of as_strided_scatter's source, gives the cotangent of a place to all that max_unpool wrote there, and that of a
# factor to the triangle that is not read.
WRONG_AT_THE_BASE = {
    "native_layer_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update",
    "as_strided_scatter",
    "nn.functional.max_unpool1d", "nn.functional.max_unpool2d", "nn.functional.max_unpool3d",
    "cholesky_inverse", "cholesky_solve",
}  # fmt: skip

# PyTorch is wrong there, and no difference tells: samples are too large, or not of the kind that the operator takes.
TORCH_FUNC_IS_WRONG = {
    # its gradient is right behind a log_softmax only; test_batching_rules_counting.py has the truth
    "nn.functional.ctc_loss": ("vjp", "vmap(vjp)"),
    # its tangent is not the transpose of its gradient where a matrix is not Hermitian; see test_derivatives_linalg.py
    "linalg.pinv.hermitian": ("jvp", "jvp(vjp)", "vmap(jvp)", "backward(jvp)"),
    # its second output, the logarithm of a sum, counts as a constant; see test_derivatives_attention.py (since 2.14)
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": ("vjp", "vmap(vjp)"),
}
if INSTALLED >= (2, 15):
    # their gradients, computed ahead, have no derivative, and they no tangent; see test_second_order_losses.py
    TORCH_FUNC_IS_WRONG["nn.functional.linear_cross_entropy.chunked"] = (
        "jvp(vjp)", "vjp(vjp)", "backward(vjp)", "backward(jvp)",
    )  # fmt: skip
    TORCH_FUNC_IS_WRONG["nn.functional.linear_cross_entropy.chunked_none"] = ("jvp", "vmap(jvp)", "backward(jvp)")

# Numbers are drawn for negative elements only: examples of other signs draw others,
# so that no draw is the same for all.
DRAWS_BY_SIGN = {"nn.functional.rrelu"}

# Their samples have weights in float32 beside numbers in float64, and derivatives by these that cancel to nothing.
WEIGHTS_IN_FLOAT32 = {"cov"}

# One sample takes seconds.
HEAVY = {"grid_sampler_3d": 1}


def differs(problem: Problem, got: Any, expected: Any) -> str:
    if problem.op.name in UNINITIALIZED:
        got, expected = (tree_map(lambda t: torch.zeros_like(t), tree) for tree in (got, expected))
    return difference(got, expected, ILL_CONDITIONED.get(problem.op.full_name, 0.0))


def attempt(case: Callable[[Any], Any], backend: Any) -> tuple[Any, Exception | None]:
    try:
        return case(backend), None
    except Exception as error:  # noqa: BLE001 - whatever it raises is the outcome
        return None, error


def judge(problem: Problem, composition: str, mixed: bool, backend: Any) -> Result | None:
    """Run one composition by all three and say who agrees with whom; None where there is nothing to run."""
    case = make_case(problem, composition, mixed)
    if case is None or (composition in RECORDED and problem.op.full_name in WRONG_AT_THE_BASE):
        return None
    name = problem.op.full_name
    result = Result(name, composition, problem.index, "match")
    expected, refusal = attempt(case, torch.func)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, error = attempt(case, backend)
    result.looped = tuple(sorted({str(w.message) for w in caught if "loop" in str(w.message)}))
    if error is not None:
        result.outcome = "refused" if refusal is not None else "error"
        result.detail = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if result.outcome == "error" and composition in ("vmap", "vmap(vmap)"):
            plain, failure = attempt(case, Plain)
            if failure is not None or differs(problem, expected, plain):
                result.outcome = "refused"  # there is no loop, or torch.func's answer is not that of the loop
        return result
    # For one vmap the loop says what is right, whatever torch.func answers.
    if composition in ("vmap", "vmap(vmap)"):
        plain, failure = attempt(case, Plain)
        if failure is None:
            what = differs(problem, got, plain)
            result.outcome = "wrong" if what else "match" if refusal is None else "refused"
            result.detail = what and f"differs from the loop: {what}"
            return result
    if refusal is None:
        what = differs(problem, got, expected)
        if not what:
            return result
        plain, failure = attempt(case, Plain)
        if failure is None and not differs(problem, got[0], plain[0]):
            result.detail = "torch.func differs from plain autograd, functrans does not"
            return result
        if numerically_closer(problem, composition, mixed, backend, got, expected):
            result.detail = "torch.func differs from finite differences, functrans does not"
            return result
        if composition in TORCH_FUNC_IS_WRONG.get(name, ()):
            result.detail = "PyTorch is known to be wrong"
            return result
        second = composition in (*RECORDED, "jvp(vjp)", "vjp(vjp)")
        if second and not differs(problem, got[0], without_nan(expected[0], got[0])):
            result.detail = "torch.func is nan (zero times infinity in its second derivative), functrans is not"
            return result
        result.outcome, result.detail = "wrong", f"differs from torch.func: {what}"
        return result
    result.outcome = "refused"
    plain, failure = attempt(case, Plain)
    if failure is None:
        what = differs(problem, got[0], plain[0])
        if what and composition in TORCH_FUNC_IS_WRONG.get(name, ()):
            result.detail = "PyTorch is known to be wrong"
        elif what and not numerically_closer(problem, composition, mixed, backend, got, plain):
            result.outcome, result.detail = "wrong", f"differs from plain autograd: {what}"
    return result


def without_nan(tree: Any, other: Any) -> Any:
    """``tree`` with the numbers of ``other`` where it has none."""

    def merged(x: Any, y: Any) -> Any:
        alike = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
        return torch.where(x.isnan(), y, x) if alike else x

    return tree_map(merged, tree, other)


def numerically_closer(
    problem: Problem, composition: str, mixed: bool, backend: Any, got: Any, other: Any
) -> bool:
    """Whether finite differences agree with ``got`` and not with ``other``."""
    if problem.random or sum(problem.leaves[j].numel() for j in problem.diff) > 300:
        return False
    if composition in ("jvp(vjp)", "vjp(vjp)"):
        # These are differenced from the backend's own first derivatives, which must have been found right.
        first = judge(problem, "vjp", mixed, backend)
        agrees = first is not None and (first.outcome == "match" or (first.outcome == "refused" and not first.detail))
        if not agrees:  # "refused" without a detail: torch.func refuses, and plain autograd agrees
            return False
    case = make_case(problem, composition, mixed)
    if case is None:
        return False
    numeric, failure = attempt(case, Numeric(backend))
    return failure is None and closer(got[0], other[0], numeric[0])


# ---- operators, samples, and the run


def signature(sample: Any) -> tuple[Any, ...]:
    """What makes one sample different from another: ranks, dtypes, sizes 0 and 1, and the other arguments."""
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    return (
        str(spec),
        tuple(
            (leaf.dim(), leaf.dtype, 0 in leaf.shape, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else (leaf if isinstance(leaf, bool | str | None) else type(leaf))
            for leaf in flat
        ),
    )


def choose(samples: list[Any], cap: int | None) -> list[tuple[int, Any]]:
    """The first sample of every signature, in order, up to ``cap``; then the next ones."""
    numbered = list(enumerate(samples))
    if cap is None or len(numbered) <= cap:
        return numbered
    seen: set[Any] = set()
    new, old = [], []
    for i, sample in numbered:
        key = signature(sample)
        (old if key in seen else new).append((i, sample))
        seen.add(key)
    # spread over the list of signatures, which walks the optional arguments one by one
    if len(new) > cap > 1:
        new = [new[round(k * (len(new) - 1) / (cap - 1))] for k in range(cap)]
    return (new + old)[:cap]


def operators() -> dict[str, Any]:
    """Every operator of the database that takes float64 and runs on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.full_name: op for op in op_db if torch.float64 in op.dtypes and not op.name.startswith("jiterator")}


def in_double(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.dtype is not torch.float32:
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def problems(op: Any, cap: int | None = DEFAULT_SAMPLES) -> Iterator[Problem]:
    reseed(zlib.crc32(op.full_name.encode()))
    with sampling():
        samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=op.supports_autograd))
    cap = min(cap or len(samples), HEAVY.get(op.full_name, len(samples)))
    for index, sample in choose(samples, cap):
        if op.full_name in WEIGHTS_IN_FLOAT32:
            sample = sample.transform(in_double)
        # A few samples only work on the storage they came with (as_strided beyond the view), and we run on copies.
        try:
            problem = Problem(op, sample, index)
        except RuntimeError:
            continue
        yield problem


def run_operator(
    op: Any, backend: Any, compositions: tuple[str, ...] = COMPOSITIONS + RECORDED, cap: int | None = DEFAULT_SAMPLES
) -> list[Result]:
    torch.set_num_threads(1)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for problem in problems(op, cap):
            for composition in compositions:
                if problem.random and op.full_name in DRAWS_BY_SIGN and "vmap" in composition:
                    continue
                variants = (False, True) if composition == "vmap" else (problem.index % 2 == 1,)
                for mixed in (False,) if op.full_name in STORAGE else variants:
                    result = judge(problem, composition, mixed, backend)
                    if result is not None:
                        results.append(result)
    return results


RANK = {"wrong": 3, "error": 2, "match": 1, "refused": 0}


def worst(results: list[Result]) -> dict[tuple[str, str], Result]:
    """One result per (operator, composition): the worst over its samples."""
    pairs: dict[tuple[str, str], Result] = {}
    for result in results:
        key = (result.op, result.composition)
        if key not in pairs or RANK[result.outcome] > RANK[pairs[key].outcome]:
            pairs[key] = result
    return pairs


def serve(pipe: Any) -> None:
    """A worker: (operator, compositions, cap) in, (seconds, results) out."""
    import functrans

    ops = operators()
    while True:
        name, compositions, cap = pipe.recv()
        start = time.perf_counter()
        results = run_operator(ops[name], functrans, compositions, cap)
        pipe.send((time.perf_counter() - start, results))


def run_all(
    names: list[str], compositions: tuple[str, ...], cap: int | None, workers: int, limit: float = 300.0
) -> Iterator[tuple[str, float, list[Result]]]:
    """All operators by ``workers`` processes; one that crashes or hangs its process is an error of that operator."""
    context = multiprocessing.get_context("spawn")
    todo = list(reversed(names))
    busy: dict[Any, tuple[Any, str, float]] = {}

    def give(pipe: Any, process: Any) -> None:
        name = todo.pop()
        pipe.send((name, compositions, cap))
        busy[pipe] = (process, name, time.perf_counter())

    def start() -> None:
        pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        give(pipe, process)

    for _ in range(min(workers, len(names))):
        start()
    while busy:
        ready = multiprocessing.connection.wait(list(busy), timeout=5.0)
        hung = [pipe for pipe, (_, _, since) in busy.items() if time.perf_counter() - since > limit]
        for pipe in [*ready, *(p for p in hung if p not in ready)]:
            process, name, since = busy.pop(pipe)
            try:
                if pipe in hung:
                    raise EOFError
                seconds, results = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.kill()
                process.join()
                why = f"hung for {limit:.0f} s" if pipe in hung else f"crashed the process ({process.exitcode})"
                yield name, time.perf_counter() - since, [Result(name, c, 0, "error", why) for c in compositions]
                if todo:
                    start()
                continue
            yield name, seconds, results
            if todo:
                give(pipe, process)
            else:
                process.terminate()


def table(pairs: dict[tuple[str, str], Result]) -> str:
    lines = [f"{'composition':14}{'match':>8}{'error':>8}{'wrong':>8}{'refused':>9}{'match of counted':>19}"]
    for composition in COMPOSITIONS + RECORDED:
        counts = Counter(r.outcome for (_, c), r in pairs.items() if c == composition)
        counted = counts["match"] + counts["error"] + counts["wrong"]
        if counted + counts["refused"]:
            share = f"{100 * counts['match'] / counted:.1f} %" if counted else "-"
            lines.append(
                f"{composition:14}{counts['match']:8}{counts['error']:8}{counts['wrong']:8}"
                f"{counts['refused']:9}{share:>19}"
            )
    counts = Counter(r.outcome for (_, c), r in pairs.items() if c in COMPOSITIONS)
    counted = counts["match"] + counts["error"] + counts["wrong"]
    lines.append(
        f"{'all':14}{counts['match']:8}{counts['error']:8}{counts['wrong']:8}{counts['refused']:9}"
        f"{100 * counts['match'] / max(counted, 1):17.1f} %"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="functrans against torch.func over OpInfo, float64")
    parser.add_argument("--op", action="append", help="name of an operator (repeatable); default: all")
    parser.add_argument("--composition", action="append", choices=COMPOSITIONS + RECORDED)
    parser.add_argument("--samples", type=int, default=DEFAULT_SAMPLES, help="samples per operator")
    parser.add_argument("--all-samples", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    known = list(operators())
    names = options.op or known
    for name in names:
        if name not in known:
            near = ", ".join(other for other in known if name.split(".")[-1] in other) or "see operators()"
            parser.error(f"there is no operator {name!r}; there are: {near}")
    compositions = tuple(options.composition or COMPOSITIONS + RECORDED)
    cap = None if options.all_samples else options.samples
    results: list[Result] = []
    times: dict[str, float] = {}
    start = time.perf_counter()
    for name, seconds, found in run_all(names, compositions, cap, options.jobs):
        results += found
        times[name] = seconds
    pairs = worst(results)
    for outcome in ("wrong", "error"):
        for (name, composition), result in sorted(pairs.items()):
            if result.outcome == outcome:
                print(f"{outcome}: {name} {composition} (sample {result.sample}): {result.detail}")
    better = sorted({f"{r.op} {r.composition}: {r.detail}" for r in results if r.outcome == "match" and r.detail})
    print("\n".join(["", *better]))
    looped = defaultdict(set)
    for result in results:
        for message in result.looped:
            looped[message.split(chr(10))[0][:150]].add(result.op)
    for message, ops in sorted(looped.items()):
        print(f"per-example loop: {message} [{', '.join(sorted(ops))}]")
    slowest = sorted(times, key=times.__getitem__, reverse=True)[:10]
    print("slowest:", ", ".join(f"{name} {times[name]:.1f} s" for name in slowest))
    print(f"\n{table(pairs)}\n{len(results)} cases, {len(names)} operators, {time.perf_counter() - start:.0f} s")
    return 1 if any(r.outcome == "wrong" for r in pairs.values()) else 0


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
