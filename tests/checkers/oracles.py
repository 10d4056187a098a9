"""Oracles that need no other library: what the derivatives of an operator must be to each other, and to differences.

Of one sample of an operator ``f`` with float arguments ``x`` a number is made,
``g(t, s) = ⟨f(x + t v + t² w + s b), u⟩`` with random ``v``, ``w``, ``b``, ``u``. ``v`` and ``w`` are zero but for the
*tracked* arguments, ``b`` but for the *batched* ones; the others are constant.

- adjointness: ``⟨J v, u⟩ = ⟨v, Jᵀ u⟩``, by jvp and vjp;
- the first derivative by ``t`` in both modes is what differences of ``g`` say;
- the second one is the same by all four nestings of grad and jvp, and is what differences of the first one say;
- the third one, if a derivative was borrowed from PyTorch: the same by differences of the second;
- all of that under vmap over ``s``, with distinct rows, is what a loop gives.

By differences is by central ones, extrapolated, with an estimate of their error: where the function has a kink or a
jump (ties, ``abs`` at 0) they say nothing, and the modes must still agree. ``oracle_conventions.py`` names what is not
judged, with the reason.

    python tests/checkers/oracles.py    # every operator, all samples; log and summary by operator
    python tests/checkers/oracles.py --op linalg.svd --samples 2 --dtype complex128
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from opinfo_problem import UNINITIALIZED, Problem
from oracle_conventions import CONVENTIONS, LOOSE
from sampling import reseed, sampling
from torch import Tensor

DTYPES = {"float64": torch.float64, "complex128": torch.complex128}
STEP = 1e-4
#: of derivatives to each other, and to differences; relative to ``Line.scale``
EXACT, DIFFERENCES = 1e-7, 1e-5
#: places along ``s``: the rows of the batch
ROWS = (0.0, 0.01, -0.02)


@dataclass(frozen=True)
class Finding:
    """One check that did not come out right."""

    op: str
    dtype: str
    sample: int
    variant: str
    case: str
    check: str
    outcome: str  # wrong | refused
    detail: str

    def __str__(self) -> str:
        where = f"{self.op} {self.dtype} sample {self.sample} {self.variant} {self.case}".replace("  ", " ")
        return f"{self.outcome}: {where}: {self.check}: {self.detail}"


class Sample(Problem):
    """A sample of an operator behind PyTorch's own wrapper for numeric checks,
    which makes matrices symmetric and the like.
    """

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        return self.op.gradcheck_wrapper(self.op.get_op(), *args, **kwargs)

    def __init__(self, op: Any, sample: Any, index: int, variant: str = "") -> None:
        self.variant = variant
        super().__init__(op, sample, index)
        self.float_outputs = [i for i in self.float_outputs if self.out[i].layout == torch.strided]
        self.floats = [
            j for j, x in enumerate(self.leaves)
            if (x.is_floating_point() or x.is_complex()) and x.layout == torch.strided and x.numel()
        ]  # fmt: skip


# ---- places where formulas go wrong: ties, zeros, repeated singular values


def rounded(x: Tensor) -> Tensor:
    return torch.complex(rounded(x.real), rounded(x.imag)) if x.is_complex() else x.mul(2).round().div(2)


def with_zeros(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.numel()).view(x.shape) % 3 == 0, 0, x)


def all_zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def twice_identity(x: Tensor) -> Tensor:
    if x.dim() < 2 or x.shape[-1] < 2 or x.shape[-2] < 2:
        return x
    return torch.eye(x.shape[-2], x.shape[-1], dtype=x.dtype).mul(2).expand(x.shape).clone()


def all_the_same(index: Tensor) -> Tensor:
    return index[(slice(0, 1),) * index.dim()].expand(index.shape).clone()


VARIANTS = {"ties": rounded, "zeros": with_zeros, "zero": all_zero, "identity": twice_identity}
#: of index arguments
INDEX_VARIANTS = {"repeated": all_the_same}


def varied(sample: Sample, name: str) -> Sample | None:
    """The sample with other values in its differentiable (or index) arguments;
    None where the operator has no finite value there.
    """
    leaves = list(sample.leaves)
    if name in INDEX_VARIANTS:
        for j, x in enumerate(leaves):
            if (
                not (x.is_floating_point() or x.is_complex())
                and x.dtype != torch.bool
                and x.layout == torch.strided
                and x.numel()
            ):
                leaves[j] = INDEX_VARIANTS[name](x)
    else:
        for j in set(sample.diff) & set(sample.floats):
            leaves[j] = VARIANTS[name](leaves[j])
    if all(a is b or b.layout == torch.strided and torch.equal(a, b) for a, b in zip(leaves, sample.leaves)):
        return None
    try:
        out = sample.eager(leaves)
    except (RuntimeError, ValueError, IndexError):
        return None
    if not all(bool(out[i].isfinite().all()) for i in sample.float_outputs):
        return None
    new = Sample.__new__(Sample)
    new.__dict__.update(sample.__dict__, leaves=leaves, out=out, variant=name)
    return new


# ---- the function of t and s


class Line:
    """``g(t, s)`` of one sample, for one choice of tracked and batched arguments."""

    def __init__(self, sample: Sample, tracked: tuple[int, ...], batched: tuple[int, ...]) -> None:
        self.sample, self.tracked, self.batched = sample, tracked, batched
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{sample.op.full_name} {sample.index} {tracked}".encode())
        )

        def random(like: Tensor) -> Tensor:
            return torch.randn(like.shape, dtype=like.dtype, generator=generator)

        self.v = {j: random(sample.leaves[j]) for j in tracked}
        self.w = {j: random(sample.leaves[j]) for j in tracked}
        self.b = {j: random(sample.leaves[j]) for j in batched}
        self.u = [random(sample.out[i]) for i in sample.float_outputs]
        self.finite = [sample.out[i].isfinite() for i in sample.float_outputs]
        self.whole = all(bool(f.all()) for f in self.finite)

    def outputs(self, replaced: dict[int, Tensor]) -> tuple[Tensor, ...]:
        """The float outputs; what is infinite or NaN at the sample counts as 0."""
        reseed(self.sample.seed)
        leaves = [replaced.get(j, None) if j in replaced else x.clone() for j, x in enumerate(self.sample.leaves)]
        out = self.sample.call(*leaves)
        out = tuple(out[i] for i in self.sample.float_outputs)
        return out if self.whole else tuple(torch.where(f, o, 0) for f, o in zip(self.finite, out))

    def __call__(self, t: Any, s: Any = None) -> Tensor:
        moved = {}
        for j in {*self.tracked, *(self.batched if s is not None else ())}:
            x = self.sample.leaves[j]
            if j in self.v:
                x = x + t * self.v[j] + (t * t) * self.w[j]
            if s is not None and j in self.b:
                x = x + s * self.b[j]
            moved[j] = x
        return inner(self.outputs(moved), self.u)

    def turned(self, v: dict[int, Tensor]) -> Line:
        other = copy.copy(self)
        other.v = v
        return other

    def has_corner(self, tolerance: float) -> bool:
        """Whether the slope is not linear in the direction, as of ``copysign`` at (0, 0): there is no derivative then.
        """
        other = {j: v.flip(tuple(range(v.dim()))) * 0.7 + 0.3 for j, v in self.v.items()}
        both = {j: v + other[j] for j, v in self.v.items()}
        slopes = [by_differences(self.turned(v))[0] for v in (self.v, other, both)]
        return not abs(slopes[0] + slopes[1] - slopes[2]) <= 10 * tolerance

    def scale(self) -> float:
        """What rounding errors are relative to."""
        return max(1.0, float(sum((o.abs() * u.abs()).sum() for o, u in zip(self.outputs({}), self.u))))


def inner(a: Any, b: Any) -> Tensor:
    """The real inner product."""
    parts = [(x * y.conj()).real.sum() if x.is_complex() or y.is_complex() else (x * y).sum() for x, y in zip(a, b)]
    return sum(p.to(torch.float64) for p in parts)  # type: ignore[return-value]


def by_differences(f: Callable[[Tensor], Tensor], step: float = STEP) -> tuple[float, float]:
    """The derivative of ``f`` at 0 and an estimate of the error; NaN where ``f`` is not defined to both sides."""

    def central(h: float) -> float:
        return float(f(number(h)) - f(number(-h))) / (2 * h)

    try:
        coarse, fine = central(step), central(step / 2)
    except (RuntimeError, ValueError):
        return math.nan, math.nan
    return (4 * fine - coarse) / 3, abs(fine - coarse)


def has_kink(f: Callable[[Tensor], Tensor], size: float) -> bool:
    """Whether the slopes to the left and to the right of 0 differ, however near one looks."""

    def jump(h: float) -> float:
        middle = f(number(0.0))
        return abs(float(f(number(h)) - middle) + float(f(number(-h)) - middle)) / h

    return jump(STEP / 16) > max(0.6 * jump(STEP), 1e-6 * size)


def number(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


# ---- the checks


class Judge:
    """All checks of one sample by one library (``backend`` has grad, jvp, vjp and vmap)."""

    def __init__(self, sample: Sample, backend: Any) -> None:
        self.sample, self.backend = sample, backend
        self.findings: list[Finding] = []
        self.checks = 0
        self.unsure = 0  # differences say nothing
        self.dtype = str(sample.leaves[sample.floats[0]].dtype)[6:] if sample.floats else ""
        loose = LOOSE.get(sample.op.full_name, 1.0)
        self.exact, self.numeric = EXACT * loose, DIFFERENCES * loose

    def derivative(self, mode: str, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if mode == "grad":
            return self.backend.grad(f)
        return lambda t: self.backend.jvp(f, (t,), (torch.ones_like(t),))[1]

    def nested(self, modes: tuple[str, ...], f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        for mode in reversed(modes):
            f = self.derivative(mode, f)
        return f

    def note(self, line: Line, check: str, outcome: str, detail: str) -> None:
        where = f"tracked {line.tracked}" + (f" batched {line.batched}" if line.batched else "")
        s = self.sample
        self.findings.append(Finding(s.op.full_name, self.dtype, s.index, s.variant, where, check, outcome, detail))

    def value(self, line: Line, check: str, run: Callable[[], Any]) -> Any:
        """What ``run`` gives, None where it raises."""
        self.checks += 1
        try:
            return run()
        except Exception as error:  # noqa: BLE001 - whatever it raises is the outcome
            self.note(line, check, "refused", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None

    def agree(self, line: Line, check: str, got: float, expected: float, tolerance: float) -> bool:
        if abs(got - expected) <= tolerance or got == expected:
            return True
        self.note(line, check, "wrong", f"{got:.10g}, expected {expected:.10g}")
        return False

    def adjointness(self, line: Line) -> None:
        primals = tuple(self.sample.leaves[j] for j in line.tracked)

        def f(*xs: Tensor) -> tuple[Tensor, ...]:
            return line.outputs(dict(zip(line.tracked, xs)))

        def forward() -> float:
            tangents = self.backend.jvp(f, primals, tuple(line.v.values()))[1]
            return float(inner(tangents, line.u))

        def reverse() -> float:
            out, pullback = self.backend.vjp(f, *primals)
            return float(inner(line.v.values(), pullback(tuple(u.to(o.dtype) for u, o in zip(line.u, out)))))

        a, b = self.value(line, "jvp", forward), self.value(line, "vjp", reverse)
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b):
            self.agree(line, "adjointness: jvp against vjp", a, b, self.exact * (line.scale() + abs(b)))

    def order(
        self, line: Line, below: Callable[[Tensor], Tensor], nestings: list[tuple[str, ...]]
    ) -> list[tuple[str, ...]]:
        """The derivatives of an order against differences of ``below``, one of the order before;
        which were found right.
        """
        scale = line.scale()
        values = {}
        for modes in nestings:
            found = self.value(
                line, " of ".join(modes), lambda modes=modes: float(self.nested(modes, line)(number(0.0)))
            )
            # 0 times the infinite slope of what counts as 0 is NaN
            if found is not None and (line.whole or math.isfinite(found)):
                values[modes] = found
        expected, error = by_differences(below)
        size = abs(expected) + scale
        tolerance = self.numeric * size + error
        known = math.isfinite(expected) and error < 1e-3 * size
        if known and any(not abs(v - expected) <= tolerance for v in values.values()):
            again = by_differences(below, STEP / 8)[0]
            corner = below is line and self.sample.variant and line.has_corner(tolerance)
            known = abs(again - expected) <= tolerance and not corner and not has_kink(below, size)
        if known:
            self.checks += len(values)
            return [
                m
                for m, v in values.items()
                if self.agree(line, f"{' of '.join(m)} against differences", v, expected, tolerance)
            ]
        self.unsure += 1
        finite = {m: v for m, v in values.items() if math.isfinite(v)}
        first = next(iter(finite), ())
        for m, v in finite.items():
            self.checks += 1
            name = f"{' of '.join(m)} against {' of '.join(first)}"
            self.agree(line, name, v, finite[first], self.numeric * (scale + abs(v)))
        return []

    def derivatives(self, line: Line, thorough: bool) -> None:
        modes = ("jvp", "grad")
        right = self.order(line, line, [(m,) for m in modes])
        if not right:
            return
        with Borrowed() as borrowed:
            right = self.order(line, self.nested(right[0], line), list(itertools.product(modes, modes)))
        if right and borrowed.names and thorough:
            self.order(line, self.nested(right[0], line), [("jvp",) * 3, ("grad",) * 3, ("jvp", "grad", "jvp")])

    def batches(self, line: Line, thorough: bool) -> None:
        rows = torch.tensor(ROWS, dtype=torch.float64)
        for modes in (("grad",), ("jvp",), ("jvp", "grad"), ("grad", "grad"))[:: 1 if thorough else 2]:

            def f(s: Tensor, modes: tuple[str, ...] = modes) -> Tensor:
                return self.nested(modes, lambda t: line(t, s))(number(0.0))

            name = f"vmap of {' of '.join(modes)}"
            try:
                expected = torch.stack([f(s) for s in rows])
            except Exception:  # noqa: BLE001, S112 - the other checks have found that
                continue
            run = lambda f=f: self.backend.vmap(f, randomness="same")(rows)
            got = self.value(line, name, run)
            if got is None:
                continue
            for k, (a, b) in enumerate(zip(got.tolist(), expected.tolist())):
                if math.isfinite(b):
                    self.agree(line, f"{name} against a loop, row {k}", a, b, self.exact * (line.scale() + abs(b)))

    def run(self, thorough: bool = True) -> Judge:
        s = self.sample
        for tracked, batched in choices(s, thorough):
            if batched:
                self.batches(Line(s, tracked, batched), thorough)
                continue
            line = Line(s, tracked, ())
            self.adjointness(line)
            self.derivatives(line, thorough)
        return self


class Borrowed:
    """Context: which operators' derivatives are taken from PyTorch."""

    def __enter__(self) -> Borrowed:  # noqa: PYI034 - not subclassed
        from functrans.interpreters.grad import recording
        from functrans.interpreters.jvp import fallback

        self.names: set[str] = set()

        def noting(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(borrower: Any, op: Any, *rest: Any) -> Any:
                self.names.add(str(op))
                return function(borrower, op, *rest)

            return run

        self.patches = [
            patch.object(recording, "run_recorded", noting(recording.run_recorded)),
            patch.object(fallback, "run_forward_mode", noting(fallback.run_forward_mode)),
        ]
        for p in self.patches:
            p.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for p in self.patches:
            p.stop()


def choices(s: Sample, thorough: bool) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which arguments are tracked, and which batched (none: no vmap). Bounded: all, and each of the first few alone."""
    if not s.floats or not s.float_outputs:
        return
    every = tuple(j for j in s.diff if j in s.floats)[:5]
    alone = [(j,) for j in s.floats[:4]] if thorough else [(s.floats[s.index % len(s.floats)],)]
    tracked = list(dict.fromkeys([*([every] if every else []), *alone]))
    for t in tracked:
        yield t, ()
    if s.variant or s.index % 4 and thorough:
        return
    for t in tracked if thorough else tracked[:1]:
        yield t, t
    for t in tracked:
        rest = tuple(j for j in every if j not in t)
        if rest:
            yield t, rest


# ---- operators, samples, and the run


def operators() -> dict[str, Any]:
    """Every operator of the database but those whose value is whatever lies in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {
        op.full_name: op for op in op_db
        if not op.name.startswith("jiterator") and op.name not in UNINITIALIZED and op.supports_autograd
    }  # fmt: skip


def samples(op: Any, dtype: torch.dtype, cap: int | None, seed: int = 0, variants: bool = True) -> Iterator[Sample]:
    """The samples of an operator, spread out if there are more than ``cap``; the first ones at ties and zeros, too."""
    if dtype not in op.supported_dtypes("cpu"):
        return
    reseed(zlib.crc32(f"{op.full_name} {seed}".encode()))
    with sampling():
        found = list(enumerate(op.sample_inputs("cpu", dtype, requires_grad=True, set_seed=False)))
    if cap is not None and len(found) > cap:
        found = [found[round(k * (len(found) - 1) / max(1, cap - 1))] for k in range(cap)]
    done: Counter[str] = Counter()
    for index, sample in found:
        try:
            made = Sample(op, sample, index)
        except (RuntimeError, ValueError):  # a few samples only work on the storage that they came with
            continue
        if sum(made.leaves[j].numel() for j in made.floats) > 20000:
            continue
        yield made
        for name in (*VARIANTS, *INDEX_VARIANTS) if variants else ():
            other = varied(made, name) if done[name] < 2 else None
            if other is not None:
                done[name] += 1
                yield other


@dataclass
class Tally:
    samples: int = 0
    checks: int = 0
    unsure: int = 0
    cut: bool = False  # there was no time for the rest of the samples


def check_operator(
    op: Any, backend: Any, dtypes: Any = tuple(DTYPES), cap: int | None = None, seed: int = 0, thorough: bool = True,
    limit: float = math.inf, variants: bool = True,
) -> tuple[list[Finding], Tally]:
    """Everything that is wrong or refused of one operator, without what ``CONVENTIONS`` sets aside."""
    torch.set_num_threads(1)
    end = time.perf_counter() + limit
    findings: list[Finding] = []
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in dtypes:
            for sample in samples(op, DTYPES[dtype], cap, seed, variants):
                if time.perf_counter() > end:
                    tally.cut = True
                    break
                judge = Judge(sample, backend).run(thorough)
                tally.samples += 1
                tally.checks += judge.checks
                tally.unsure += judge.unsure
                findings += [f for f in judge.findings if not set_aside(f)]
    return findings, tally


def set_aside(finding: Finding) -> bool:
    return any(pattern.matches(finding) for pattern in CONVENTIONS.get(finding.op, ()))


def main() -> int:
    parser = argparse.ArgumentParser(description="derivatives against each other and against differences, over OpInfo")
    parser.add_argument("--op", action="append", help="name of an operator (repeatable); default: all")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES))
    parser.add_argument("--samples", type=int, default=None, help="samples per operator; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer choices of tracked arguments")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds for one operator, after which fewer samples are taken"
    )
    parser.add_argument("--torch-func", action="store_true", help="judge torch.func instead of functrans")
    options = parser.parse_args()
    import functrans

    backend = torch.func if options.torch_func else functrans
    known = operators()
    start = time.perf_counter()
    crashed: list[str] = []
    total, refused, wrong = Tally(), defaultdict(Counter), defaultdict(list)
    for name in options.op or known:
        begin = time.perf_counter()
        try:
            findings, tally = check_operator(
                known[name],
                backend,
                options.dtype or tuple(DTYPES),
                options.samples,
                options.seed,
                not options.quick,
                options.limit,
            )
        except Exception:  # noqa: BLE001 - a hole in this file: the other operators are judged all the same
            traceback.print_exc(limit=-3)
            crashed.append(name)
            continue
        total = Tally(total.samples + tally.samples, total.checks + tally.checks, total.unsure + tally.unsure)
        seconds = time.perf_counter() - begin
        print(
            f"{name}: {tally.samples} samples, {tally.checks} checks, {len(findings)} findings, "
            f"{seconds:.1f} s{' (cut)' * tally.cut}",
            flush=True,
        )
        for finding in findings:
            print(f"  {finding}", flush=True)
            if finding.outcome == "wrong":
                wrong[name].append(finding)
            else:
                refused[name][finding.detail] += 1
    print("\nrefused:")
    for name, details in refused.items():
        for detail, count in details.most_common():
            print(f"  {name} ({count}): {detail}")
    print("\nwrong:")
    for name, found in wrong.items():
        print(f"  {name} ({len(found)}): {', '.join(sorted({f.check for f in found}))}")
    print(
        f"\n{len(options.op or known)} operators, {total.samples} samples, {total.checks} checks, "
        f"{total.unsure} without differences; "
        f"wrong in {len(wrong)} operators, refused in {len(refused)}; {time.perf_counter() - start:.0f} s"
    )
    if crashed:
        print(f"not judged: {', '.join(crashed)}")
    return 1 if wrong or crashed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
