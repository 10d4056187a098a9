"""The look at one example before a batching rule sees its batch: what it costs, and that it leaves no trace."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

from functrans import grad, vmap
from functrans.interpreters.vmap.one_example import SMALL, takes_zeros
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten

PROGRAMS = {
    "products": "vmap(grad(lambda x: (x @ x).tanh().sum()))(torch.rand(2, 4, 4))",
    "layers": "vmap(grad(lambda x: torch.nn.functional.layer_norm(layer(x), (3,)).sum()))(torch.rand(2, 5, 4))",
    "convolutions": "vmap(grad(lambda k: F.max_pool2d(F.conv2d(torch.ones(1, 1, 8, 8), k), 2).sum()))"
    "(torch.rand(2, 1, 1, 3, 3))",
    "attention": "vmap(grad(lambda q: F.scaled_dot_product_attention(q, q, q).sum()))(torch.rand(2, 1, 5, 4))",
    "losses": "vmap(grad(lambda x: F.mse_loss(x, x[0])))(torch.rand(2, 5, 4))",
    "classes": "vmap(grad(lambda x, i: F.cross_entropy(x, i)))(torch.rand(2, 5, 4), torch.zeros(2, 5).long())",
    "solutions": "vmap(grad(lambda a: torch.linalg.solve(a @ a.mT + 1, a[0]).sum()))(torch.rand(2, 4, 4))",
    "masks": "vmap(lambda x, m: torch.where(m, x, 0.0).masked_fill(m, 1.0))(torch.rand(2, 4), torch.ones(2, 4) > 0)",
    "hessians": "vmap(hessian(lambda x: layer(x).sin().sum()))(torch.rand(2, 4))",
    "tangents": "jvp(lambda x: F.mse_loss(layer(x).sin(), x[:, :3]), (torch.rand(5, 4),), (torch.rand(5, 4),))",
    "broadcasting": "vmap(lambda x: torch.broadcast_tensors(x, x[0])[1])(torch.rand(2, 4))",
}


def test_first_calls_import_nothing_large() -> None:
    """PyTorch's checks and definitions in Python import sympy and torch._dynamo: a second, at the first call."""
    program = f"""
        import sys
        import torch
        import torch.nn.functional as F
        from functrans import grad, hessian, jvp, vmap

        layer = torch.nn.Linear(4, 3)
        for name, program in {PROGRAMS}.items():
            before = set(sys.modules)
            eval(program)
            for module in {{"sympy", "torch._dynamo", "torch._inductor"}} & (set(sys.modules) - before):
                print(f"{{name}} imports {{module}}")
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr


def test_zeros_are_tried_where_they_tell_something() -> None:
    x, square = torch.rand(3), torch.rand(3, 3)
    assert takes_zeros(aten.mm.default, (square, square), {})
    assert not takes_zeros(aten.mm.default, (x, square), {}), "a vector is no matrix"
    assert not takes_zeros(aten.linalg_inv.default, (square,), {}), "zeros have no inverse"
    large = torch.empty(SMALL + 1, device="meta")
    assert not takes_zeros(aten.sin.default, (large,), {}) and not takes_zeros(aten.cat.default, ([x, large],), {})


def test_what_zeros_are_refused_is_asked_without_data() -> None:
    matrices = torch.eye(3, dtype=torch.float64) + torch.rand(2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(torch.linalg.inv)(matrices), torch.stack([m.inverse() for m in matrices]))
    assert vmap(torch.linalg.inv)(torch.empty(0, 3, 3)).shape == (0, 3, 3)
    with pytest.raises(RuntimeError, match="at least 2 dimensions"):
        vmap(torch.linalg.inv)(torch.rand(3, 3))
    with pytest.raises((RuntimeError, AssertionError), match="at least 2 dimensions"):
        vmap(torch.linalg.inv)(torch.rand(0, 3))  # nothing to run: the checks without data have the word


def test_nothing_is_drawn() -> None:
    x, generator = torch.rand(5), torch.Generator()
    before, own = torch.get_rng_state(), generator.get_state()
    assert takes_zeros(aten.dropout.default, (x, 0.5, True), {})
    assert not takes_zeros(aten.bernoulli.p, (x, 0.5), {"generator": generator})
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), own)


def test_code_of_the_users_runs_as_often_as_before() -> None:
    """Once in the rule."""
    calls = []

    @torch.library.custom_op("functrans_tests::noted_sine", mutates_args=())
    def noted_sine(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x.sin()

    noted_sine.register_fake(torch.empty_like)
    noted_sine.register_vmap(lambda info, in_dims, x: (noted_sine(x), in_dims[0]))
    vmap(noted_sine)(torch.rand(2, 3))
    assert calls == [(2, 3)]


@pytest.mark.parametrize(
    "shapes", [((2, 1), (3,)), ((), (4, 1)), ((0,), (1,)), ((5, 1, 2), (3, 1), ()), ((1,), (1, 1)), ((2,),)]
)
def test_broadcast_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    expected = torch.broadcast_tensors(*(torch.empty(shape) for shape in shapes))[0].shape
    assert broadcast_shapes(*shapes) == expected and type(broadcast_shapes(*shapes)) is torch.Size


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((0,), (2,)), ((2, 1), (3, 2, 4), (3, 1))])
def test_shapes_that_do_not_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(RuntimeError):
        torch.broadcast_tensors(*(torch.empty(shape) for shape in shapes))
    with pytest.raises(RuntimeError, match="expected shapes that broadcast, but got"):
        broadcast_shapes(*shapes)


def test_broadcast_tensors_are_views() -> None:
    """A write to a broadcast tensor is a write to the tensor."""

    def doubled(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        seen, _ = torch.broadcast_tensors(x, y)
        seen.mul_(2)
        return (x * y).sum()

    x, y = torch.rand(3), torch.rand(3)
    torch.testing.assert_close(grad(doubled)(x, y), 2 * y)
    torch.testing.assert_close(vmap(doubled)(torch.stack([x, y]), torch.stack([y, y])), 2 * torch.stack([x @ y, y @ y]))
