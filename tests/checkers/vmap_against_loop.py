"""vmap against a loop over the examples, for every operator of PyTorch's OpInfo database.

A loop says what is right: the values, shapes and dtypes, and that there is none where the operator refuses an example.
The samples are batched along the first, a middle and the last dimension, with the batch contiguous or not, some tensors
unbatched, and under two vmaps. Then they are spoilt, so that most are refused: a dimension less or more, numbers out of
range, another dtype.

    python tests/checkers/vmap_against_loop.py                      # everything; the findings and a summary
    python tests/checkers/vmap_against_loop.py --op linalg.det --samples 3
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batching_checker import PERTURBATIONS
from opinfo_problem import UNINITIALIZED
from sampling import reseed, sampling
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

sys.path.append(str(Path(__file__).resolve().parents[2]))

import functrans
from functrans.errors import DataDependentError, InsideTransformError

SIZE = 3
DTYPES = (torch.float64, torch.complex64, torch.int64, torch.bool)

#: PyTorch itself does not check their arguments, and reads memory that is not theirs: nothing of them is spoilt.
UNCHECKED = {
    "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "nn.functional.instance_norm",
    "native_group_norm",
    "grid_sampler_2d", "grid_sampler_3d", "lu_unpack", "_segment_reduce.lengths", "_segment_reduce.offsets",
    "as_strided",
    "as_strided.partial_views", "as_strided_copy", "as_strided_scatter", "sparse.sampled_addmm", "sparse.mm.reduce",
    "svd_lowrank", "pca_lowrank",
}  # fmt: skip

#: Kinds of findings.
WRONG, ANSWERED, REFUSED = "wrong", "answered where the loop raises", "raised where the loop answers"

#: Where the two differ and it is meant so, or it is not ours to mend: by operator and kind of finding, the reason.
CONVENTIONS: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        ((name, REFUSED) for name in (
            "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "nn.functional.batch_norm",
            "nn.functional.instance_norm",
            "nn.functional.embedding", "nn.functional.embedding_bag",
        )),
        "writes to an argument that is the same for all examples (running statistics, max_norm): "
        "the loop's last example would win",
    ),
    **dict.fromkeys(
        ((name, REFUSED) for name in ("sparse.sampled_addmm", "sparse.mm.reduce", "to_sparse")),
        "sparse layouts have no wrapper, or no second batch"
    ),
    **dict.fromkeys(
        ((name, REFUSED) for name in (
            "cummax", "cummin", "kthvalue", "mode", "masked.cumsum", "masked.cumprod", "masked_fill",
        )),
        "of a number alone PyTorch takes dtypes that it takes in no other shape",
    ),
    **dict.fromkeys(((name, REFUSED) for name in ("roll", "cat")),
        "PyTorch does not look at dim where a tensor is empty"),
    **dict.fromkeys(
        ((name, REFUSED) for name in ("_unsafe_masked_index", "_unsafe_masked_index_put_accumulate")),
        "masks that are no masks: PyTorch casts them"
    ),
    **dict.fromkeys(
        ((name, REFUSED) for name in ("unfold", "unfold_copy")),
        "places that are not the example's own, which a copy made by the loop has",
    ),
    ("addbmm", REFUSED): "in place PyTorch resizes what it writes",
    ("istft", REFUSED): "PyTorch's decomposition asserts more",
    ("istft", ANSWERED): "a window of integers is promoted",
    ("nn.functional.linear_cross_entropy", REFUSED): "one target in a vector for one example without a dimension",
    ("nn.functional.multilabel_margin_loss", REFUSED): "one target in a vector for one example without a dimension",
    ("nn.functional.nll_loss", REFUSED): "one target in a vector for one example without a dimension",
    ("nn.functional.scaled_dot_product_attention", REFUSED): "a mask that is a vector",
    ("nn.functional.scaled_dot_product_attention", ANSWERED): "a mask that is a vector broadcasts",
    ("nn.functional.conv1d", ANSWERED): "a bias of another dtype is promoted",
    ("nn.functional.conv2d", ANSWERED): "a bias of another dtype is promoted",
    ("nn.functional.batch_norm", ANSWERED): "a bias of a wrong size beside no other batched argument",
    ("nn.functional.soft_margin_loss", ANSWERED): "a target of more dimensions than the input broadcasts",
    ("nn.functional.binary_cross_entropy_with_logits", ANSWERED):
        "weights of more dimensions than the input broadcast before the reduction",
    ("masked_select", ANSWERED): "a mask of another dtype that selects as many of all examples",
    ("native_dropout_backward", WRONG): "a complex mask for a real gradient loses its dtype",
    ("resize_", ANSWERED): "a negative size beside one of 0",
    ("resize_", REFUSED): "to more elements there is no memory",
    ("resize_as_", REFUSED): "to more elements there is no memory",
    **dict.fromkeys(
        ((f"index_{name}", ANSWERED) for name in (
            "fill", "copy", "select", "add", "reduce.mean", "reduce.prod", "reduce.amin", "reduce.amax",
        )),
        "positions of another integer or float dtype, or more positions than a number has elements",
    ),
}


@dataclass
class Case:
    """A call of an operator: flat arguments, and how they stand in it."""

    op: Any
    flat: list[Any]
    spec: Any
    what: str

    def __call__(self, *flat: Any) -> list[Any]:
        first, args, kwargs = tree_unflatten(list(flat), self.spec)
        return tree_flatten(self.op(first, *args, **kwargs))[0]


@dataclass
class Finding:
    """Where vmap and the loop differ."""

    op: str
    kind: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.op}, {self.what}: {self.detail}"


# ---- cases


def operators() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as database
    # seeds of its own would hide what draws
    database.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    op_db = database.op_db
    return {op.full_name: op for op in op_db if not op.name.startswith("jiterator")}


def samples(op: Any, dtype: torch.dtype, limit: int) -> Iterator[tuple[int, Any]]:
    """Samples spread over those that the database has."""
    reseed(zlib.crc32(op.full_name.encode()))
    found = []
    with sampling(), suppress(Exception):  # a few need packages or devices that are not here
        found.extend(itertools.islice(op.sample_inputs("cpu", dtype, set_seed=False), 400))
    chosen = (
        range(len(found))
        if len(found) <= limit
        else sorted({round(k * (len(found) - 1) / max(limit - 1, 1)) for k in range(limit)})
    )
    for k in chosen:
        yield k, found[k]


def case_of(function: Any, sample: Any, what: str) -> Case:
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    return Case(function, [x.detach().clone() if isinstance(x, Tensor) else x for x in flat], spec, what)


def spoilt(case: Case, rng: random.Random, limit: int | None = None) -> Iterator[Case]:
    """The case with one thing changed: mostly calls that PyTorch refuses."""

    def changed(places: dict[int, Any], what: str) -> Case:
        return Case(case.op, [places.get(k, x) for k, x in enumerate(case.flat)], case.spec, f"{case.what}, {what}")

    tensors = [k for k, x in enumerate(case.flat) if isinstance(x, Tensor) and x.layout is torch.strided]
    found: list[Callable[[], Case]] = []
    for chosen in [(k,) for k in tensors] + ([tuple(tensors)] if len(tensors) > 1 else []):
        if all(case.flat[k].dim() and case.flat[k].shape[0] for k in chosen):
            found.append(lambda c=chosen: changed({k: case.flat[k][0].clone() for k in c}, f"a dimension less of {c}"))
        if all(case.flat[k].dim() > 1 and case.flat[k].shape[0] and case.flat[k].shape[1] for k in chosen):
            found.append(
                lambda c=chosen: changed({k: case.flat[k][0, 0].clone() for k in c}, f"two dimensions less of {c}")
            )
        found.append(lambda c=chosen: changed({k: case.flat[k][None].clone() for k in c}, f"a dimension more of {c}"))
        found.append(
            lambda c=chosen: changed(
                {k: torch.cat([case.flat[k]] * 2, -1) for k in c if case.flat[k].dim()}, f"twice the size of {c}"
            )
        )
        for dtype in (torch.int64, torch.float32, torch.complex128, torch.bool):
            found.append(lambda c=chosen, d=dtype: changed({k: case.flat[k].to(d) for k in c}, f"{d} of {c}"))
    rank = max((case.flat[k].dim() for k in tensors), default=0)
    for k, x in enumerate(case.flat):
        if type(x) is int:
            for value in {rank, rank + 1, -rank - 1, -rank - 2, x + 1, x - 1}:
                found.append(lambda k=k, v=value: changed({k: v}, f"argument {k} = {v}"))
    if limit is not None and len(found) > limit:
        found = found[:1] + rng.sample(found[1:], limit - 1) if limit else []
    for make in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield make()


# ---- batches


def batches(case: Case, chosen: tuple[int, ...], count: int) -> Iterator[dict[int, list[Tensor]]]:
    """Ways to have ``count`` examples that differ, for each of the chosen leaves."""
    for perturb in PERTURBATIONS:
        yield {k: [perturb(case.flat[k], i) for i in range(count)] for k in chosen}
    yield {k: [case.flat[k].clone() for _ in range(count)] for k in chosen}


PLACES = ("first", "last", "middle", "last, not contiguous", "first, strided")


def stacked(rows: list[Tensor], place: str) -> tuple[Tensor, int]:
    """The examples as one tensor, and along which of its dimensions."""
    x = torch.stack(rows)
    last = x.dim() - 1
    if place == "first, strided":
        return torch.stack([x, x.roll(1, 0)], 1)[:, 0], 0
    if place == "last, not contiguous":
        return x.movedim(0, last), last
    at = {"first": 0, "last": last, "middle": last // 2}[place]
    return torch.stack(rows, at), at


def loop(case: Case, rows: dict[int, list[Tensor]], count: int) -> list[list[Any]]:
    return [case(*[rows[k][i] if k in rows else x for k, x in enumerate(case.flat)]) for i in range(count)]


def attempt(f: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return f(), None
    except Exception as error:  # noqa: BLE001 (whatever it raises is the outcome)
        return None, error


def expected_of(
    case: Case, chosen: tuple[int, ...], count: int
) -> tuple[dict[int, list[Tensor]], Any, Exception | None]:
    """Examples with what the loop makes of them; where it refuses all ways to have different ones, its error."""
    for rows in batches(case, chosen, count):
        outputs, error = attempt(lambda r=rows: loop(case, r, count))
        if error is None:
            return rows, outputs, None
    return rows, None, error


def run(case: Case, rows: dict[int, list[Tensor]], place: str, nested: bool) -> Any:
    """The case under vmap, or two."""
    flat, dims = list(case.flat), [None] * len(case.flat)
    outer: list[Any] = [None] * len(case.flat)
    for k, examples in rows.items():
        if nested:
            inner = [stacked(examples[i : i + 2], place) for i in range(0, len(examples), 2)]
            dims[k] = inner[0][1]  # type: ignore[call-overload]
            flat[k], outer[k] = stacked([x for x, _ in inner], place)
        else:
            flat[k], dims[k] = stacked(examples, place)  # type: ignore[call-overload]
    f = functrans.vmap(case, in_dims=tuple(dims), randomness="different")
    if nested:
        f = functrans.vmap(f, in_dims=tuple(outer), randomness="different")
    out = f(*flat)
    return [x.flatten(0, 1) if nested and isinstance(x, Tensor) else x for x in out]


def draws(case: Case) -> bool:
    """Whether the operator asks the generator for numbers."""
    before = torch.get_rng_state()
    attempt(lambda: case(*[x.clone() if isinstance(x, Tensor) else x for x in case.flat]))
    return not torch.equal(before, torch.get_rng_state())


def difference(got: list[Any], outputs: list[list[Any]], values: bool) -> str:
    """What of vmap's outputs is not the loop's; nothing if all is."""
    if len(got) != len(outputs[0]):
        return f"{len(got)} outputs, the loop has {len(outputs[0])}"
    for k, x in enumerate(got):
        rows = [output[k] for output in outputs]
        if not isinstance(rows[0], Tensor):
            if (isinstance(x, Tensor) or any(x != row for row in rows)) and x is not rows[0]:
                return f"output {k} is {x}, the loop has {rows}"
            continue
        if not isinstance(x, Tensor):
            return f"output {k} is no tensor"
        if {row.shape for row in rows} != {x.shape[1:]} or x.shape[0] != len(rows):
            return (
                f"output {k} has shape {list(x.shape)}, the loop {len(rows)} of {[list(row.shape) for row in rows[:2]]}"
            )
        if {row.dtype for row in rows} != {x.dtype}:
            return f"output {k} is {x.dtype}, the loop has {rows[0].dtype}"
        if x.layout is not rows[0].layout:
            return f"output {k} has layout {x.layout}, the loop {rows[0].layout}"
        if values:
            low = x.dtype in (torch.float32, torch.complex64, torch.float16, torch.bfloat16)
            try:
                torch.testing.assert_close(
                    x.to_dense() if x.layout is not torch.strided else x,
                    torch.stack([row.to_dense() if row.layout is not torch.strided else row for row in rows]),
                    rtol=1e-3 if low else 1e-7, atol=1e-4 if low else 1e-8, equal_nan=True,
                )  # fmt: skip
            except AssertionError as error:
                return f"output {k}: {' '.join(str(error).split())[:160]}"
    return ""


def judge(name: str, case: Case, chosen: tuple[int, ...], place: str, nested: bool) -> Finding | None | bool:
    """Compare one batch with the loop; True where both agree, None where there is nothing to compare."""
    count = 4 if nested else SIZE
    rows, outputs, refusal = expected_of(case, chosen, count)
    got, error = attempt(lambda: run(case, rows, place, nested))
    batched = {k: tuple(rows[k][0].shape) for k in chosen}
    what = f"{case.what}, batched {batched} along the {place}" + (" of two vmaps" if nested else "")
    if refusal is not None:
        if error is not None:
            return True
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in got]
        return Finding(name, ANSWERED, what, f"loop: {type(refusal).__name__}: {first_line(refusal)}; vmap: {shapes}")
    if error is not None:
        if isinstance(error, DataDependentError | InsideTransformError):
            return None
        return Finding(name, REFUSED, what, f"{type(error).__name__}: {first_line(error)}")
    detail = difference(got, outputs, values=name not in UNINITIALIZED and not draws(case))
    return Finding(name, WRONG, what, detail) if detail else True


def first_line(error: Exception) -> str:
    return (str(error).strip().split("\n") or [""])[0][:180]


# ---- runs


def check(
    op: Any, limit: int, spoils: int | None, dtypes: tuple[torch.dtype, ...] = DTYPES, seed: int = 0
) -> tuple[list[Finding], int]:
    """Findings for one operator, and how many comparisons were made: ``spoils`` spoilt calls per sample, None: all."""
    torch.set_num_threads(1)
    findings: list[Finding] = []
    compared = 0
    rng = random.Random(seed)
    functions = [("", op.op)]
    if op.inplace_variant is not None:
        functions.append(("in place ", lambda x, *args, **kwargs: op.inplace_variant(x.clone(), *args, **kwargs)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in dtypes:
            if dtype not in op.dtypes:
                continue
            main = dtype is torch.float64 or torch.float64 not in op.dtypes
            for k, sample in samples(op, dtype, limit if main else max(limit // 4, 1)):
                for prefix, function in functions if k % 3 == 0 else functions[:1]:
                    case = case_of(function, sample, f"{prefix}sample {k} of {str(dtype)[6:]}")
                    cases = [case, *(spoilt(case, rng, spoils) if main and op.full_name not in UNCHECKED else ())]
                    for n, one in enumerate(cases):
                        tensors = [
                            i for i, x in enumerate(one.flat) if isinstance(x, Tensor) and x.layout is torch.strided
                        ]
                        if not tensors:
                            continue
                        for place in PLACES if n == 0 and spoils is None else (rng.choice(PLACES),):
                            everything = place == "first" or rng.random() < 0.5
                            chosen = (
                                tuple(tensors)
                                if everything
                                else tuple(sorted(rng.sample(tensors, rng.randint(1, len(tensors)))))
                            )
                            result = judge(
                                op.full_name,
                                one,
                                chosen,
                                place,
                                nested=place == "middle" or n > 0 and rng.random() < 0.2,
                            )
                            if isinstance(result, Finding):
                                findings.append(result)
                            compared += result is not None
    return findings, compared


def work(name: str, options: dict[str, Any], pipe: Any) -> None:
    start = time.process_time()
    findings, compared = check(operators()[name], **options)
    pipe.send((findings, compared, time.process_time() - start))


def main() -> int:
    parser = argparse.ArgumentParser(description="vmap against a loop over OpInfo")
    parser.add_argument("--op", action="append", help="name of an operator (repeatable); default: all")
    parser.add_argument("--samples", type=int, default=12, help="samples per operator")
    parser.add_argument("--spoils", type=int, default=None, help="spoilt calls per sample; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")  # an operator that ends its process is a finding
    for name in options.op or operators():
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(name, {"limit": options.samples, "spoils": options.spoils, "seed": options.seed}, theirs)
        )
        process.start()
        theirs.close()
        try:
            findings, compared, seconds = (
                ours.recv() if ours.poll(300) else ([Finding(name, WRONG, "all", "hangs")], 0, 300.0)
            )
        except EOFError:
            findings, compared, seconds = (
                [Finding(name, WRONG, "all", f"ends the process ({process.exitcode})")],
                0,
                0.0,
            )
        process.kill()
        process.join()
        counts["comparisons"] += compared
        for finding in findings:
            counts[finding.kind] += 1
            print(finding, flush=True)
        if seconds > 20:
            print(f"({name}: {compared} comparisons, {seconds:.0f} s)", flush=True)
    print(dict(counts))
    return 1 if counts[WRONG] or counts[ANSWERED] else 0


if __name__ == "__main__":
    sys.exit(main())
