"""autograd.Function in both styles and torch.library custom ops: right at every level and nested, or an error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from plain import difference
from torch import Tensor

from functrans import grad, jacfwd, jacrev, jvp, vjp, vmap
from functrans.errors import CustomFunctionError
from functrans.interpreters.function_context import Context
from functrans.pytorch.versions import INSTALLED

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
Y = torch.tensor([1.3, 0.2, -0.4], dtype=torch.float64)
BATCH = torch.stack([X, Y])


class CubeSetup(torch.autograd.Function):
    """x ** 3 with setup_context, generate_vmap_rule and jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.save_for_backward(x, output[1])
        ctx.save_for_forward(x, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        x, _ = ctx.saved_tensors
        return g * 3 * x**2

    @staticmethod
    def jvp(ctx, t):
        x, _ = ctx.saved_tensors
        return t * 3 * x**2, torch.zeros_like(x)


class CubeCombined(torch.autograd.Function):
    """x ** 3 with a combined forward, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


class CubeWithVmap(torch.autograd.Function):
    """x ** 3 with a vmap staticmethod of its own; ``calls`` shows that it is used."""

    calls: ClassVar[list[Any]] = []

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x**2

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * 3 * x**2

    @staticmethod
    def vmap(info, in_dims, x):
        CubeWithVmap.calls.append((info.batch_size, info.randomness, in_dims))
        return CubeWithVmap.apply(x.movedim(in_dims[0], 0)), 0


class Product(torch.autograd.Function):
    """Two inputs, a number, an input that is not needed, and a second output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale):
        return x * y * scale, x + y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.scale = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        gx = g * y * ctx.scale + h if ctx.needs_input_grad[0] else None
        gy = g * x * ctx.scale + h if ctx.needs_input_grad[1] else None
        return gx, gy, None

    @staticmethod
    def jvp(ctx, tx, ty, _):
        x, y = ctx.saved_tensors
        return (tx * y + x * ty) * ctx.scale, tx + ty


class Surrogate(torch.autograd.Function):
    """A backward that is not the derivative of the forward: whoever differentiates the forward gives zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.exp(-(x**2))

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * torch.exp(-(x**2))


class OneOfThree(torch.autograd.Function):
    """Only a backward: forward mode has nothing to go by and must say so."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def product(x: torch.Tensor) -> torch.Tensor:
    out, total = Product.apply(x, x.sin(), 2.0)
    return out + 0.5 * total


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "setup_context": (lambda x: CubeSetup.apply(x)[0], lambda x: x**3),
    "vmap staticmethod": (CubeWithVmap.apply, lambda x: x**3),
    "two inputs and outputs": (product, lambda x: 2 * x * x.sin() + 0.5 * (x + x.sin())),
    "nested": (lambda x: CubeWithVmap.apply(CubeSetup.apply(x)[0] + x), lambda x: (x**3 + x) ** 3),
}

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f: grad(lambda x: (f(x) * Y).sum()),
    "jvp": lambda f: lambda x: jvp(f, (x,), (Y,))[1],
    "vjp": lambda f: lambda x: vjp(f, x)[1](Y)[0],
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, x * Y])).sum(0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_function_is_the_plain_formula_under_every_nesting(name: str, depth: int) -> None:
    custom, formula = FUNCTIONS[name]
    for kinds in itertools.product(TRANSFORMS, repeat=depth):
        f, g = custom, formula
        for kind in kinds:
            f, g = TRANSFORMS[kind](f), TRANSFORMS[kind](g)
        torch.testing.assert_close(f(X), g(X), msg=lambda text, k=kinds: f"{k}: {text}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_under_transforms_with_base_gradients(name: str) -> None:
    custom, formula = FUNCTIONS[name]
    for transformed in TRANSFORMS.values():
        grads = []
        for f in (custom, formula):
            x = X.clone().requires_grad_()
            transformed(f)(x).sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


def test_combined_forward() -> None:
    torch.testing.assert_close(grad(lambda x: CubeCombined.apply(x).sum())(X), 3 * X**2)
    torch.testing.assert_close(grad(lambda x: grad(lambda y: CubeCombined.apply(y).sum())(x).sum())(X), 6 * X)
    torch.testing.assert_close(vjp(CubeCombined.apply, X)[1](Y)[0], 3 * X**2 * Y)
    # there is no jvp and no vmap rule: right, or an error, never a zero
    for f, expected in (
        (lambda: vmap(CubeCombined.apply)(BATCH), BATCH**3),
        (lambda: jvp(CubeCombined.apply, (X,), (Y,))[1], 3 * X**2 * Y),
        (lambda: vmap(grad(lambda x: CubeCombined.apply(x).sum()))(BATCH), 3 * BATCH**2),
    ):
        try:
            got = f()
        except RuntimeError:
            continue
        torch.testing.assert_close(got, expected)


def test_the_custom_backward_is_what_counts() -> None:
    slope = torch.exp(-(X**2))
    torch.testing.assert_close(grad(lambda x: Surrogate.apply(x).sum())(X), slope)
    torch.testing.assert_close(jvp(Surrogate.apply, (X,), (Y,))[1], slope * Y)
    torch.testing.assert_close(vmap(grad(lambda x: Surrogate.apply(x).sum()))(BATCH), torch.exp(-(BATCH**2)))
    torch.testing.assert_close(grad(lambda b: vmap(Surrogate.apply)(b).sum())(BATCH), torch.exp(-(BATCH**2)))
    # the second derivative is that of the custom backward
    torch.testing.assert_close(grad(lambda x: grad(lambda y: Surrogate.apply(y).sum())(x).sum())(X), -2 * X * slope)
    # torch.func gives 0 here
    second = jvp(lambda x: jvp(Surrogate.apply, (x,), (torch.ones_like(x),))[1], (X,), (torch.ones_like(X),))[1]
    torch.testing.assert_close(second, -2 * X * slope)


def test_missing_jvp_is_an_error() -> None:
    torch.testing.assert_close(grad(lambda x: OneOfThree.apply(x).sum())(X), X.cos())
    with pytest.raises(RuntimeError):
        jvp(OneOfThree.apply, (X,), (Y,))
    with pytest.raises(RuntimeError):
        jacfwd(OneOfThree.apply)(X)


def test_missing_vmap_rule_is_an_error_or_right() -> None:
    try:
        got = vmap(OneOfThree.apply)(BATCH)
    except RuntimeError:
        return
    torch.testing.assert_close(got, BATCH.sin())


def test_vmap_staticmethod_is_called_with_batch_size_and_randomness() -> None:
    CubeWithVmap.calls.clear()
    vmap(CubeWithVmap.apply, in_dims=1, randomness="same")(BATCH)
    assert CubeWithVmap.calls == [(3, "same", (1,))]


def test_ctx_knows_which_inputs_need_grad() -> None:
    f = lambda x, y: Product.apply(x, y, 3.0)[0].sum()
    torch.testing.assert_close(grad(f, argnums=0)(X, Y), 3 * Y)
    torch.testing.assert_close(grad(f, argnums=1)(X, Y), 3 * X)
    assert not difference(grad(f, argnums=(0, 1))(X, Y), (3 * Y, 3 * X))
    torch.testing.assert_close(vmap(grad(f), in_dims=(0, None))(BATCH, Y), 3 * Y.expand(2, 3))


def test_function_inside_no_grad_is_a_constant() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            c = CubeWithVmap.apply(x)
        return (x * c).sum()

    torch.testing.assert_close(grad(f)(X), X**3)


def test_transform_inside_forward() -> None:
    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return grad(lambda y: (y**3).sum())(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return g * 6 * ctx.saved_tensors[0]

    torch.testing.assert_close(grad(lambda x: Inner.apply(x).sum())(X), 6 * X)


def test_jacobians() -> None:
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(CubeWithVmap.apply)(X), torch.diag(3 * X**2))


# ---- torch.library custom ops


@torch.library.custom_op("functrans_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone() ** 3


@cube.register_fake
def cube_fake(x):
    return torch.empty_like(x)


def cube_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def cube_backward(ctx, g):
    return g * 3 * ctx.saved_tensors[0] ** 2


cube.register_autograd(cube_backward, setup_context=cube_setup)


@cube.register_vmap
def cube_vmap(info, in_dims, x):
    return cube(x), in_dims[0]


def test_custom_op_at_the_base_under_autograd() -> None:
    """PyTorch differentiates it by an autograd.Function, which is no business of the transforms above."""
    leaf = X.clone().requires_grad_()
    calls = {
        "grad": lambda x: grad(lambda a: (a * cube(x)).sum())(torch.ones(3, dtype=X.dtype)),
        "vjp": lambda x: vjp(cube, x)[0],
        "jvp": lambda x: jvp(lambda a: a * cube(x), (torch.ones(3, dtype=X.dtype),), (torch.ones(3, dtype=X.dtype),))[
            1
        ],
        "vmap": lambda x: vmap(lambda a: a * cube(x))(torch.ones(1, 1, dtype=X.dtype))[0],
        # an operator of the library's own that has a rule in the table: it runs at the base, one level below
        "vjp by the table": lambda x: vjp(lambda x: torch.linalg.matrix_norm(torch.diag(x**3 + 2), "nuc"), x)[0],
    }
    for name, call in calls.items():
        out = call(leaf)
        assert type(out) is torch.Tensor, name
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], 3 * X**2)


@torch.library.custom_op("functrans_tests::bare", mutates_args=())
def bare(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone() * 2


@torch.library.custom_op("functrans_tests::write_into", mutates_args={"out"})
def write_into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 5)


def right_or_error(f: Callable[[], Any], expected: torch.Tensor) -> None:
    try:
        got = f()
    except RuntimeError:
        return
    torch.testing.assert_close(got, expected)


def test_custom_op_with_autograd_and_vmap() -> None:
    torch.testing.assert_close(grad(lambda x: cube(x).sum())(X), 3 * X**2)
    torch.testing.assert_close(vmap(cube)(BATCH), BATCH**3)
    torch.testing.assert_close(vmap(cube, in_dims=1, out_dims=1)(BATCH), BATCH**3)
    torch.testing.assert_close(vmap(grad(lambda x: cube(x).sum()))(BATCH), 3 * BATCH**2)
    torch.testing.assert_close(grad(lambda b: vmap(cube)(b).sum())(BATCH), 3 * BATCH**2)
    torch.testing.assert_close(grad(lambda x: grad(lambda y: cube(y).sum())(x).sum())(X), 6 * X)
    right_or_error(lambda: jvp(cube, (X,), (Y,))[1], 3 * X**2 * Y)


def test_custom_op_without_rules_is_right_or_an_error() -> None:
    right_or_error(lambda: vmap(bare)(BATCH), BATCH * 2)
    right_or_error(lambda: grad(lambda x: bare(x).sum())(X), 2 * torch.ones_like(X))
    right_or_error(lambda: jvp(bare, (X,), (Y,))[1], Y * 2)
    torch.testing.assert_close(grad(lambda x: (x * bare(Y)).sum())(X), 2 * Y)


def test_custom_op_that_writes() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(3, dtype=torch.float64)
        write_into(x, out)
        return out

    right_or_error(lambda: vmap(f)(BATCH), BATCH * 5)
    right_or_error(lambda: grad(lambda x: f(x).sum())(X), torch.full_like(X, 5.0))
    right_or_error(lambda: jvp(f, (X,), (Y,))[1], Y * 5)


# ------------------------------------------------------------------------------------------- dtypes of gradients


def noting(dtypes: tuple[Any, ...], seen: list[Any], setup: bool) -> Any:
    """A Function with a half-precision output, a double one and a text, whose backward notes what it got."""

    def remember(ctx: Any, x: Tensor) -> None:
        ctx.save_for_backward(x)
        ctx.set_output_grad_dtype(*dtypes)

    def compute(x: Tensor) -> Any:
        return x.sin().to(torch.float16), x.cos(), "text"

    def backward(ctx: Any, half: Tensor, double: Tensor, _: None) -> Tensor:
        seen.append((half.dtype, double.dtype))
        (x,) = ctx.saved_tensors
        return half.double() * x.cos() - double.double() * x.sin()

    body: dict[str, Any] = {"backward": staticmethod(backward)}
    if setup:
        body |= {
            "forward": staticmethod(compute),
            "setup_context": staticmethod(lambda ctx, inputs, output: remember(ctx, *inputs)),
        }
    else:
        body["forward"] = staticmethod(lambda ctx, x: (remember(ctx, x), compute(x))[1])
    return type("Noting", (torch.autograd.Function,), body)


needs_declared_dtypes = pytest.mark.skipif(INSTALLED < (2, 14), reason="ctx.set_output_grad_dtype is new in torch 2.14")


@needs_declared_dtypes
@pytest.mark.parametrize("setup", [True, False])
@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32, None), (None, None, None), (torch.float16, torch.float64, None)], ids=str
)
def test_backward_gets_gradients_of_the_dtypes_it_declared(dtypes: tuple[Any, ...], setup: bool) -> None:
    seen: list[Any] = []
    function = noting(dtypes, seen, setup)

    def f(x: Tensor) -> Tensor:
        half, double, _ = function.apply(x)
        return half.double().sum() * 0.5 + double.sum() * 0.25

    leaf = X.clone().requires_grad_()
    f(leaf).backward()
    plain = seen.pop()
    expected = X.cos() / 2 - X.sin() / 4
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad(f)(X), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        grad(lambda x: vmap(f)(x).sum())(BATCH), BATCH.cos() / 2 - BATCH.sin() / 4, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(vmap(grad(f))(BATCH), BATCH.cos() / 2 - BATCH.sin() / 4, rtol=1e-6, atol=0)
    assert set(seen) == {plain} == {tuple(d or o for d, o in zip(dtypes, (torch.float16, torch.float64), strict=False))}
    torch.testing.assert_close(grad(lambda x: grad(f)(x).sum())(X), -X.sin() / 2 - X.cos() / 4, rtol=1e-6, atol=0)


@needs_declared_dtypes
@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((None,), "declared 1 dtypes for the gradients of 3 outputs"),
        ((None, None, torch.float32), "declared torch.float32 for the gradient of output 2"),
    ],
)
def test_declared_dtypes_that_do_not_fit(dtypes: tuple[Any, ...], message: str) -> None:
    """At the base it is PyTorch that says so."""
    with pytest.raises(RuntimeError, match=r"^set_output_grad_dtype"):
        grad(lambda x: noting(dtypes, [], True).apply(x)[1].sum())(X)
    for run in (lambda f: vmap(grad(f))(BATCH), lambda f: grad(lambda x: vmap(f)(x).sum())(BATCH)):
        with pytest.raises(CustomFunctionError, match=message):
            run(lambda x: noting(dtypes, [], True).apply(x)[1].sum())


def test_contexts_have_every_method_of_pytorchs() -> None:
    obsolete = {"mark_shared_storage"}  # does nothing but warn
    theirs = {n for n in dir(torch.autograd.function.FunctionCtx) if not n.startswith("_")}
    assert theirs - obsolete <= set(dir(Context))


class AddsInPlace(torch.autograd.Function):
    """``x * y``, whose gradient in ``x`` is added to what there is of it, if that may be written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor]:
        x, y = ctx.saved_tensors
        to_x, _ = ctx.input_grad_buffers
        return g * y if to_x is None else to_x.add_(g * y) and None, g * x


def test_gradients_that_functions_add_to_in_place() -> None:
    """No transform has them written to, as PyTorch has it at second order: there the Function returns its own."""

    def f(x: Tensor) -> Tensor:
        return (AddsInPlace.apply(x, x.sin()) + x.exp()).sum()

    def slope(x: Tensor) -> Tensor:
        return x.sin() + x * x.cos() + x.exp()

    curved = 2 * BATCH.cos() - BATCH * BATCH.sin() + BATCH.exp()
    for run in (grad(f), vmap(grad(f))):
        torch.testing.assert_close(run(BATCH), slope(BATCH))
    torch.testing.assert_close(vmap(grad(lambda x: grad(f)(x).sum()))(BATCH), curved)


class Noisy(torch.autograd.Function):
    """``x`` and a draw."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x + torch.rand(3)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_draws_of_a_function_that_gets_no_batch() -> None:
    """Each example draws for itself, as it does by an operator; the same numbers come as beside a batch."""
    captured, rows = torch.zeros(3), torch.zeros(2, 3)

    def drawn(f: Callable[[Tensor], Tensor], randomness: str) -> Tensor:
        torch.manual_seed(0)
        return vmap(f, randomness=randomness)(rows)

    of_captured, of_rows = lambda x: x + Noisy.apply(captured), Noisy.apply
    for randomness in ("same", "different"):
        found = drawn(of_captured, randomness)
        assert torch.equal(found, drawn(of_rows, randomness))
        assert torch.equal(*found) is (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        drawn(of_captured, "error")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: x + torch.distributions.Beta(torch.ones(3), 1.0).sample())(rows)
    total = lambda c: vmap(lambda x: (x + Noisy.apply(c)).sum(), randomness="different")(rows).sum()
    assert grad(total)(captured).tolist() == [2, 2, 2]
    state = torch.get_rng_state()
    vmap(lambda x: x + CubeSetup.apply(captured)[0])(rows)
    assert torch.equal(torch.get_rng_state(), state)
