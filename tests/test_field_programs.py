"""Programs as users send them in, that failed once or are likely to: one line each, against a loop or a formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import for_each_alone
from slow_ways import close
from torch import Tensor, nn
from torch.nn import functional as F

from functrans import functionalize, grad, grad_and_value, jvp, linearize, vjp, vmap
from functrans.errors import FunctransError, InsideTransformError

F64 = torch.float64
torch.manual_seed(0)
X = torch.tensor([0.5, -1.2, 2.0], dtype=F64)
ROWS = torch.randn(5, 4, dtype=F64)
MATRICES = torch.randn(5, 4, 3, dtype=F64)
CUBES = torch.randn(5, 2, 3, 4, dtype=F64)


# --- composite functions of one example

COMPOSITES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), (CUBES, CUBES.permute(0, 2, 3, 1))),
    "tensordot along": (lambda a, b: torch.tensordot(a, b, dims=([1, 2], [2, 0])), (CUBES, CUBES.permute(0, 3, 1, 2))),
    "tensordot, tensor": (lambda a, b: torch.tensordot(a, b, dims=torch.tensor(1)), (MATRICES, MATRICES.mT)),
    "block_diag": (lambda a, b: torch.block_diag(a, b, torch.ones(2, dtype=F64)), (MATRICES, MATRICES.mT)),
    "cartesian_prod": (lambda a: torch.cartesian_prod(a, a[:2]), (ROWS,)),
    "combinations": (torch.combinations, (ROWS,)),
    "einsum": (lambda a, b: torch.einsum("ij,jk,lk->il", a, b, b), (MATRICES, MATRICES.mT[:, :, :3])),
    "kron": (lambda a: torch.kron(a, a), (MATRICES,)),
    "cdist": (lambda a: torch.cdist(a[None], 2 * a[None]), (MATRICES,)),
    "meshgrid": (lambda a: torch.stack(torch.meshgrid(a, 2 * a, indexing="xy")), (ROWS,)),
    "multi_dot": (lambda a: torch.linalg.multi_dot([a, a.T, a]), (MATRICES,)),
    "vander": (torch.vander, (ROWS,)),
    "cov": (torch.cov, (MATRICES,)),
    "corrcoef": (torch.corrcoef, (MATRICES,)),
    "gradient": (lambda a: torch.gradient(a)[0], (ROWS,)),
    "trapezoid": (torch.trapezoid, (ROWS,)),
    "pad": (lambda a: F.pad(a[None], (1, 1), mode="reflect"), (ROWS,)),
    "take_along_dim": (lambda a: torch.take_along_dim(a, a.argsort(0), 0), (ROWS,)),
    "column_stack": (lambda a: torch.column_stack((a, a)), (ROWS,)),
    "rearrangement": (
        lambda a: a.reshape(2, 3, 2, 2).permute(0, 2, 3, 1).reshape(4, 6).mean(-1, keepdim=True).repeat(1, 2),
        (CUBES,),
    ),
    "stft": (lambda a: torch.stft(a, 4, window=X.new_ones(4), return_complex=True).abs(), (CUBES.view(5, -1),)),
    "norms": (lambda a: nn.utils.get_total_norm([a, 2 * a]), (ROWS,)),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composite_functions(name: str) -> None:
    f, batches = COMPOSITES[name]
    close(vmap(f)(*batches), for_each_alone(f)(*map(torch.clone, batches)))
    last = [x.movedim(0, -1) for x in batches]
    close(vmap(f, in_dims=-1)(*last), for_each_alone(f)(*map(torch.clone, batches)))
    if name in ("vander", "norms"):  # of which PyTorch has no derivative
        return
    total = lambda *xs: (f(*xs) ** 2).sum()
    xs = [x.clone().requires_grad_() for x in batches]
    expected = torch.autograd.grad(sum(total(*e) for e in zip(*xs, strict=True)), xs[0])[0]
    close(vmap(grad(total))(*batches), expected)


# --- in place, on vmap's and grad's own arguments

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "squeeze_": lambda x: x.squeeze_(),
    "squeeze_ of one": lambda x: x.squeeze_(0),
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "swapdims_": lambda x: x.swapdims_(0, 1),
    "swapaxes_": lambda x: x.swapaxes_(0, 1),
    "moved twice": lambda x: x.t_().unsqueeze_(0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_metadata_is_changed_in_place(name: str) -> None:
    change = IN_PLACE[name]
    x = torch.randn(5, 1, 3, dtype=F64)
    for write in (lambda y: y * 2, lambda y: y.mul_(2), lambda y: (y[0].mul_(2), y)[1] * 1):
        f = lambda row, write=write: write(change(row))
        mine = x.clone()
        rows = [row.clone() for row in x]
        close(vmap(f)(mine), torch.stack([f(row) for row in rows]))
        close(mine.view(-1), torch.stack([r.reshape(-1) for r in rows]).view(-1))  # what the caller has is written
        close(vmap(f, in_dims=1)(x.movedim(0, 1).clone()), torch.stack([f(row.clone()) for row in x]))
        expected = for_each_alone(lambda row, f=f: slopes(f, row))(x.clone())
        close(vmap(grad(lambda row, f=f: f(row).pow(2).sum()))(x.clone()), expected)


def slopes(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x * 1).pow(2).sum(), x)[0]


RETURNING: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: vmap(f)(x),
    "vjp": lambda f, x: vjp(f, x)[0],
    "jvp": lambda f, x: jvp(f, (x,), (x.clone(),))[0],
    "linearize": lambda f, x: linearize(f, x)[0],
    "functionalize": lambda f, x: functionalize(f)(x),
    "grad and aux": lambda f, x: grad(lambda x: (y := f(x), (y.sum(), y))[1], has_aux=True)(x)[1],
    "a value": lambda f, x: grad_and_value(f)(x[0])[1],
    "vmap of vjp": lambda f, x: vmap(lambda row: vjp(f, row)[0])(x),
}


@pytest.mark.parametrize("name", RETURNING)
def test_what_an_in_place_function_returns_is_the_callers_tensor(name: str) -> None:
    x = X.clone()
    out = RETURNING[name](lambda x: x.sin_().mul_(2), x)
    expected = X.clone()
    (expected[0] if name == "a value" else expected).sin_().mul_(2)
    close(x, expected)
    out.add_(1)
    (expected[0] if name == "a value" else expected).add_(1)
    close(x, expected)


def test_views_that_are_returned_share_the_callers_memory() -> None:
    pairs = torch.randn(4, 1, 3, 2, dtype=F64)
    along = [lambda x: x.squeeze(0), lambda x: x.squeeze((0,)), lambda x: x[0]]
    for view in (torch.view_as_complex, torch.squeeze, *along):
        mine, loop = pairs.clone(), pairs.clone()
        vmap(view)(mine).mul_(3)
        for example in loop:
            view(example).mul_(3)
        close(mine, loop)
        written = lambda x, view=view: (view(x).mul_(2), x * 1)[1]
        close(vmap(written)(pairs.clone()), for_each_alone(written)(pairs.clone()))


# --- dimensions out of range


@pytest.mark.parametrize("out_dims", [2, -3, (0, 5), {"a": 0, "b": -4}])
def test_out_dims_out_of_range(out_dims: Any) -> None:
    f = {int: torch.sin, tuple: lambda x: (x, x), dict: lambda x: {"a": x, "b": x}}[type(out_dims)]
    with pytest.raises(IndexError, match="which has 2 dimensions with the batch; expected -2 <= out_dim < 2"):
        vmap(f, out_dims=out_dims)(ROWS)


# --- random numbers, contexts

DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "generator": lambda x: x * torch.randn(4, generator=torch.Generator().manual_seed(2), dtype=F64),
    "in place": lambda x: x * torch.empty(4, dtype=F64).normal_(generator=torch.Generator().manual_seed(2)),
    "state": lambda x: x * again(lambda: torch.randn(4, dtype=F64)),
    "init": lambda x: nn.init.trunc_normal_(nn.init.orthogonal_(seeded(torch.empty(4, 4, dtype=F64)))) @ x,
    "layer": lambda x: seeded(nn.Linear(4, 2, dtype=F64))(x) * 0,
}


def again(draw: Callable[[], Tensor]) -> Tensor:
    state = torch.get_rng_state()
    first = draw()
    torch.set_rng_state(state)
    return 1 + first - draw()


def seeded(x: Any) -> Any:
    torch.manual_seed(5)
    return x


def forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return x * torch.randn(4, dtype=F64)


@pytest.mark.parametrize("name", [*DRAWN, "forked"])
def test_random_numbers_of_ones_own(name: str) -> None:
    f = DRAWN.get(name, forked)
    close(vmap(f, randomness="same")(ROWS), torch.stack([f(row) for row in ROWS]).detach())
    close(grad(lambda x: f(x).sum())(ROWS[0]), torch.autograd.functional.jacobian(lambda x: f(x).sum(), ROWS[0]))


def in_context(context: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        with context():
            c = torch.ones(4, dtype=F64)
            y = x.sin() * c
        return (y * x).sum()

    return f


@pytest.mark.parametrize(
    "context", [lambda: torch.device("cpu"), torch.enable_grad, lambda: torch.autocast("cpu", enabled=False)]
)
def test_contexts_inside_and_outside(context: Callable[[], Any]) -> None:
    expected = ROWS.cos() * ROWS + ROWS.sin()
    close(vmap(grad(in_context(context)))(ROWS), expected)
    with context():
        close(vmap(grad(in_context(context)))(ROWS), expected)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_contexts_without_autograd(context: Callable[[], Any]) -> None:
    close(vmap(grad(in_context(context)))(ROWS), ROWS.sin())  # what was computed in it is a constant
    close(vmap(in_context(context))(ROWS), (ROWS.sin() * ROWS).sum(1))
    with context():
        found = vmap(grad(lambda x: (x.sin() * x).sum()))(ROWS)
    close(found.clone(), ROWS.cos() * ROWS + ROWS.sin())
    with context():
        weights = ROWS[0].clone()
    close(grad(lambda x: (x * weights).sum())(ROWS[1]), weights.clone())


def test_default_dtypes_and_devices() -> None:
    def f(x: Tensor) -> Tensor:
        torch.set_default_dtype(F64)
        torch.set_default_device("cpu")
        try:
            return (x * torch.ones(4)).sum()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)

    found = vmap(grad(f))(ROWS)
    assert found.dtype is F64
    close(found, torch.ones_like(ROWS))


# --- what wrappers are asked


def test_text_numbers_and_comparisons_inside() -> None:
    def f(x: Tensor) -> Tensor:
        total = x.sum()
        assert f"{total:.3f}" == f"{float(total):.3f}" and f"{total.detach():.1e}" and str(x) and f"{x}"
        torch.testing.assert_close(x, x * 1)
        torch.testing.assert_close(x.detach() * 2, 2 * x)
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(x, x + 1)
        assert len({x, x, total}) == 2 and x in [x, total]
        assert copy.copy(x).shape == x.shape and x.detach().numpy().shape == (4,)
        return (x * copy.deepcopy(x)).sum()

    close(grad(f)(ROWS[0]), 2 * ROWS[0])
    close(jvp(f, (ROWS[0],), (ROWS[1],))[1], 2 * ROWS[0] @ ROWS[1])

    def batched(x: Tensor) -> Tensor:
        torch.testing.assert_close(x, x * 1)
        with pytest.raises(RuntimeError, match="TensorLikePair"):  # the text of the failure has numbers of one example
            torch.testing.assert_close(x, x + 1)
        with pytest.raises(FunctransError, match="format"):
            f"{x.sum():.3f}"
        return x * 1

    close(vmap(batched)(ROWS), ROWS)


def test_utilities_of_modules() -> None:
    net = nn.Linear(4, 2, dtype=F64)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    flat = nn.utils.parameters_to_vector(weights.values())
    found = grad(lambda p: nn.utils.parameters_to_vector(p.values()).sin().sum())(weights)
    close(nn.utils.parameters_to_vector(found.values()), flat.cos())

    def clipped(x: Tensor) -> Tensor:
        p = torch.zeros(4, dtype=F64)
        p.grad = x * 1
        nn.utils.clip_grad_norm_([p], 1.0)
        assert p.grad is not None
        return p.grad

    close(vmap(clipped)(ROWS), for_each_alone(lambda x: x * (1 / (x.norm() + 1e-6)).clamp(max=1.0))(ROWS))
    with pytest.raises(InsideTransformError, match=r"assigning to Tensor.data what lost its derivative"):
        grad(lambda v: nn.utils.vector_to_parameters(v, copy.deepcopy(net).parameters()))(flat)


def test_hooks_on_saved_tensors_and_saving_elsewhere_leave_results_alone() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(torch.bfloat16), lambda t: t.double()):
            y = x.sin()
        with torch.autograd.graph.save_on_cpu():
            z = y * x
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return z.sum()

    close(vmap(grad(f))(ROWS), ROWS.cos() * ROWS + ROWS.sin())
