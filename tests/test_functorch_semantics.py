"""What PyTorch's own tests of torch.func ask, in words and with oracles of our own: loops, and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import for_each
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx

from functrans import functionalize, grad, jvp, vjp, vmap
from functrans.errors import CapturedOnceError, InsideTransformError

DOUBLE = torch.float64
#: Each transform as one that gives the function's value.
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda f: lambda x: vmap(f)(x.unsqueeze(0)).squeeze(0),
    "vjp": lambda f: lambda x: vjp(f, x)[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[0],
    "functionalize": functionalize,
    "functionalize, without views": lambda f: functionalize(f, remove="mutations_and_views"),
    "vmap of vjp": lambda f: lambda x: vmap(lambda x: vjp(f, x)[0])(x.unsqueeze(0)).squeeze(0),
}


# ---------------------------------------------------------------------------------------------------------------
# out= of another size

SHAPES = [(), (0,), (2,), (0, 3), (4,), (6,), (3, 3), (1, 4)]


def squares_into(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=DOUBLE)
        torch.mul(x, x, out=out)
        out.view(2, 2)[0].mul_(x.sum())
        return out

    return f


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_output_becomes_as_large_as_it_must(transform: str, shape: tuple[int, ...]) -> None:
    """And is viewed and written then as all others are."""
    x = torch.randn(4, dtype=DOUBLE)
    got, expected = TRANSFORMS[transform](squares_into(shape))(x), squares_into(shape)(x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_output_that_grew_has_its_derivative(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, dtype=DOUBLE)
    expected = jacobian(lambda x: torch.cat([x[:2] ** 2 * x.sum(), x[2:] ** 2]), x)
    pullback = vjp(squares_into(shape), x)[1]
    torch.testing.assert_close(vmap(pullback)(torch.eye(4, dtype=DOUBLE))[0], expected)
    columns = vmap(lambda t: jvp(squares_into(shape), (x,), (t,))[1], out_dims=1)(torch.eye(4, dtype=DOUBLE))
    torch.testing.assert_close(columns, expected)


# ---------------------------------------------------------------------------------------------------------------
# What is recorded is recorded for other numbers

INDEXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one": lambda x, i: x[i[0]],
    "the last dimension": lambda x, i: x[..., i[1]],
    "two": lambda x, i: x[i[0], i[1]],
    "the operator": lambda x, i: torch.ops.aten.index(x, [i[0], i[1]]),
    "the operator, of a tensor for a list": lambda x, i: torch.ops.aten.index(x, i),
    "written": lambda x, i: x.clone().index_put_((i[0],), x.sum()),
    "written through": lambda x, i: (y := x * 2, y[i[0]].mul_(3), y)[2],
}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", INDEXED)
def test_a_recorded_index_is_not_read(name: str, mode: str) -> None:
    """A constant of all levels that is an index: the graph holds for other indices."""
    f = INDEXED[name]
    x, xs = torch.randn(3, 3), torch.randn(2, 3, 3)
    first, second = torch.tensor([0, 1]), torch.tensor([2, -1])
    graph = make_fx(functionalize(f), tracing_mode=mode)(x, first)
    assert torch.equal(graph(x, second), f(x, second))
    batched = make_fx(vmap(f, in_dims=(0, None)), tracing_mode=mode)(xs, first)
    assert torch.equal(batched(xs, second), for_each(f, in_dims=(0, None))(xs, second))


# ---------------------------------------------------------------------------------------------------------------
# Views

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "squeeze": lambda x: x.squeeze(),
    "squeeze of one dimension": lambda x: x.squeeze(0),
    "squeeze of two": lambda x: x.squeeze((0, 1)),
    "transpose": lambda x: x.transpose(0, 0),
    "t": lambda x: x[0].t(),
    "permute": lambda x: x.permute(0, 1),
    "movedim": lambda x: x.movedim(0, 0),
    "expand": lambda x: x.expand(4, 6),
    "slice": lambda x: x[:],
    "narrow": lambda x: x.narrow(0, 0, 4),
    "view": lambda x: x.view_as(x),
    "unflatten": lambda x: x.unflatten(0, (4,)),
    "split": lambda x: x.split(4)[0],
    "detach": lambda x: x.detach(),
    "complex numbers": lambda x: torch.view_as_complex(x.unflatten(1, (3, 2))),
    "pairs of numbers": lambda x: x.view(torch.complex128),
    "halves": lambda x: x.view(torch.int32),
    "real": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(1, (3, 2)))),
}


@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_every_example_is_a_view_of_the_batch(name: str, in_dim: int) -> None:
    """Also where there is nothing to do: a tensor of its own, in the caller's memory."""
    f, x = VIEWS[name], torch.randn(4, 4, 6, dtype=DOUBLE)
    got = vmap(f, in_dims=in_dim)(x)
    assert got is not x and got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert torch.equal(got, for_each(f, in_dims=in_dim)(x))


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.as_strided((3, 2), x.stride()[::-1]),
    "column": lambda x: x.as_strided((2,), x.stride()[:1], x.storage_offset() + x.stride(1)),
    "diagonal": lambda x: x.as_strided((2,), (sum(x.stride()),)),
    "every other": lambda x: x.as_strided((2,), (2 * x.stride(1),)),
    "repeated": lambda x: x.as_strided((4, 2, 3), (0, *x.stride())),
    "nothing": lambda x: x.as_strided((0, 2), x.stride()),
}
#: Batches of matrices of 2 x 3: how they lie in memory, and which dimension counts them.
LAYOUTS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "side by side": (lambda: torch.randn(5, 2, 3), 0),
    "columns first": (lambda: torch.randn(5, 3, 2).mT, 0),
    "one within the other": (lambda: torch.randn(2, 3, 5), 2),
    "rows by turns": (lambda: torch.randn(2, 5, 3), 1),
    "rows by turns, within something": (lambda: torch.randn(2, 2, 5, 3)[1], 1),
    "with gaps": (lambda: torch.randn(2, 4, 5, 3, 7)[:, 2, :, :, 1], 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLACES)
def test_the_places_of_an_example(name: str, layout: str) -> None:
    """as_strided finds an example's elements wherever they are."""
    make, in_dim = LAYOUTS[layout]
    x, f = make(), PLACES[name]
    expected = torch.stack([f(row) for row in x.unbind(in_dim)])
    assert torch.equal(vmap(f, in_dims=in_dim)(x), expected)


def test_the_places_between_an_examples_elements() -> None:
    """They hold other examples, or what the function does not know of."""
    with pytest.raises(InsideTransformError, match="places that are not its own"):
        vmap(lambda x: x.as_strided((2,), (1,)), in_dims=1)(torch.randn(3, 5))
    with pytest.raises(InsideTransformError, match="computed while examples lay between"):
        # in a loop a copy has rows of 5, here of 15
        vmap(lambda x: x.clone().as_strided((2,), (5,)), in_dims=2)(torch.randn(2, 5, 3))
    with pytest.raises(RuntimeError, match="same length"):
        vmap(lambda x: x.as_strided((2, 1), (1,)))(torch.randn(3, 5))


# ---------------------------------------------------------------------------------------------------------------
# What an operator asks of its arguments is asked where a rule takes it apart


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batched", [(0, 0, 0), (0, 0, None), (0, None, 0), (0, None, None), (None, 0, 0),
                                     (None, 0, None), (None, None, 0)], ids=str)  # fmt: skip
def test_a_convolutions_bias(batched: tuple[int | None, ...], groups: int, transposed: bool) -> None:
    """Of one number for each channel, and of the input's dtype."""
    conv = torch.conv_transpose2d if transposed else torch.conv2d
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 4 // groups, 3, 3)
    good = torch.randn(4)

    def call(bias: Tensor) -> tuple[Any, list[Tensor]]:
        def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return conv(x, weight, bias, groups=groups)

        given = [a if d is None else torch.stack([a, 2 * a]) for a, d in zip((x, weight, bias), batched, strict=True)]
        return f, given

    f, given = call(good)
    torch.testing.assert_close(vmap(f, in_dims=batched)(*given), for_each(f, in_dims=batched)(*given))
    for bad in (good.double(), good.long(), good[:1], good[:2], good.repeat(2), good.unsqueeze(0), good[0]):
        f, given = call(bad)
        with pytest.raises(RuntimeError):
            f(x, weight, bad)
        with pytest.raises(RuntimeError):
            vmap(f, in_dims=batched)(*given)


SUMS_OF_PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "addmm": ((2, 3), (2, 2), (2, 1)),
    "baddbmm": ((1, 2, 3), (1, 2, 2), (1, 2, 1)),
    "addbmm": ((2, 3), (4, 2, 2), (4, 2, 1)),
    "addmv": ((3,), (1, 2), (2,)),
    "addr": ((2, 3), (2,), (1,)),
}


@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0)])
@pytest.mark.parametrize("name", SUMS_OF_PRODUCTS)
def test_an_addend_does_not_expand_the_product(name: str, batched: tuple[int | None, ...]) -> None:
    f, shapes = getattr(torch, name), SUMS_OF_PRODUCTS[name]
    with pytest.raises(RuntimeError):
        f(*map(torch.ones, shapes))
    given = [torch.ones(s if d is None else (2, *s)) for s, d in zip(shapes, batched, strict=True)]
    with pytest.raises(RuntimeError):
        vmap(f, in_dims=batched)(*given)


# ---------------------------------------------------------------------------------------------------------------
# PyTorch's own autograd, of captured tensors


def test_autograd_inside_of_what_was_captured() -> None:
    """Its graph is found whether the output was computed outside or inside; cotangents are of the transforms."""
    x, y = torch.randn(3, dtype=DOUBLE, requires_grad=True), torch.randn(3, dtype=DOUBLE)
    outside = x.exp() * y
    expected = torch.diag(x.exp() * y).detach()
    for output in (lambda: outside, lambda: x.exp() * y):

        def pulled(v: Tensor) -> Tensor:
            return torch.autograd.grad([output()], [x], grad_outputs=[v], retain_graph=True)[0]  # noqa: B023

        def differentiable(v: Tensor) -> Tensor:
            return torch.autograd.grad(output(), x, v, create_graph=True)[0]  # noqa: B023

        torch.testing.assert_close(vmap(pulled)(torch.eye(3, dtype=DOUBLE)), expected)
        torch.testing.assert_close(jvp(pulled, (y,), (y,))[1], expected @ y)
        _, pullback = vjp(differentiable, y)
        torch.testing.assert_close(vmap(pullback)(torch.eye(3, dtype=DOUBLE))[0].detach(), expected)
    alone = vmap(lambda v: torch.autograd.grad((x * y).sum(), x)[0] * v)(torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(alone, torch.diag(y))


def test_autograd_inside_of_what_has_no_graph() -> None:
    """What depends on the argument has no graph of PyTorch's, or none is kept: that is said, and no zero."""
    x = torch.randn(3, requires_grad=True)
    followed, by_captured = (
        lambda v: torch.autograd.grad(v.sin().sum(), v)[0].sum(),
        lambda v: torch.autograd.grad((v * x).sin().sum(), x)[0].sum(),
    )
    for f in (followed, by_captured):
        with pytest.raises(RuntimeError, match=r"without create_graph=True alone, .* is not possible"):
            vjp(f, torch.randn(3))
    for transformed in (lambda v: jvp(followed, (v,), (v,)), vmap(followed)):
        with pytest.raises(RuntimeError, match="of what has not been recorded inside .* is not possible"):
            transformed(torch.randn(3))
    v, t = torch.randn(2, 3)
    close = torch.testing.assert_close
    close(jvp(by_captured, (v,), (t,))[1], (((v * x).cos() - x * v * (v * x).sin()) * t).sum())
    close(vmap(by_captured)(torch.stack([v, t])), torch.stack([(v * (v * x).cos()).sum(), (t * (t * x).cos()).sum()]))


def test_leaves() -> None:
    """As in PyTorch: what has no gradient, and what it is taken for."""
    captured = torch.randn(3, requires_grad=True)
    made: dict[str, Callable[[Tensor], Tensor]] = {
        "argument": lambda x: x,
        "result": lambda x: x.sin(),
        "view": lambda x: x[:2],
        "written": lambda x: x.clone().mul_(2),
        "one of several": lambda x: x.unbind()[0],
        "pointwise, of several": lambda x: torch.addcmul(x, x, x),
        "constant": lambda x: torch.ones(3) * 2,
        "detached": lambda x: x.sin().detach(),
        "integer": lambda x: x.argmax(),
        "of what was captured": lambda x: captured.exp(),
    }
    for name, f in made.items():
        expected = f(torch.randn(3, requires_grad=True)).is_leaf
        found: list[bool] = []

        def note(x: Tensor) -> Tensor:
            found.append(f(x).is_leaf)  # noqa: B023
            return x.sum()

        x = torch.randn(3)
        vjp(note, x)
        if name != "argument":  # here it is one, and a result around
            vjp(lambda x: vmap(note)(x.unsqueeze(0)), x)
            vjp(lambda x: jvp(note, (x.exp(),), (x,))[0], x)
        vmap(lambda x: vjp(note, x)[0])(x.unsqueeze(0))
        assert set(found) == {expected}, (name, found, expected)


def test_whether_two_tensors_are_one_in_memory_is_not_known() -> None:
    for transform in (vmap(lambda x: (x.is_set_to(x), x)[1]), lambda x: vjp(lambda x: (x.is_set_to(x), x)[1], x)):
        with pytest.raises(InsideTransformError, match="is_set_to"):
            transform(torch.randn(3))


@pytest.mark.parametrize("transform", [vmap, lambda f: lambda x: vjp(f, x), lambda f: lambda x: jvp(f, (x,), (x,))])
def test_a_functions_refusal_is_that_of_what_is_not_implemented(transform: Any) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, *, factor: Tensor) -> Tensor:
            return factor * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

    with pytest.raises(NotImplementedError, match="keyword-only"):
        transform(lambda x: Scaled.apply(x, factor=x))(torch.randn(3))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tensors_without_data_are_captured(transform: str) -> None:
    """PyTorch asks a FakeTensor for its device by something that looks like an operator, and is none."""
    with FakeTensorMode():
        captured, x = torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=DOUBLE)
        out = TRANSFORMS[transform](lambda x: x * captured.to(x.device) + torch.ones(3, device=captured.device))(x)
    assert out.shape == (3,) and out.dtype is DOUBLE and out.device.type == "cpu"


SAME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "to a device": lambda y, x: y.to(torch.device("cpu")),
    "to a device and dtype": lambda y, x: y.to("cpu", DOUBLE),
    "to a layout": lambda y, x: torch.ops.aten.to.dtype_layout(y, dtype=DOUBLE, layout=torch.strided, device=x.device),
    "to another tensor's": lambda y, x: y.to(x),
    "type_as": lambda y, x: y.type_as(x),
    "view_as": lambda y, x: y.view_as(x),
    "expand_as": lambda y, x: y.expand_as(x),
    "reshape_as": lambda y, x: y.reshape_as(x),
}


@pytest.mark.parametrize("in_dim", [0, 1, 2])
@pytest.mark.parametrize("name", SAME)
def test_what_was_written_with_gaps_is_given_on(name: str, in_dim: int) -> None:
    """Arguments that say where a tensor is, or how another one looks."""

    def f(x: Tensor) -> Tensor:
        y = x.new_empty_strided((4, 4), (8, 2)).copy_(x)
        y[:, 1:].mul_(3)
        z = SAME[name](y, x)
        y[0].mul_(2)
        return z

    x = torch.randn(3, 4, 4, dtype=DOUBLE).movedim(0, in_dim).contiguous()
    expected = torch.stack([f(row) for row in x.unbind(in_dim)])
    assert torch.equal(vmap(f, in_dims=in_dim)(x), expected)


def test_nothing_is_written_anywhere() -> None:
    """Through an empty view its place does not matter, as where PyTorch's autograd pulls back through views."""

    def f(x: Tensor) -> Tensor:
        nothing = x.new_zeros(0, 3)
        nothing.as_strided((0, 2), (3, 1), 4).add_(1)
        return x.sum() + nothing.sum()

    for transform in TRANSFORMS.values():
        assert transform(f)(torch.ones(3)) == 3
    x = torch.randn(0, 3, 3, requires_grad=True)
    out = torch.nn.functional.pad(x, (1, 2), mode="circular")
    assert vmap(lambda v: torch.autograd.grad(out, x, v)[0])(torch.randn(2, *out.shape)).shape == (2, 0, 3, 3)


# ---------------------------------------------------------------------------------------------------------------
# What all examples share

UPDATES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda c: c.add_(1),
    "through a view": lambda c: c[0].mul_(2),
    "out=": lambda c: torch.add(c, 1, out=c),
    "out=, of a view": lambda c: torch.add(c[1:], 1, out=c[1:]),
    "of a gradient's argument": lambda c: grad(lambda c: c.add_(1).sum())(c),
    "of a tangent's argument": lambda c: jvp(lambda c: c.mul_(2), (c,), (c.clone(),)),
    "of an inner vmap's argument": lambda c: vmap(lambda y: y.add_(1))(c),
    "functionalized": lambda c: functionalize(lambda c: c.add_(1))(c),
}
REPLACEMENTS: dict[str, Callable[[Tensor], Any]] = {
    "copy_": lambda c: c.copy_(torch.arange(3.0)),
    "zero_": lambda c: c.zero_(),
    "out=": lambda c: torch.sin(torch.ones(3), out=c),
    "an element": lambda c: c.__setitem__(0, 5.0),
    "of a gradient's argument": lambda c: grad(lambda c: (c.zero_(), c.sum())[1])(c),
    "a copy": lambda c: c.clone().add_(1),
}


def under_vmap(write: Callable[[Tensor], Any], captured: bool) -> Tensor:
    """A tensor that is written where ``vmap`` runs over other ones."""
    shared, x = torch.ones(3), torch.randn(4)
    if captured:
        vmap(lambda x: (write(shared), x)[1])(x)
    else:
        vmap(lambda x, c: (write(c), x)[1], in_dims=(0, None))(x, shared)
    return shared


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_that_a_loop_would_repeat_is_refused(name: str, captured: bool) -> None:
    once, twice = torch.ones(3), torch.ones(3)
    UPDATES[name](once)
    UPDATES[name](twice), UPDATES[name](twice)
    assert not torch.equal(once, twice)
    with pytest.raises(CapturedOnceError, match="in_dim None"):
        under_vmap(UPDATES[name], captured)


@pytest.mark.parametrize("draw", [
    Tensor.random_, Tensor.normal_, Tensor.bernoulli_, Tensor.cauchy_, Tensor.exponential_, Tensor.log_normal_,
    Tensor.uniform_, lambda c: c.geometric_(0.5),
])  # fmt: skip
def test_the_same_draw_for_all_examples_replaces_what_they_share(draw: Callable[[Tensor], Tensor]) -> None:
    given, expected = torch.ones(3), torch.ones(3)
    torch.manual_seed(0)
    draw(expected)
    torch.manual_seed(0)
    vmap(lambda x, c: (draw(c), x)[1], in_dims=(0, None), randomness="same")(torch.ones(4), given)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_what_a_loop_would_write_again_the_same_is_written(name: str, captured: bool) -> None:
    expected = torch.ones(3)
    for _ in range(4):
        REPLACEMENTS[name](expected)
    assert torch.equal(under_vmap(REPLACEMENTS[name], captured), expected)


# ---------------------------------------------------------------------------------------------------------------
# Leading dimensions that broadcast

LOWER = torch.eye(3, dtype=DOUBLE) * 3


def factor(a: Tensor) -> Tensor:
    return a.tril(-1) + LOWER


#: Of two operands whose last two dimensions are 3 x 3 and 3 x 2, or as the rule says.
BROADCAST: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, int], tuple[int, int]]] = {
    "solve": (lambda a, b: torch.linalg.solve(factor(a), b), (3, 3), (3, 2)),
    "solve_triangular": (lambda a, b: torch.linalg.solve_triangular(factor(a), b, upper=False), (3, 3), (3, 2)),
    "solve_triangular, from the right": (
        lambda a, b: torch.linalg.solve_triangular(factor(a), b, upper=False, left=False), (3, 3), (2, 3),
    ),
    "cholesky_solve": (lambda a, b: torch.cholesky_solve(b, factor(a)), (3, 3), (3, 2)),
    "lu_solve": (lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(factor(a)), b), (3, 3), (3, 2)),
    "lstsq": (lambda a, b: torch.linalg.lstsq(factor(a), b).solution, (3, 3), (3, 2)),
    "matmul": (torch.matmul, (3, 3), (3, 2)),
    "cross": (lambda a, b: torch.linalg.cross(a, b), (2, 3), (2, 3)),
    "vecdot": (torch.linalg.vecdot, (2, 3), (2, 3)),
    "cdist, p=1": (lambda a, b: torch.cdist(a, b, p=1.0), (4, 3), (2, 3)),
    "cdist, p=2": (torch.cdist, (4, 3), (2, 3)),
    "cdist by a product": (
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"), (4, 3), (2, 3),
    ),
    "where": (lambda a, b: torch.where(a > 0, a, b), (2, 3), (2, 3)),
    "atan2": (torch.atan2, (2, 3), (2, 3)),
}  # fmt: skip
LEADING = [((2,), ()), ((), (2,)), ((2,), (1,)), ((1,), (2,)), ((2, 1), (4,)), ((4,), (2, 1)), ((2,), (2,))]
#: These want as many dimensions of both.
OF_ONE_RANK = ("lstsq", "cross")
PAIRS = [
    (name, pair) for name in BROADCAST for pair in LEADING if name not in OF_ONE_RANK or len(pair[0]) == len(pair[1])
]


@pytest.mark.parametrize(("name", "leading"), PAIRS, ids=str)
def test_a_broadcast_operands_cotangent_has_its_shape(name: str, leading: Any) -> None:
    """Of both operands at once and of each alone, without vmap, inside of it, and around it."""
    f, *ends = BROADCAST[name]
    a, b = (torch.randn(*lead, *end, dtype=DOUBLE) for lead, end in zip(leading, ends, strict=True))

    def pulled(f: Any, *operands: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in operands]
        out = f(*leaves)
        return torch.autograd.grad(out, leaves, torch.arange(out.numel(), dtype=DOUBLE).cos().view(out.shape))

    def ours(f: Any, *operands: Tensor) -> tuple[Tensor, ...]:
        out, pullback = vjp(f, *operands)
        return pullback(torch.arange(out.numel(), dtype=DOUBLE).cos().view(out.shape))

    torch.testing.assert_close(ours(f, a, b), pulled(f, a, b))
    torch.testing.assert_close(ours(lambda a: f(a, b), a), pulled(lambda a: f(a, b), a))
    torch.testing.assert_close(ours(lambda b: f(a, b), b), pulled(lambda b: f(a, b), b))
    for dims in ((0, 0), (0, None), (None, 0)):
        xs = [x if d is None else torch.stack([x, x / 2]) for x, d in zip((a, b), dims, strict=True)]
        inside = vmap(lambda a, b: ours(f, a, b), in_dims=dims)(*xs)
        torch.testing.assert_close(inside, for_each(lambda a, b: pulled(f, a, b), in_dims=dims)(*xs))
        torch.testing.assert_close(ours(vmap(f, in_dims=dims), *xs), pulled(for_each(f, in_dims=dims), *xs))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------
# What a function that writes to its argument returns

WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x.mul_(2),
    "a row": lambda x: x.mul_(2)[0],
    "a row that is written": lambda x: x[0].mul_(2),
    "transposed": lambda x: x.exp_().t(),
    "diagonal": lambda x: x.sin_().diagonal(),
    "a part": lambda x: x.sin_().unbind(0)[1].unsqueeze(1),
}


@pytest.mark.parametrize("out_dim", [0, -1])
@pytest.mark.parametrize("in_dim", [0, 1, 2])
@pytest.mark.parametrize("name", WRITTEN)
def test_views_of_an_argument_that_was_written_are_the_callers(name: str, in_dim: int, out_dim: int) -> None:
    f = WRITTEN[name]
    batch = torch.randn(4, 3, 5, dtype=DOUBLE)
    given = batch.movedim(0, in_dim).clone(memory_format=torch.contiguous_format)
    expected = torch.stack([f(row) for row in batch], out_dim)
    result = vmap(f, in_dim, out_dim)(given)
    assert torch.equal(result, expected) and torch.equal(given.movedim(in_dim, 0), batch)
    given.zero_()
    assert not result.any()
    twice = torch.randn(2, 4, 3, 5, dtype=DOUBLE).movedim(1, -1).contiguous()
    by_loop = torch.stack([vmap(f, -1, out_dim)(part) for part in twice.clone()])
    result = vmap(vmap(f, -1, out_dim))(twice)
    assert torch.equal(result, by_loop)
    twice.zero_()
    assert torch.equal(result, 0 * by_loop if name == "itself" else by_loop)  # at two levels: a view, or a copy


def test_a_copy_of_an_argument_that_was_written_is_none_of_the_callers() -> None:
    batch = torch.randn(4, 3, dtype=DOUBLE)
    result = vmap(lambda x: x.mul_(2).clone()[0])(batch)
    assert result.untyped_storage().data_ptr() != batch.untyped_storage().data_ptr()
    leaf = batch.clone().requires_grad_()
    expected = torch.autograd.grad((leaf[:, 0] ** 4).sum(), leaf)[0]
    torch.testing.assert_close(grad(lambda x: (vmap(lambda x: x.mul_(x)[0])(x * 1) ** 2).sum())(batch), expected)
