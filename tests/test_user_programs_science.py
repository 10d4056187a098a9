"""Programs of users: kernels, curvature, differential equations, and physics, inside the transforms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import for_each
from slow_ways import agree, gradient, jacobian, no_history
from torch import Tensor, nn

from functrans import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def network(*widths: int) -> tuple[nn.Module, dict[str, Tensor]]:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).double()
    return net, {n: p.detach() for n, p in net.named_parameters()}


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tree.values()])


# --- kernels and curvature ------------------------------------------------------------------------------------------


def test_the_neural_tangent_kernel_in_three_ways() -> None:
    net, params = network(3, 6, 2)
    x1, x2 = torch.randn(4, 3, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)

    def model(p: Any, x: Tensor) -> Tensor:
        return functional_call(net, p, (x,))

    def by_contraction(x1: Tensor, x2: Tensor, chunk_size: int | None) -> Tensor:
        jac1, jac2 = (vmap(jacrev(model, chunk_size=chunk_size), (None, 0))(params, x) for x in (x1, x2))
        return torch.stack([torch.einsum("Naf,Mbf->NMab", jac1[n].flatten(2), jac2[n].flatten(2)) for n in params]).sum(
            0
        )

    def entry(x1: Tensor, x2: Tensor) -> Tensor:
        _, pullback = vjp(lambda p: model(p, x1), params)
        return vmap(lambda v: jvp(lambda p: model(p, x2), (params,), pullback(v))[1])(torch.eye(2, dtype=DOUBLE))

    def row(x: Tensor) -> Tensor:
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        outs = model(leaves, x)
        return torch.stack(
            [flat(dict(enumerate(torch.autograd.grad(o, leaves.values(), retain_graph=True)))) for o in outs]
        )

    expected = torch.einsum("Naf,Mbf->NMab", for_each(row)(x1), for_each(row)(x2))
    agree(by_contraction(x1, x2, None), expected)
    agree(by_contraction(x1, x2, 1), expected)
    agree(vmap(vmap(entry, (None, 0)), (0, None))(x1, x2), expected)


@pytest.mark.parametrize(
    "order", ["forward over reverse", "reverse over forward", "reverse over reverse", "linear in v"]
)
def test_hessian_vector_products(order: str) -> None:
    net, params = network(3, 5, 1)
    x, y = torch.randn(6, 3, dtype=DOUBLE), torch.randn(6, 1, dtype=DOUBLE)
    v = {n: torch.randn_like(p) for n, p in params.items()}

    def loss(p: Any) -> Tensor:
        return F.mse_loss(functional_call(net, p, (x,)), y)

    product = {
        "forward over reverse": lambda v: jvp(grad(loss), (params,), (v,))[1],
        "reverse over forward": lambda v: grad(lambda p: jvp(loss, (p,), (v,))[1])(params),
        "reverse over reverse": lambda v: vjp(grad(loss), params)[1](v)[0],
        "linear in v": lambda v: grad(lambda p: sum((g * v[n]).sum() for n, g in grad(loss)(p).items()))(params),
    }[order]
    full = hessian(loss)(params)
    expected = {
        a: sum(torch.einsum("ij,j->i", full[a][b].reshape(params[a].numel(), -1), v[b].flatten()) for b in params)
        for a in params
    }
    agree({n: t.flatten() for n, t in product(v).items()}, expected)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    slope = sum((g * v[n]).sum() for n, g in gradient(loss)(leaves).items())
    agree(
        product(v),
        dict(zip(params, torch.autograd.grad(slope, leaves.values(), materialize_grads=True, allow_unused=True))),
    )
    many = {n: torch.randn(4, *p.shape, dtype=DOUBLE) for n, p in params.items()}
    agree(vmap(product)(many), for_each(product)(many))


def test_gauss_newton_and_fisher_solves_by_conjugate_gradients() -> None:
    net, params = network(3, 4, 3)
    x, y = torch.randn(8, 3, dtype=DOUBLE), torch.randint(0, 3, (8,))

    def logits(p: Any) -> Tensor:
        return functional_call(net, p, (x,))

    def gauss_newton(v: Any) -> Any:
        out, tangent = jvp(logits, (params,), (v,))
        inner = jvp(grad(lambda z: F.cross_entropy(z, y, label_smoothing=0.1)), (out,), (tangent,))[1]
        return {n: g + 0.01 * v[n] for n, g in vjp(logits, params)[1](inner)[0].items()}

    def conjugate_gradients(b: Any) -> Any:
        solution = {n: torch.zeros_like(t) for n, t in b.items()}
        residual = direction = b
        square = (flat(b) ** 2).sum()
        for _ in range(60):
            image = gauss_newton(direction)
            # where, as examples that are done must stay as they are
            step = torch.where(square > 1e-28, square / (flat(direction) @ flat(image)), 0.0)
            solution = {n: s + step * direction[n] for n, s in solution.items()}
            residual = {n: r - step * image[n] for n, r in residual.items()}
            new = (flat(residual) ** 2).sum()
            ratio = torch.where(square > 1e-28, new / square, 0.0)
            direction = {n: r + ratio * direction[n] for n, r in residual.items()}
            square = new
        return solution

    sides = {n: torch.randn(3, *p.shape, dtype=DOUBLE) for n, p in params.items()}
    solved = torch.stack([flat({n: s[i] for n, s in vmap(conjugate_gradients)(sides).items()}) for i in range(3)])
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    out = logits(leaves)
    jac = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, leaves.values(), retain_graph=True)])
            for o in out.flatten()
        ]
    )
    probs = out.detach().softmax(-1)
    blocks = torch.block_diag(*[torch.diag(p) - torch.outer(p, p) for p in probs]) / len(x)
    matrix = jac.T @ blocks @ jac + 0.01 * torch.eye(jac.shape[1], dtype=DOUBLE)
    expected = torch.linalg.solve(
        matrix, torch.stack([flat({n: s[i] for n, s in sides.items()}) for i in range(3)]).T
    ).T
    agree(solved, expected, rtol=1e-6, atol=1e-8)


def test_jacobians_of_a_model_with_aux_and_several_arguments() -> None:
    net, params = network(3, 4, 2)
    x, scale = torch.randn(3, dtype=DOUBLE), torch.tensor([1.5, -0.5], dtype=DOUBLE)

    def model(p: Any, x: Tensor, scale: Tensor) -> tuple[dict[str, Tensor], Any]:
        out = functional_call(net, p, (x,)) * scale
        return {"out": out, "energy": (out**2).sum()}, {"hidden": out.tanh(), "count": 2}

    for take in (jacrev, jacfwd):
        both, _ = take(model, argnums=(1, 2), has_aux=True)(params, x, scale)
        jac_x, jac_scale = both["out"]
        agree(jac_x, jacobian(lambda x: model(params, x, scale)[0]["out"], x))
        agree(jac_scale, jacobian(lambda s: model(params, x, s)[0]["out"], scale))
        jac, aux = take(model, has_aux=True)(params, x, scale)
        agree(aux, {"hidden": model(params, x, scale)[0]["out"].tanh(), "count": 2})
        for n in params:
            agree(jac["energy"][n], jacobian(lambda t, n=n: model({**params, n: t}, x, scale)[0]["energy"], params[n]))
    second = hessian(lambda p, x: model(p, x, scale)[0]["energy"], argnums=(0, 1))(params, x)
    for n in params:
        leaf, point = params[n].clone().requires_grad_(), x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model({**params, n: leaf}, point, scale)[0]["energy"], point, create_graph=True)
        rows = torch.stack([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in slope])
        agree(second[1][0][n], rows)
        agree(second[0][n][1].flatten(0, -2).T, rows.flatten(1))


# --- differential equations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["trace of the hessian", "jvp of grad", "vmap over the basis", "double jvp", "jacfwd of jacrev"]
)
def test_laplacians_of_a_network_and_their_training_gradients(way: str) -> None:
    net, params = network(3, 6, 1)
    x = torch.randn(5, 3, dtype=DOUBLE)
    basis = torch.eye(3, dtype=DOUBLE)

    def u(p: Any, x: Tensor) -> Tensor:
        return functional_call(net, p, (x,)).squeeze(-1)

    def laplacian(p: Any, x: Tensor) -> Tensor:
        def f(x: Tensor) -> Tensor:
            return u(p, x)

        if way == "trace of the hessian":
            return hessian(f)(x).trace()
        if way == "jvp of grad":
            return sum(jvp(grad(f), (x,), (e,))[1] @ e for e in basis)
        if way == "vmap over the basis":
            return vmap(lambda e: jvp(grad(f), (x,), (e,))[1] @ e)(basis).sum()
        if way == "double jvp":
            return sum(jvp(lambda y, e=e: jvp(f, (y,), (e,))[1], (x,), (e,))[1] for e in basis)
        return torch.diagonal(jacfwd(jacrev(f))(x)).sum()

    def expected(p: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(u(p, x), x, create_graph=True)
        return sum(torch.autograd.grad(slope[i], x, create_graph=True)[0][i] for i in range(3))

    agree(vmap(laplacian, (None, 0))(params, x), for_each(expected, (None, 0))(params, x).detach())

    def loss(each: Callable[..., Any], operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda p: (each(operator, (None, 0))(p, x) + x.sin().prod(-1)).pow(2).mean()

    agree(grad(loss(vmap, laplacian))(params), no_history(gradient(loss(for_each, expected))(params)))


def test_the_biharmonic_operator_is_of_fourth_order() -> None:
    def u(x: Tensor) -> Tensor:
        return torch.sin(x[0]) * torch.cos(2 * x[1]) + x[0] ** 3 * x[1] ** 2

    def laplacian(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.einsum("ii->", hessian(f)(x))

    x = torch.randn(4, 2, dtype=DOUBLE)
    got = vmap(laplacian(laplacian(u)))(x)
    agree(got, 25 * torch.sin(x[:, 0]) * torch.cos(2 * x[:, 1]) + 24 * x[:, 0])
    agree(vmap(grad(laplacian(laplacian(u))))(x)[:, 0], 25 * torch.cos(x[:, 0]) * torch.cos(2 * x[:, 1]) + 24)


def test_burgers_residuals_of_a_physics_informed_network() -> None:
    net, params = network(2, 8, 8, 1)
    points = torch.rand(6, 2, dtype=DOUBLE)

    def residual(p: Any, point: Tensor) -> Tensor:
        def u(t: Tensor, x: Tensor) -> Tensor:
            return functional_call(net, p, (torch.stack([t, x]),))[0]

        t, x = point
        (u_t, u_x), value = grad_and_value(u, argnums=(0, 1))(t, x)
        return u_t + value * u_x - 0.1 * grad(grad(u, argnums=1), argnums=1)(t, x)

    def expected(p: Any, point: Tensor) -> Tensor:
        t, x = (c.clone().requires_grad_() for c in point)
        value = functional_call(net, p, (torch.stack([t, x]),))[0]
        u_t, u_x = torch.autograd.grad(value, (t, x), create_graph=True)
        return u_t + value * u_x - 0.1 * torch.autograd.grad(u_x, x, create_graph=True)[0]

    got = grad(lambda p: vmap(residual, (None, 0))(p, points).pow(2).mean())(params)
    agree(got, no_history(gradient(lambda p: for_each(expected, (None, 0))(p, points).pow(2).mean())(params)))
    optimizer = torch.optim.SGD([p.requires_grad_() for p in params.values()], lr=0.1)
    vmap(residual, (None, 0))(params, points).pow(2).mean().backward()
    agree({n: p.grad for n, p in params.items()}, got)
    optimizer.step()


def runge_kutta(f: Callable[[Tensor], Tensor], x: Tensor, h: float, steps: int) -> Tensor:
    for _ in range(steps):
        a = f(x)
        b = f(x + h / 2 * a)
        c = f(x + h / 2 * b)
        x = x + h / 6 * (a + 2 * b + 2 * c + f(x + h * c))
    return x


def test_a_neural_ode_and_its_sensitivity() -> None:
    net, params = network(2, 6, 2)
    x = torch.randn(4, 2, dtype=DOUBLE)

    def flow(p: Any, x: Tensor) -> Tensor:
        return runge_kutta(lambda y: functional_call(net, p, (y,)), x, 0.2, 5)

    got = vmap(jacrev(flow, argnums=(0, 1)), (None, 0))(params, x)
    for i in range(4):
        agree(got[1][i], jacobian(lambda y: flow(params, y), x[i]))
        agree(got[0]["0.weight"][i], jacobian(lambda w, i=i: flow({**params, "0.weight": w}, x[i]), params["0.weight"]))
    agree(vmap(jacfwd(flow, argnums=1), (None, 0))(params, x), got[1])


def test_lagrangian_and_hamiltonian_dynamics() -> None:
    """A double pendulum's Lagrangian through jacobians and a solve, against its equations of motion."""

    def lagrangian(q: Tensor, v: Tensor) -> Tensor:
        kinetic = v[0] ** 2 + 0.5 * v[1] ** 2 + v[0] * v[1] * torch.cos(q[0] - q[1])
        return kinetic + 9.8 * (2 * torch.cos(q[0]) + torch.cos(q[1]))

    def acceleration(q: Tensor, v: Tensor) -> Tensor:
        mass = hessian(lagrangian, argnums=1)(q, v)
        mixed = jacrev(grad(lagrangian, argnums=1), argnums=0)(q, v)
        return torch.linalg.solve(mass, grad(lagrangian)(q, v) - mixed @ v)

    def by_hand(q: Tensor, v: Tensor) -> Tensor:
        s, c = torch.sin(q[0] - q[1]), torch.cos(q[0] - q[1])
        rhs = torch.stack([-2 * 9.8 * torch.sin(q[0]) - v[1] ** 2 * s, -9.8 * torch.sin(q[1]) + v[0] ** 2 * s])
        return torch.linalg.solve(torch.stack([torch.stack([2 + 0 * c, c]), torch.stack([c, 1 + 0 * c])]), rhs)

    q, v = torch.randn(5, 2, dtype=DOUBLE), torch.randn(5, 2, dtype=DOUBLE)
    agree(vmap(acceleration)(q, v), for_each(by_hand)(q, v))
    got = vmap(jacrev(acceleration, argnums=(0, 1)))(q, v)
    for i in range(5):
        agree((got[0][i], got[1][i]), torch.autograd.functional.jacobian(by_hand, (q[i], v[i])))

    def symplectic(state: Tensor) -> Tensor:
        def energy(state: Tensor) -> Tensor:
            return 0.5 * (state[2:] ** 2).sum() + torch.cos(state[:2]).sum() + state[0] * state[1]

        slope = grad(energy)(state)
        return torch.cat([slope[2:], -slope[:2]])

    state = torch.randn(3, 4, dtype=DOUBLE)
    jac = vmap(jacfwd(lambda s: runge_kutta(symplectic, s, 0.01, 4)))(state)
    form = torch.cat(
        [torch.cat([torch.zeros(2, 2), torch.eye(2)], 1), torch.cat([-torch.eye(2), torch.zeros(2, 2)], 1)]
    ).double()
    agree(jac.transpose(1, 2) @ form @ jac, form.expand(3, 4, 4), rtol=0.0, atol=1e-9)


class FixedPoint(torch.autograd.Function):
    """z = tanh(w z + x), differentiated by the implicit function theorem."""

    @staticmethod
    def forward(w: Tensor, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(100):
            z = torch.tanh(w @ z + x)
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        w, x, z = ctx.saved_tensors
        slope = 1 - torch.tanh(w @ z + x) ** 2
        adjoint = torch.linalg.solve((torch.eye(len(x), dtype=x.dtype) - slope[:, None] * w).T, g)
        return torch.outer(slope * adjoint, z), slope * adjoint

    generate_vmap_rule = True


def test_a_deep_equilibrium_model() -> None:
    w, x = 0.2 * torch.randn(4, 4, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)

    def unrolled(w: Tensor, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(100):
            z = torch.tanh(w @ z + x)
        return z

    def energy(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda w, x: (f(w, x) ** 3).sum()

    got = vmap(grad(energy(FixedPoint.apply), argnums=(0, 1)), (None, 0))(w, x)
    for i in range(5):
        agree(tuple(g[i] for g in got), torch.autograd.functional.jacobian(energy(unrolled), (w, x[i])))
        agree(jacrev(FixedPoint.apply, argnums=1)(w, x[i]), jacobian(lambda y, i=i: unrolled(w, y), x[i]))


def test_lennard_jones_forces_and_hessians() -> None:
    positions = torch.randn(3, 4, 3, dtype=DOUBLE) * 0.2 + torch.tensor(
        [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=DOUBLE
    )

    def energy(r: Tensor) -> Tensor:
        i, j = torch.triu_indices(4, 4, 1)
        square = ((r[i] - r[j]) ** 2).sum(-1)
        return 4 * (square**-6 - square**-3).sum()

    def with_masked_distances(r: Tensor) -> Tensor:
        d = torch.cdist(r, r)
        off = ~torch.eye(4, dtype=torch.bool)
        return 2 * torch.where(off, d.masked_fill(~off, 1.0) ** -12 - d.masked_fill(~off, 1.0) ** -6, 0.0).sum()

    def forces(r: Tensor) -> Tensor:
        found = torch.zeros_like(r)
        for i in range(4):
            for j in range(4):
                if i != j:
                    d = r[i] - r[j]
                    found[i] += 4 * (12 * (d @ d) ** -7 - 6 * (d @ d) ** -4) * d
        return found

    agree(vmap(grad(energy))(positions), -for_each(forces)(positions))
    agree(vmap(grad(with_masked_distances))(positions), -for_each(forces)(positions))
    agree(-vmap(jacrev(forces))(positions), vmap(hessian(energy))(positions))
