"""sparsity, sparse_jacobian, sparse_hessian: no entry is missing, whatever the program; where the pattern is known, it
is that; the values are those of dense formulas and differences."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import dependence
import pytest
import torch
from identity_functions import identity
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from functrans import (
    custom_vjp,
    grad,
    hessian,
    jacfwd,
    jvp,
    sparse_hessian,
    sparse_jacobian,
    sparsity,
    vmap,
)
from functrans.core.stack import interpreter_stack
from functrans.errors import CallError
from functrans.extend import DERIVATIVES, derivative, overriding
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.shipped.coloring import Pattern, alone, colors_of_columns, star_colors
from functrans.shipped.sparsity_level import SparsityLevel

Function = Callable[[Tensor], Tensor]
aten = torch.ops.aten


def moving(f: Function, x: Tensor) -> Tensor:
    """Which outputs have a slope by which input at ``x``, by differences; what jumps has none."""
    columns = []
    for j in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[j] = 1e-5
        step = step.reshape(x.shape)
        a, b = ((f(x + h * step) - f(x - h * step)).flatten() / (2e-5 * h) for h in (1.0, 0.25))
        smooth = a.isfinite() & b.isfinite() & ((a - b).abs() < 1e-2 * a.abs())
        columns.append(smooth & (a.abs() > 1e-6))
    return torch.stack(columns, 1)


def differences(f: Function, x: Tensor) -> Tensor:
    """The Jacobian by central differences, [outputs, inputs]."""
    steps = 1e-6 * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    return torch.stack([(f(x + h) - f(x - h)).flatten() / 2e-6 for h in steps], 1)


def products_of(f: Function, jacobian: Any, x: Tensor) -> int:
    """How many examples the vmaps have that ``jacobian(f)(x)`` makes."""
    seen = []
    made = VmapInterpreter.__init__

    def noting(level: VmapInterpreter, *args: Any, **kwargs: Any) -> None:
        made(level, *args, **kwargs)
        seen.append(level.batch_size)

    with mock.patch.object(VmapInterpreter, "__init__", noting):
        jacobian(f)(x)
    return max(seen)


# ------------------------------------------------------------------------------------------- sound


def missing(call: Any, numel: int) -> list[str]:
    """The inputs of an operator's call on which an output depends that ``sparsity`` says nothing of."""
    flat, spec = tree_flatten((call.args, call.kwargs))
    if any(isinstance(a, Tensor) and a.layout not in LAYOUTS for a in flat):
        return []
    found = []
    for place, a in enumerate(flat):
        if not isinstance(a, Tensor) or a.dtype != torch.float64 or not 0 < a.numel() <= numel:
            continue
        if a.layout is not torch.strided:
            continue

        def f(x: Tensor, place: int = place) -> Tensor:
            values = [v.clone() if isinstance(v, Tensor) else v for v in flat]
            values[place] = x
            args, kwargs = tree_unflatten(values, spec)
            torch.manual_seed(0)
            outs = dependence.floats(call.op(*args, **kwargs))
            return torch.cat([o.flatten().double() for o in outs]) if outs else torch.zeros(0, dtype=torch.float64)

        try:
            slopes = moving(f, a)
        except RuntimeError:  # the operator refuses such arguments, or returns another number of elements
            continue
        pattern = sparsity(f)(a).to_dense()
        if pattern.shape == slopes.shape and (slopes & ~pattern).any():
            found.append(f"{call}: input {place}")
    return found


#: operators that have a slope and no derivative
NO_DERIVATIVE = {aten.detach.default, aten.normal.Tensor_float, aten.normal.Tensor_Tensor, aten.normal.float_Tensor}
#: the layouts that transforms take
LAYOUTS = {torch.strided, torch.sparse_coo}


def check_operators(wanted: set[Any], per_op: int, samples: int, numel: int) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = dependence.opinfo_calls(wanted - NO_DERIVATIVE, per_op, samples)
        found = [m for of_op in calls.values() for call in of_op for m in missing(call, numel)]
    assert found == []
    return len(calls)


def test_no_entry_of_an_operator_with_a_rule_is_missing() -> None:
    assert check_operators(set(SparsityLevel.rules), 2, 3, 30) > 90


@pytest.mark.slow
def test_no_entry_of_any_operator_is_missing() -> None:
    assert check_operators(set(dependence.pure_operators()), 6, 6, 60) > 500


#: statements of random programs; {a} and {b} are vectors of 8, {w} is one that may be written, {i} an index
STATEMENTS = [
    "{w} = {a}.sin() * {b}", "{w} = {a} + {b}", "{w} = {a}.clone()", "{w} = {a}.flip(0) * 2",
    "{w} = torch.cat([{a}[3:], {b}[:3]])", "{w} = torch.where({a} > 0, {a}, {b} * {b})", "{w} = {a}.roll(2)",
    "{w} = torch.where(mask, {a}, {b})", "{w} = {a}[index] * {b}", "{w} = {a}.cumsum(0)", "{w} = {a}.relu() + {b}",
    "{w} = banded @ {a}", "{w} = ({a}.view(2, 4) @ {b}.view(4, 2) @ {a}.view(2, 4)).reshape(8)",
    "{w} = {a}.view(2, 4).softmax(1).flatten()", "{w} = {a}.view(4, 2).t().reshape(8)", "{w} = {a}.sort()[0]",
    "{w} = {a}.view(2, 4).sum(0).repeat(2) * {b}", "{w} = torch.outer({a}[:2], {b}[:4]).flatten()",
    "{w} = {a}.gather(0, index)", "{w} = {a}.scatter_add(0, index, {b})", "{w} = {a}.scatter(0, index, {b})",
    "{w} = {a}.index_add(0, index[:3], {b}[:3])", "{w} = {a}.masked_fill(mask, 0.5)", "{w} = {a}[{b}.argsort()]",
    "{w} = nn.functional.conv1d({a}.view(1, 1, 8), kernel, padding=1).view(8) + {b}",
    "{w} = {a}.unfold(0, 1, 1).amax(1)",
    "{w} = nn.functional.max_pool2d({a}.view(1, 1, 2, 4), 2).repeat(1, 1, 2, 2).flatten()", "{w} = {a}.prod() + {b}",
    "{w} = nn.functional.layer_norm({a}.view(2, 4), (4,)).flatten()",
    "{w} = torch.linalg.solve({a}.diag_embed() + 9 * torch.eye(8, dtype=torch.float64), {b})",
    "{w} = {a}.clone(); {w}[2:5] = {b}[:3]", "{w} = {a}.clone(); {w}[index] = {b}",
    "{w} = {a}.clone(); {w}[1].mul_({b}[6])",
    "{w} = {a}.clone(); {w}.view(2, 4).t()[0].copy_({b}[:2])", "{w} = {a}.clone(); {w}[{w} > 0] = 0.5",
    "{w} = torch.zeros(8, dtype=torch.float64); {w}[::2] += {a}[:4]", "{w} = {a} * (9 if {b}.sum() > 0 else {a})",
    "{w} = grad(lambda t: (t[1:] * t[:-1] ** 2 * {b}[1:]).sum())({a})", "{w} = vmap(lambda s, t: s * t)({a}, {b})",
    "{w} = jvp(lambda t: t[1:].sin() * {b}[:-1], ({a},), ({b},))[1].sum() * {a}",
    "{w} = vmap(lambda t: t.cumsum(0) * t[0])({a}.view(2, 4)).flatten()",
]  # fmt: skip


def random_program(seed: int) -> tuple[str, Function]:
    chosen = random.Random(seed)
    names, lines = ["x", "x"], []
    for k in range(chosen.randint(2, 6)):
        w = f"v{k}"
        lines.append(chosen.choice(STATEMENTS).format(a=chosen.choice(names), b=chosen.choice(names[-3:]), w=w))
        names.append(w)
    source = "def f(x):\n    " + "\n    ".join(lines) + f"\n    return {names[-1]} + 0 * {names[-2]}\n"
    generator = torch.Generator().manual_seed(seed)
    space: dict[str, Any] = {
        "torch": torch, "nn": nn, "grad": grad, "vmap": vmap, "jvp": jvp,
        "index": torch.randint(8, (8,), generator=generator), "mask": torch.rand(8, generator=generator) > 0.5,
        "banded": torch.tril(torch.triu(torch.randn(8, 8, generator=generator, dtype=torch.float64), -1), 1),
        "kernel": torch.randn(1, 1, 3, generator=generator, dtype=torch.float64),
    }  # fmt: skip
    exec(source, space)  # noqa: S102 - the text above
    return source, space["f"]


def check_program(seed: int) -> None:
    source, f = random_program(seed)
    x = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    absent = moving(f, x) & ~sparsity(f)(x).to_dense()
    assert not absent.any(), f"{absent.nonzero().tolist()} of\n{source}"
    torch.testing.assert_close(sparse_jacobian(f)(x).to_dense(), jacfwd(f)(x), msg=lambda m: f"{m}\n{source}")


@pytest.mark.parametrize("block", range(4))
def test_no_entry_of_a_random_program_is_missing(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        check_program(seed)
    assert interpreter_stack() == []


@pytest.mark.slow
def test_no_entry_of_many_random_programs_is_missing() -> None:
    for seed in range(1000, 4000):
        check_program(seed)


def test_the_check_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    with overriding(SparsityLevel.rules, aten.flip.default):
        SparsityLevel.rules.add(aten.flip.default, lambda level, x, dims: level.carry(x.value, numbers=x.numbers))
        call = dependence.Call(aten.flip.default, (torch.randn(4, dtype=torch.float64), [0]), {})
        assert missing(call, 30) != []


# ------------------------------------------------------------------------------------------- and no more than that

BAND = torch.ones(6, 6).tril(1).triu(-1)
EYE, FULL = torch.eye(6), torch.ones(6, 6)
INDEX = torch.tensor([5, 0, 0, 3, 1, 1])
MASK = torch.tensor([True, False, True, False, False, True])
BLOCKS = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))

#: a function of a vector of 6, and the pattern that it has
EXACT: dict[str, tuple[Function, Tensor]] = {
    "pointwise": (lambda x: (x.sin() * 2 + 1).exp() / x, EYE),
    "neighbours": (lambda x: x[1:] * x[:-1], torch.ones(5, 6).tril(1).triu()),
    "flip": (lambda x: x.flip(0), EYE.flip(0)),
    "index": (lambda x: x[INDEX], EYE[INDEX]),
    "index that depends on the input": (lambda x: x[x.argsort()], FULL),
    "gather": (lambda x: x.gather(0, INDEX), EYE[INDEX]),
    "mask": (lambda x: x[MASK], EYE[MASK]),
    "cumsum": (lambda x: x.cumsum(0), FULL.tril()),
    "reduction": (lambda x: x.view(2, 3).sum(1), torch.block_diag(torch.ones(1, 3), torch.ones(1, 3))),
    "softmax": (lambda x: x.view(2, 3).softmax(1), BLOCKS),
    "layer norm": (lambda x: nn.functional.layer_norm(x.view(2, 3), (3,)), BLOCKS),
    "banded matrix": (lambda x: BAND @ x, BAND),
    "banded matrix on the other side": (lambda x: x @ BAND, BAND),
    "dense matrix": (lambda x: FULL @ x, FULL),
    "matrices": (lambda x: x.view(2, 3) @ torch.ones(3, 3), BLOCKS),
    "convolution": (lambda x: nn.functional.conv1d(x.view(1, 1, 6), torch.ones(1, 1, 3), padding=1), BAND),
    "transposed convolution": (
        lambda x: nn.functional.conv_transpose1d(x.view(1, 1, 6), torch.ones(1, 1, 3), padding=1), BAND
    ),
    "groups": (lambda x: nn.functional.conv1d(x.view(1, 2, 3), torch.ones(2, 1, 1), groups=2), EYE),
    "pooling": (
        lambda x: nn.functional.avg_pool1d(x.view(1, 1, 6), 2), torch.eye(3).repeat_interleave(2, 1)
    ),
    "both branches": (lambda x: torch.where(x > 0, x, x.flip(0)), ((EYE + EYE.flip(0)) > 0).float()),
    "one branch": (
        lambda x: torch.where(MASK, x, x.flip(0)), torch.where(MASK[:, None], EYE, EYE.flip(0))
    ),
    "written": (lambda x: x.clone().index_copy_(0, INDEX[:2], x[:2]), torch.stack([EYE[1], *EYE[1:5], EYE[0]])),
    "added": (lambda x: torch.zeros(6).index_add(0, INDEX, x), EYE[INDEX].T),
    "overwritten by a constant": (lambda x: x.masked_fill(MASK, 0), EYE * ~MASK[:, None]),
    "a view is written": (lambda x: written(x), EYE + torch.outer(EYE[2], EYE[0])),
    "no derivative": (lambda x: x.floor() + x.detach() + (x > 0), torch.zeros(6, 6)),
    "constant": (lambda x: torch.ones(6), torch.zeros(6, 6)),
    "gradient": (grad(lambda x: (x[1:] * x[:-1] ** 2).sum()), BAND - torch.diag(torch.tensor([0.0] * 5 + [1.0]))),
    "vmap": (lambda x: vmap(lambda row: row.sum() * row)(x.view(2, 3)), BLOCKS),
}  # fmt: skip


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(2, 3)[0, 2:].mul_(x[0])
    return y


@pytest.mark.parametrize("name", EXACT)
def test_the_pattern_is_this(name: str) -> None:
    f, expected = EXACT[name]
    found = sparsity(f)(torch.randn(6).abs() + 0.1)
    assert found.layout is torch.sparse_coo and found.dtype is torch.bool and found.is_coalesced()
    assert torch.equal(found.to_dense(), expected.bool())


def test_a_draw_is_no_constant() -> None:
    f: Function = lambda x: x[torch.randperm(6)]
    assert sparsity(f)(torch.ones(6)).to_dense().all()


def test_a_zero_that_has_a_derivative_is_no_zero() -> None:
    """The values differentiate right by a matrix whose entries are zero just here."""
    x, band = torch.randn(6, dtype=torch.float64), BAND.double()
    total: Function = lambda a: (sparse_jacobian(lambda x: a @ x)(x).to_dense() ** 2 + a).sum()
    weights = torch.randn(6, 6, dtype=torch.float64)
    slope = grad(lambda a: (sparse_jacobian(lambda x: a @ x)(x).to_dense() * weights).sum())(band)
    torch.testing.assert_close(slope, weights)
    torch.testing.assert_close(grad(total)(band), 2 * band + 1)


def test_what_the_user_derives_otherwise() -> None:
    flip, floor = aten.flip.default, aten.floor.default
    with overriding(DERIVATIVES, flip, floor):
        derivative(flip, self=lambda grad: grad.sum().expand(grad.shape))
        derivative(floor, self=lambda grad: grad, tangent="elementwise")
        assert sparsity(lambda x: x.flip(0))(torch.ones(3)).to_dense().all()
        assert torch.equal(sparsity(torch.floor)(torch.ones(3)).to_dense(), torch.eye(3).bool())
    assert torch.equal(sparsity(lambda x: x.flip(0))(torch.ones(3)).to_dense(), torch.eye(3).flip(0).bool())


#: The derivative is that of flip.
Reversed = identity(jvp=lambda ctx, tangent: tangent.flip(0))


@custom_vjp
def straight_through(x: Tensor) -> Tensor:
    return x.floor()


straight_through.defvjp(lambda x: (x.floor(), None), lambda residuals, g: (g.flip(0),))


def test_functions_with_derivatives_of_their_own() -> None:
    x = torch.randn(3)
    assert sparsity(Reversed.apply)(x).to_dense().all() and sparsity(straight_through)(x).to_dense().all()
    assert torch.equal(sparse_jacobian(Reversed.apply)(x).to_dense(), torch.eye(3).flip(0))


# ------------------------------------------------------------------------------------------- products


def laplacian(shape: tuple[int, ...]) -> Function:
    def f(x: Tensor) -> Tensor:
        u = nn.functional.pad(x.reshape(shape), (1, 1) * len(shape))
        inner = (slice(1, -1),) * len(shape)
        total = x.reshape(shape) ** 3
        for d in range(len(shape)):
            for there in (slice(2, None), slice(None, -2)):
                total = total + u[(*inner[:d], there, *inner[d + 1 :])]
        return total.flatten()

    return f


@pytest.mark.parametrize(("shape", "count"), [((10_000,), 3), ((100, 100), 5), ((37, 41), 5), ((9, 11, 10), 7)])
def test_a_stencil_takes_as_many_products_as_it_has_points(shape: tuple[int, ...], count: int) -> None:
    f, n = laplacian(shape), int(torch.tensor(shape).prod())
    x = torch.randn(n, dtype=torch.float64)
    assert products_of(f, sparse_jacobian, x) == count
    found = sparse_jacobian(f)(x)
    assert found._nnz() < (2 * len(shape) + 1) * n
    v = torch.randn(n, 1, dtype=torch.float64)
    step = 1e-6
    by_differences = (f(x + step * v[:, 0]) - f(x - step * v[:, 0])) / (2 * step)
    torch.testing.assert_close((found @ v)[:, 0], by_differences, rtol=1e-6, atol=1e-6)


def arrow(x: Tensor) -> Tensor:
    return (x[0] * x).square().sum() + x[0] ** 3


def chain(x: Tensor) -> Tensor:
    return ((x[1:] - x[:-1] ** 2) ** 2).sum() + (1 - x).square().sum()


@pytest.mark.parametrize(("f", "count"), [(arrow, 2), (chain, 3), (lambda x: (x**4).sum(), 1)])
def test_a_hessian_takes_few_products(f: Function, count: int) -> None:
    x = torch.randn(40, dtype=torch.float64)
    assert products_of(f, sparse_hessian, x) <= count
    found = sparse_hessian(f)(x).to_dense()
    torch.testing.assert_close(found, differences(grad(f), x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, hessian(f)(x))


def test_rows_where_these_are_fewer() -> None:
    f: Function = lambda x: torch.stack([x.prod(), x.square().sum()])
    x = torch.randn(50, dtype=torch.float64)
    assert products_of(f, sparse_jacobian, x) == 2
    torch.testing.assert_close(sparse_jacobian(f)(x).to_dense(), differences(f, x), rtol=1e-5, atol=1e-6)


def random_pattern(seed: int, symmetric: bool) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 20, (), generator=generator))
    dense = torch.rand(n, n if symmetric else n + 3, generator=generator) < torch.rand((), generator=generator) ** 2
    if symmetric:
        dense = dense | dense.T
    rows, columns = dense.nonzero(as_tuple=True)
    return Pattern(rows.numpy(), columns.numpy(), tuple(dense.shape))


@pytest.mark.parametrize("seed", range(60))
def test_colours_keep_what_meets_apart(seed: int) -> None:
    pattern = random_pattern(seed, False)
    colors, count = colors_of_columns(pattern)
    assert alone(pattern, colors, max(count, 1)).all() and colors.max(initial=0) < max(count, 1)
    pattern = random_pattern(seed, True)
    colors, count = star_colors(pattern)
    own = dict(zip(zip(pattern.rows.tolist(), pattern.columns.tolist(), strict=True),
                   alone(pattern, colors, max(count, 1)).tolist(), strict=True))  # fmt: skip
    assert all(direct or own[j, i] for (i, j), direct in own.items())


# ------------------------------------------------------------------------------------------- arguments and composition


def test_pytrees_and_argnums() -> None:
    def f(scale: Tensor, p: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
        return p["a"][1:] * p["a"][:-1] * scale, p["b"] ** n

    p = {"a": torch.randn(4, dtype=torch.float64), "b": torch.randn(2, 2, dtype=torch.float64)}
    scale = torch.tensor(2.0, dtype=torch.float64)
    found, dense = sparse_jacobian(f, argnums=(1, 0))(scale, p, 3), jacfwd(f, argnums=(1, 0))(scale, p, 3)
    patterns = sparsity(f, argnums=(1, 0))(scale, p, 3)
    for s, d, q in zip(tree_flatten(found)[0], tree_flatten(dense)[0], tree_flatten(patterns)[0], strict=True):
        torch.testing.assert_close(s.to_dense(), d.reshape(s.shape))
        assert s.shape == q.shape and s._nnz() == q._nnz()
    energy = lambda scale, p: (f(scale, p, 3)[0] ** 2).sum() + (f(scale, p, 3)[1] * p["b"]).sum()
    found, dense = sparse_hessian(energy, (0, 1))(scale, p), hessian(energy, (0, 1))(scale, p)
    for s, d in zip(tree_flatten(found)[0], tree_flatten(dense)[0], strict=True):
        torch.testing.assert_close(s.to_dense(), d.reshape(s.shape))


def curve(x: Tensor) -> Tensor:
    return x[1:].sin() * x[:-1] ** 2


def test_composed_with_the_transforms() -> None:
    x, t = torch.randn(2, 5, dtype=torch.float64)
    batch = torch.randn(3, 5, dtype=torch.float64)
    dense: Function = lambda x: sparse_jacobian(curve)(x).to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are made one by one under vmap
        torch.testing.assert_close(vmap(dense)(batch), torch.stack([differences(curve, row) for row in batch]))
    flat = lambda x: dense(x).flatten()
    torch.testing.assert_close(
        jvp(flat, (x,), (t,))[1], differences(flat, x) @ t, rtol=1e-6, atol=1e-6
    )
    total = lambda x: (dense(x) ** 2).sum()
    torch.testing.assert_close(grad(total)(x), differences(total, x)[0], rtol=1e-6, atol=1e-6)
    of_values = lambda x: (sparse_jacobian(curve)(x).values() ** 2).sum()
    by_differences = differences(grad(total), x)
    torch.testing.assert_close(sparse_hessian(of_values)(x).to_dense(), by_differences, rtol=1e-5, atol=1e-5)
    assert bool((sparsity(flat)(x).to_dense() | ~moving(flat, x)).all())
    y = x.clone().requires_grad_()
    total(y).backward()
    torch.testing.assert_close(y.grad, grad(total)(x))
    of_all = vmap(sparsity(curve), out_dims=None)(batch).to_dense()
    assert torch.equal(of_all, BAND.bool()[:4, :5].triu())


def test_the_argument_stays_as_it_is_while_the_pattern_is_found() -> None:
    x = torch.ones(3)
    sparsity(lambda x: x.mul_(2))(x)
    assert torch.equal(x, torch.ones(3))


def test_chunks() -> None:
    x = torch.randn(5, dtype=torch.float64)
    for chunk_size in (1, 2, 7):
        found = sparse_jacobian(curve, chunk_size=chunk_size)(x).to_dense()
        torch.testing.assert_close(found, differences(curve, x), rtol=1e-6, atol=1e-6)


def test_a_kept_pattern_holds_for_all_values() -> None:
    runs = []

    def f(x: Tensor, index: Tensor) -> Tensor:
        runs.append(None)
        return x[index] * x

    jacobian = sparse_jacobian(f, cache=True)
    for seed in range(3):
        torch.manual_seed(seed)
        x, index = torch.randn(4, dtype=torch.float64), torch.randperm(4)
        torch.testing.assert_close(jacobian(x, index).to_dense(), jacfwd(f)(x, index))
    assert len(runs) == 1 + 3 + 3  # once for the pattern, and for each Jacobian and oracle


def test_a_pattern_that_depends_on_numbers_is_not_kept() -> None:
    f: Function = lambda x: x.flip(0) if x.sum() > 0 else x * 2
    jacobian = sparse_jacobian(f, cache=True)
    assert torch.equal(jacobian(torch.ones(3)).to_dense(), torch.eye(3).flip(0))
    assert torch.equal(jacobian(-torch.ones(3)).to_dense(), 2 * torch.eye(3))


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2, 0)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    found = sparse_jacobian(lambda x: x * 3)(x)
    assert torch.equal(found.to_dense(), 3 * torch.eye(x.numel(), dtype=torch.float64))
    assert sparse_jacobian(lambda x: torch.ones(2))(x).shape == (2, x.numel())


def test_a_failure_leaves_no_level() -> None:
    def fail(x: Tensor) -> Tensor:
        raise ValueError("inside")

    for transform in (sparsity, sparse_jacobian, sparse_hessian):
        with pytest.raises(ValueError, match="inside"):
            transform(fail)(torch.ones(2))
        assert interpreter_stack() == []


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: sparsity(3.0), "sparsity(3.0, ...): got the float 3.0"),
        (lambda: sparsity(curve)(3.0), "args[0]"),
        (lambda: sparsity(curve)(torch.ones(3, dtype=torch.int64)), "dtype torch.int64"),
        (lambda: sparsity(curve, argnums=1)(torch.ones(3)), "argnum 1"),
        (lambda: sparsity(lambda x: 3.0)(torch.ones(3)), "got the float 3.0 as output"),
        (lambda: sparsity(lambda x: x)({}), "at least one tensor"),
        (lambda: sparse_jacobian(curve)(torch.ones(3) * 1j), "expected real tensors"),
        (lambda: sparse_jacobian(curve, chunk_size=0), "chunk_size=0"),
        (lambda: sparse_jacobian(curve, cache="yes"), "cache"),
        (lambda: sparse_hessian(curve)(torch.ones(3)), "an output of shape (2,)"),
        (lambda: sparse_jacobian(lambda x, o: x, cache=True)(torch.ones(3), {1, 2}), "hashable arguments"),
    ],
)
def test_bad_input(run: Callable[[], Any], text: str) -> None:
    with pytest.raises(CallError) as caught:
        run()
    assert text in str(caught.value)
    assert interpreter_stack() == []
