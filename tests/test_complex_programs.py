"""Programs with complex numbers inside: against loops, PyTorch's autograd, and differences of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import for_each
from slow_ways import some
from torch import Tensor
from torch.nn import functional

from functrans import count, functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from functrans.extend import Carried, PassThrough, RuleTable, TableInterpreter, transform

F64, C128 = torch.float64, torch.complex128
to_complex, to_real = torch.view_as_complex, torch.view_as_real


def gradient(f: Callable[..., Tensor], *xs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(f(*leaves), leaves)


W = some(2, dtype=C128, seed=1)
MATRIX = some(2, 2, dtype=C128, seed=2)


def outer(x: Tensor) -> Tensor:
    return to_complex(x).unsqueeze(1) @ W.unsqueeze(0)


def written(x: Tensor) -> Tensor:
    z = to_complex(x).clone()
    z.mul_(W)
    z[0].copy_(z[1].conj())
    return z


def written_conjugate(x: Tensor) -> Tensor:
    z = to_complex(x).clone()
    z.conj().mul_(W)
    return z


def written_parts(x: Tensor) -> Tensor:
    z = to_complex(x).clone()
    z.imag.mul_(2)
    z.conj().imag.add_(x[0])
    to_real(z)[0].mul_(x[1])
    return z


def written_adjoint(x: Tensor) -> Tensor:
    m = outer(x)
    m.mH.mul_(MATRIX)
    m.adjoint()[0].mul_(2)
    return m


#: Functions of a real tensor of shape (2, 2).
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "conj, resolved": lambda x: to_complex(x).conj().resolve_conj(),
    "conj, multiplied": lambda x: to_complex(x).conj() * W,
    "conj of a captured one": lambda x: to_complex(x) * W.conj(),
    "conj_physical": lambda x: to_complex(x).conj_physical() * W,
    "real": lambda x: (to_complex(x) * W).real,
    "imag of conj": lambda x: to_complex(x).conj().imag,
    "abs": lambda x: to_complex(x).abs(),
    "angle": lambda x: to_complex(x).angle(),
    "polar": lambda x: torch.polar(x[0].exp(), x[1]),
    "complex": lambda x: torch.complex(x[0], x[1]).conj().clone(),
    "exp": lambda x: (1j * to_complex(x)).exp(),
    "mH": lambda x: outer(x).mH.contiguous(),
    "mH, multiplied": lambda x: outer(x).mH @ W,
    "H": lambda x: outer(x).H.resolve_conj(),
    "vdot": lambda x: torch.vdot(to_complex(x), to_complex(x.sin())),
    "fft": lambda x: torch.fft.ifft(torch.fft.fft(to_complex(x)).conj()).resolve_conj(),
    "rfft": lambda x: torch.fft.rfft(x[0]),
    "irfft": lambda x: torch.fft.irfft(to_complex(x).conj()),
    "ihfft": lambda x: torch.fft.ihfft(x[0]).resolve_conj(),
    "sgn": lambda x: to_complex(x).sgn(),
    "where": lambda x: torch.where(torch.tensor([True, False]), to_complex(x).conj(), to_complex(x)),
    "cat": lambda x: torch.cat([to_complex(x).conj(), to_complex(x)]),
    "index": lambda x: to_complex(x).conj()[torch.tensor([0, 0, 1])],
    "einsum": lambda x: torch.einsum("i,j->ij", to_complex(x).conj(), W),
    "cumprod": lambda x: to_complex(x).conj().cumprod(0),
    "solve": lambda x: torch.linalg.solve(to_complex(x).conj().diag() + torch.ones(2, 2), W),
    "linear": lambda x: functional.linear(to_complex(x).conj(), MATRIX),
    "conv1d": lambda x: functional.conv1d(to_complex(x).conj().view(1, 1, 2), W.view(1, 1, 2), padding=1),
    "expand": lambda x: to_complex(x).conj().expand(2, 2).resolve_conj(),
    "and back": lambda x: to_complex(to_real(to_complex(x) * W) * 2).conj() * W,
    "neg": lambda x: -to_complex(x).conj(),
    "written": written,
    "written conjugate": written_conjugate,
    "written parts": written_parts,
    "written adjoint": written_adjoint,
}


def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A number that every part of ``f(x)`` has a share in, with a second derivative."""

    def total(x: Tensor) -> Tensor:
        y = f(x)
        y = to_real(y) if y.is_complex() else y
        return (y**3 * torch.arange(1.0, 1 + y.numel(), dtype=F64).view(y.shape)).sum()

    return total


def differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    """The Hessian of ``f``, by differences of its gradients."""
    steps = h * torch.eye(x.numel(), dtype=F64).view(-1, *x.shape)
    rows = [(gradient(f, x + s)[0] - gradient(f, x - s)[0]).flatten() / (2 * h) for s in steps]
    return torch.stack(rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_orders(name: str) -> None:
    f = scalar(FUNCTIONS[name])
    x, v, xs = some(2, 2, seed=3), some(2, 2, seed=4), some(3, 2, 2, seed=5)
    slope, curvature = gradient(f, x)[0], differences(f, x)
    torch.testing.assert_close(grad(f)(x), slope)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], (slope * v).sum())
    close = {"rtol": 1e-5, "atol": 1e-5}
    for second in (hessian(f), jacfwd(grad(f)), jacrev(jacrev(f)), jacrev(jacfwd(f)), jacfwd(jacfwd(f))):
        torch.testing.assert_close(second(x).reshape(4, 4), curvature, **close)
    torch.testing.assert_close(jvp(grad(f), (x,), (v,))[1].flatten(), curvature @ v.flatten(), **close)
    torch.testing.assert_close(vmap(FUNCTIONS[name])(xs), for_each(FUNCTIONS[name])(xs))
    torch.testing.assert_close(vmap(grad(f))(xs), for_each(lambda x: gradient(f, x)[0])(xs))
    torch.testing.assert_close(vmap(hessian(f))(x[None])[0].reshape(4, 4), curvature, **close)


CONVOLUTIONS = {
    "conv1d": (functional.conv1d, 1), "conv2d": (functional.conv2d, 2), "conv3d": (functional.conv3d, 3),
    "conv_transpose1d": (functional.conv_transpose1d, 1), "conv_transpose2d": (functional.conv_transpose2d, 2),
    "conv_transpose3d": (functional.conv_transpose3d, 3),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"groups": 2}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, options: dict[str, Any]) -> None:
    convolution, dims = CONVOLUTIONS[name]
    x, weight = some(3, 2, 4, *[5] * dims, dtype=C128), some(4, 4, *[2] * dims, dtype=C128, seed=1)
    if options.get("groups") and "transpose" not in name:
        weight = weight[:, :2]
    bias = some(4 * options.get("groups", 1) if "transpose" in name else 4, dtype=C128, seed=2)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolution(x, weight, bias, **options)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = f(x, weight, bias)
        return (y * y.conj() * (0.3 + 0.1j)).real.sum()

    shared = (0, None, None)
    torch.testing.assert_close(vmap(f, shared)(x, weight, bias), for_each(lambda x: f(x, weight, bias))(x))
    torch.testing.assert_close(grad(loss, (0, 1, 2))(x[0], weight, bias), gradient(loss, x[0], weight, bias))
    for i in range(3):
        expected = for_each(lambda x, i=i: gradient(loss, x, weight, bias)[i])(x)
        torch.testing.assert_close(vmap(grad(loss, i), shared)(x, weight, bias), expected)
    v = some(*weight.shape, dtype=C128, seed=3)
    tangent = jvp(lambda w: f(x[0], w, bias), (weight,), (v,))[1]
    torch.testing.assert_close(tangent, convolution(x[0], v, **options))
    h = 1e-6  # the gradient is linear in the weight
    along = (gradient(loss, x[0], weight + h * v, bias)[1] - gradient(loss, x[0], weight - h * v, bias)[1]) / (2 * h)
    found = jvp(lambda w: grad(loss, 1)(x[0], w, bias), (weight,), (v,))[1]
    torch.testing.assert_close(found, along, rtol=1e-6, atol=1e-6)


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    rotated = to_complex(x.reshape(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return (to_real(rotated) ** 3).sum()


def rotary_by_hand(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.reshape(-1, 2).unbind(1)
    return ((a * angles.cos() - b * angles.sin()) ** 3 + (a * angles.sin() + b * angles.cos()) ** 3).sum()


@pytest.mark.parametrize("by", [0, 1])
def test_rotary_embeddings(by: int) -> None:
    x, angles = some(6), some(3, seed=1)
    torch.testing.assert_close(grad(rotary, by)(x, angles), gradient(rotary_by_hand, x, angles)[by])
    expected = torch.autograd.functional.hessian(rotary_by_hand, (x, angles))[by][by]
    for second in (
        hessian(rotary, by), jacrev(jacrev(rotary, by), by), jacfwd(jacfwd(rotary, by), by),
        jacrev(jacfwd(rotary, by), by), jacfwd(grad(rotary, by), by),
    ):  # fmt: skip
        torch.testing.assert_close(second(x, angles), expected)
        torch.testing.assert_close(vmap(second)(x[None], angles[None])[0], expected)


BITS: tuple[Callable[[Tensor], bool], ...] = (
    lambda z: z.is_conj(),
    lambda z: z.conj().is_conj(),
    lambda z: torch.is_conj(z.conj()),
    lambda z: torch.Tensor.is_conj(z.conj()),
    lambda z: z.conj().conj().is_conj(),
    lambda z: z.conj()[0].is_conj(),
    lambda z: z.conj().resolve_conj().is_conj(),
    lambda z: z.conj().clone().is_conj(),
    lambda z: (z.conj() * 2).is_conj(),
    lambda z: z.conj().imag.is_neg(),
    lambda z: torch.is_neg(z.conj().imag),
    lambda z: torch.Tensor.is_neg(z.imag),
    lambda z: z.conj().imag.resolve_neg().is_neg(),
    lambda z: z.conj().real.is_neg(),
)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "vmap(grad)", "vmap(vmap)"])
def test_lazily_conjugated_tensors_say_so(transform: str) -> None:
    seen: list[list[bool]] = []

    def f(z: Tensor) -> Tensor:
        seen.append([ask(z) for ask in BITS])
        return (z * z.conj()).real.sum()

    z = some(3, dtype=C128)
    {
        "vmap": lambda: vmap(f)(z[None]),
        "grad": lambda: grad(f)(z),
        "jvp": lambda: jvp(f, (z,), (z,)),
        "vmap(grad)": lambda: vmap(grad(f))(z[None]),
        "vmap(vmap)": lambda: vmap(vmap(f))(z[None, None]),
    }[transform]()
    assert seen == [[ask(z) for ask in BITS]] and True in seen[0]


def written_real(z: Tensor) -> Tensor:
    z.real.mul_(2)
    return z.conj().imag


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda z: z.conj().real,
    "imag": lambda z: z.conj().imag,
    "imag of more": lambda z: (z.conj().imag.sin() + z.imag) * 2,
    "real by name": lambda z: torch.real(torch.conj(z)) + torch.imag(z.conj()),
    "resolved": lambda z: to_real(z.conj().resolve_conj()),
    "negated": lambda z: z.conj().imag.resolve_neg(),
    "adjoint": lambda z: torch.outer(z, z).mH.real,
    "written": lambda z: written_real(z.clone()),
    "derivative": lambda z: jvp(lambda z: z.conj().real * z.imag, (z,), (z.conj(),))[1],
    "gradient": lambda z: grad(lambda x: (x * z.conj()).abs().sum())(z.imag),
}


class Pieces(PassThrough):
    kind, pieces = "pieces", True


class Pushed(TableInterpreter):
    kind, payload, rules = "pushed", ("slope",), RuleTable("pushed forward", default="jvp")


class Members(TableInterpreter):
    kind, payload, rules = "members", ("others",), RuleTable("members", default="loop")

    def cases(self, wrapper: Any) -> list[Tensor]:
        return [wrapper.value, *wrapper.others.unbind(0)]

    def of_cases(self, values: Any) -> Any:
        return self.carry(values[0], others=torch.stack(list(values[1:])))


@pytest.mark.parametrize("given", ["as it is", "conjugated"])
@pytest.mark.parametrize("name", LAZY)
def test_lazy_conjugates_in_levels_that_take_operators_apart(name: str, given: str) -> None:
    f, z, v = LAZY[name], some(3, dtype=C128, seed=3), some(3, dtype=C128, seed=4)
    z, v = (z.conj(), v.conj()) if given == "conjugated" else (z, v)
    expected, slope = jvp(f, (z,), (v,))
    torch.testing.assert_close(expected, f(z))
    torch.testing.assert_close(transform(Pieces, f)(z), expected)
    torch.testing.assert_close(count(f)(z)[0], expected)
    for remove in ("mutations", "mutations_and_views"):
        torch.testing.assert_close(functionalize(f, remove=remove)(z), expected)
    for value, tangent in ((z, v), (z, v.resolve_conj()), (z.resolve_conj(), v)):
        pushed = transform(Pushed, f)(Carried(value, slope=tangent))
        torch.testing.assert_close((pushed.value, pushed.slope), (expected, slope))
    members = transform(Members, f)(Carried(z, others=torch.stack([v, z * 2])))
    torch.testing.assert_close(members.others, torch.stack([f(v), f(z * 2)]))
    rows = torch.stack([z, v])
    of_rows = vmap(lambda z: transform(Pushed, f)(Carried(z, slope=v)).value)(rows)
    torch.testing.assert_close(of_rows, torch.stack([f(z), f(v)]))


def test_what_view_as_real_refuses() -> None:
    z = some(3, dtype=C128)
    for run in (lambda f: f(z), lambda f: vmap(f)(z[None]), lambda f: grad(lambda z: f(z).sum())(z)):
        with pytest.raises(RuntimeError, match="unresolved conjugated"):
            run(lambda z: to_real(z.conj()))
