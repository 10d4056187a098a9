"""Random programs under random nestings of the transforms: equal to torch.func, and no error where it has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import PlainTransforms
from program_fuzzer import FAILURES, Failure, fuzz, run
from program_generator import Generator, render
from torch.utils._pytree import tree_map

import functrans

PARTS = 4


def nothing_left() -> None:
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
    assert torch.is_grad_enabled()


def report(failures: list[Failure]) -> str:
    return "\n".join(f"{f.kind}, program {f.case}: {f.what}\n{f.script}" for f in failures[:2])


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs(part: int) -> None:
    counts, failures = fuzz(functrans, cases=100, seed=100 + part, shrink_up_to=1, after_each=nothing_left)
    assert not failures, report(failures)
    # most programs must say something
    assert counts["match"] >= 50, counts


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_programs(part: int) -> None:
    _, failures = fuzz(functrans, cases=500, seed=1000 + part, after_each=nothing_left)
    assert not failures, report(failures)


def jvp_by_linearize(f: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    out, jvp_fn, *aux = functrans.linearize(f, *primals, **options)
    return out, jvp_fn(*tangents), *aux


def purified(name: str, remove: str) -> Any:
    """The transform of the function without writes, itself without writes."""
    transform = getattr(functrans, name)

    def pure(f: Any) -> Any:
        return functrans.functionalize(f, remove=remove)

    if name == "jvp":
        return lambda f, *args, **options: pure(lambda *args: transform(pure(f), *args, **options))(*args)
    if name == "vjp":
        return lambda f, *args, **options: transform(pure(f), *args, **options)
    return lambda f, *args, **options: pure(transform(pure(f), *args, **options))


VARIANTS = {
    "jvp by linearize": {"jvp": jvp_by_linearize},
    **{
        f"without {remove}": {name: purified(name, remove) for name in ("grad", "grad_and_value", "vjp", "jvp", "vmap")}
        for remove in ("mutations", "mutations_and_views")
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_random_programs_by_other_names(variant: str, part: int) -> None:
    names = ("grad", "grad_and_value", "vjp", "jvp", "vmap")
    backend = SimpleNamespace(**({name: getattr(functrans, name) for name in names} | VARIANTS[variant]))
    counts, failures = fuzz(backend, cases=60, seed=300 + part, shrink_up_to=1, after_each=nothing_left)
    assert not failures, report(failures)
    assert counts["match"] >= 25, counts


# ---- the tester, tested: planted bugs are found


def forgets_negative_out_dims(f: Any, in_dims: Any = 0, out_dims: Any = 0, **options: Any) -> Any:
    return functrans.vmap(f, in_dims, tree_map(abs, out_dims) if out_dims != -2 else 0, **options)


def ignores_no_grad(f: Any, *args: Any, **options: Any) -> Any:
    def recording(*inner: Any) -> Any:
        kept = torch.no_grad.__enter__
        torch.no_grad.__enter__ = lambda self: setattr(self, "prev", torch.is_grad_enabled())
        try:
            return f(*inner)
        finally:
            torch.no_grad.__enter__ = kept

    return functrans.grad(recording, *args, **options)


def drops_tangent_of_second_argument(f: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    return functrans.jvp(f, primals, (tangents[0], *(torch.zeros_like(t) for t in tangents[1:])), **options)


def slightly_wrong(f: Any, *args: Any, **options: Any) -> Any:
    transformed = functrans.grad(f, *args, **options)
    return lambda *a: tree_map(lambda t: t * (1 + 1e-6), transformed(*a))


def fails_in_pullback(f: Any, *primals: Any, **options: Any) -> Any:
    out, _, *aux = functrans.vjp(f, *primals, **options)

    def pullback(_: Any) -> Any:
        raise NotImplementedError

    return out, pullback, *aux


@pytest.mark.parametrize(
    "planted",
    [
        {"vmap": forgets_negative_out_dims},
        {"grad": ignores_no_grad},
        {"jvp": drops_tangent_of_second_argument},
        {"grad": slightly_wrong},
        {"vjp": fails_in_pullback},
    ],
    ids=lambda planted: next(iter(planted.values())).__name__,
)
def test_planted_bugs_are_found(planted: dict[str, Any]) -> None:
    names = ("grad", "grad_and_value", "vjp", "jvp", "vmap")
    backend = SimpleNamespace(**({name: getattr(functrans, name) for name in names} | planted))
    counts, failures = fuzz(backend, cases=80, seed=7, shrink_up_to=0)
    assert sum(counts[kind] for kind in FAILURES) >= 1
    assert failures[0].script.startswith("import torch\nimport functrans")


def test_a_failure_is_made_small() -> None:
    names = ("grad", "grad_and_value", "vjp", "jvp", "vmap")
    backend = SimpleNamespace(**({name: getattr(functrans, name) for name in names} | {"grad": slightly_wrong}))
    _, failures = fuzz(backend, cases=30, seed=7, shrink_up_to=1)
    small = failures[0].script.split("generator = ")[0].strip().splitlines()
    original = list(render([Generator(failures[0].case).program()]))
    assert len(small) < 0.6 * len(original), "\n".join(small)


def test_oracles_agree_with_each_other() -> None:
    """Plain autograd and the loop against torch.func, in-process, on one program that uses all transforms."""
    source = """
def program(F, x0, c0, C0, buffer, write_out):
    def f(y):
        w = buffer(y)
        w.add_(y * x0)
        w[0] = y[1]
        return (w.sin() * c0).sum()
    g, v = F.grad_and_value(f)(x0)
    o, pullback = F.vjp(lambda z: C0 @ z * g, x0)
    p, t = F.jvp(lambda z: z * v + g.sin(), (x0,), (c0,))
    q = F.vmap(lambda z, k: z * k.sum(), in_dims=(1, None), out_dims=-1)(torch.stack([g, t], 1), p)
    return pullback(o)[0] + t + q.sum(-1)
"""
    expected = run(source, torch.func, 5, True)
    for backend in (PlainTransforms, functrans):
        for got, want in zip(run(source, backend, 5, True), expected):
            torch.testing.assert_close(got, want)
