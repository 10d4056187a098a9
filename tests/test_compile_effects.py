"""Compiled transforms whose functions have effects on Python objects, or call an autograd.Function: as uncompiled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from functrans import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

x = torch.tensor([0.5, 1.0, 2.0])
rows = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]])


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Seen:
    """What a program leaves behind."""

    def __init__(self, kept: Any = None) -> None:
        self.count, self.kept = 0, kept
        self.shapes: list[Any] = []
        self.by_name: dict[str, Any] = {}


def outcome(program: Callable[..., Any], run: Callable[..., Any] = lambda f: f) -> Any:
    """What two calls of ``program(seen)`` return, and what they leave in ``seen``."""
    seen = Seen()
    run_program = run(program(seen))
    results = [run_program(point.clone()) for point in (x, x + 1)]
    return results, seen.count, seen.shapes, seen.by_name


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert found[1:] == expected[1:]


def compiled(fullgraph: bool) -> Callable[..., Any]:
    return lambda f: torch.compile(f, backend="aot_eager", fullgraph=fullgraph)


def counting(seen: Any) -> Callable[[Tensor], Tensor]:
    def f(y: Tensor) -> Tensor:
        seen.count += 1
        return (y.sin() * y).sum()

    return f


#: Each runs its function once.
TRANSFORMS: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "functionalize": functionalize,
    "grad": grad,
    "hessian": hessian,
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,)),
    "linearize": lambda f: lambda x: linearize(f, x)[1](x),
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.tensor(2.0)),
    "vmap of grad": lambda f: lambda x: vmap(grad(f))(rows * x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_effect_takes_place_once(name: str) -> None:
    program = lambda seen: TRANSFORMS[name](counting(seen))
    results, count, *_ = outcome(program)
    again, as_often, *_ = outcome(program, compiled(fullgraph=True))
    torch.testing.assert_close(again, results)
    assert as_often == count == 2


def appending(seen: Any) -> Any:
    def f(y: Tensor) -> Tensor:
        seen.shapes.append(tuple(y.shape))
        seen.by_name.setdefault("dtypes", []).append(y.dtype)
        return y.sin().sum()

    return lambda x: vmap(grad(f))(rows * x) * len(seen.shapes)


def by_nonlocal(seen: Any) -> Any:
    def program(x: Tensor) -> Tensor:
        size = None

        def f(y: Tensor) -> Tensor:
            nonlocal size
            size = len(y.shape)
            return y.sin().sum()

        slopes = vmap(grad(f))(rows * x)
        assert size is not None
        return slopes + size

    return program


def swapped(seen: Any) -> Any:
    """Parameters are put into a module and taken out again, as ``TensorDict.to_module`` does."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)

    def loss(weight: Tensor, y: Tensor) -> Tensor:
        old = layer._parameters["weight"]
        layer._parameters["weight"] = weight  # type: ignore[assignment]
        try:
            return layer(y).sin().sum()
        finally:
            layer._parameters["weight"] = old

    return lambda x: vmap(grad(loss), (None, 0))(layer.weight * 2, rows * x)


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(3)), 0

    def forward(self, y: Tensor) -> Tensor:
        self.calls += 1
        return (self.weight * y).sin().sum()


def module_counts(seen: Any) -> Any:
    module = Calls()
    parameters = dict(module.named_parameters())
    slopes = vmap(grad(lambda p, y: functional_call(module, p, (y,))), (None, 0))
    return lambda x: (slopes(parameters, rows * x)["weight"], module.calls)


def kept_from_outside(seen: Any) -> Any:
    """What an object keeps of a tensor is no value of the transform."""

    def program(x: Tensor) -> Any:
        outer = x * 3

        def f(y: Tensor) -> Tensor:
            seen.kept = outer
            return (y * outer).sin().sum()

        return vmap(grad(f))(rows * x), seen.kept

    return program


PROGRAMS = [appending, by_nonlocal, swapped, module_counts, kept_from_outside]


@pytest.mark.parametrize("program", PROGRAMS)
def test_effects_go_into_the_graph(program: Any) -> None:
    assert_same(outcome(program, compiled(fullgraph=True)), outcome(program))


def left(put: Callable[[Any, Tensor], None]) -> Any:
    def program(seen: Any) -> Any:
        def f(y: Tensor) -> Tensor:
            seen.count += 1
            put(seen, y * 2)
            return y.sin().sum()

        return grad(f)

    return program


def in_chunks(seen: Any) -> Any:
    def f(y: Tensor) -> Tensor:
        seen.count += 1
        return y.sin()

    return lambda x: vmap(f, chunk_size=1)(rows * x)


#: What has effects that a graph would not have, or keeps what ends with the transform.
REFUSED = {
    "left in an attribute": left(lambda seen, y: setattr(seen, "kept", y)),
    "left in a list": left(lambda seen, y: setattr(seen, "kept", [1, {"y": y}])),
    "left in an object": left(lambda seen, y: setattr(seen, "kept", Seen(y))),
    "once for each chunk": in_chunks,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_would_not_do_breaks_it(name: str) -> None:
    assert_same(outcome(REFUSED[name], compiled(fullgraph=False)), outcome(REFUSED[name]))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"leaves a tensor|Mutating|mutations that are undone"):
        outcome(REFUSED[name], compiled(fullgraph=True))


class Saving(Function):
    """Of exp(x) * k, with half of a derivative: saves an input, an intermediate, an output and a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        power = x.exp()
        out = power * k
        ctx.save_for_backward(x, power, out)
        ctx.k = k
        places = x.argmax()
        ctx.mark_non_differentiable(places)
        return out, places

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        x, power, out = ctx.saved_tensors
        return g * (power * ctx.k + out * x) / 2, None


class Cubes(Function):
    """Its derivative is said to be 7 x²."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 7 * g * ctx.saved_tensors[0] ** 2


class OfTheBatch(Function):
    """Its rule for vmap is not what vmap would make of it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return x * info.batch_size, in_dims[0]


cubes = lambda y: Cubes.apply(y).sum()
half = lambda y: Saving.apply(y, 2)[0].sum()
#: Programs, and what they are by hand.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "slopes": (lambda x: vmap(grad(cubes))(rows * x), lambda x: 7 * (rows * x) ** 2),
    "in vmap in grad": (lambda x: grad(lambda r: vmap(Cubes.apply)(r).sum())(rows * x), lambda x: 7 * (rows * x) ** 2),
    "curvatures": (lambda x: vmap(jacrev(grad(cubes)))(rows * x), lambda x: torch.diag_embed(14 * rows * x)),
    "third": (
        lambda x: vmap(grad(grad(grad(Cubes.apply))))(x),
        lambda x: torch.full((3,), 14.0),
    ),
    "saving": (lambda x: vmap(grad(half))(rows * x), lambda x: (rows * x).exp() * (1 + rows * x)),
    "saving twice": (
        lambda x: vmap(jacrev(grad(half)))(rows * x),
        # of (2 exp(x) + x out) / 2: the intermediate is a constant, as in PyTorch, the output has the derivative above
        lambda x: torch.diag_embed((rows * x).exp() * (1 + rows * x * (1 + rows * x) / 2)),
    ),
    "integers": (lambda x: vmap(lambda y: Saving.apply(y, 2)[1])(rows * x), lambda x: (rows * x).argmax(1)),
    "a rule for vmap": (lambda x: vmap(OfTheBatch.apply)(rows * x), lambda x: 2 * rows * x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_what_they_are_uncompiled(name: str) -> None:
    program, by_hand = FUNCTIONS[name]
    for run in (program, compiled(fullgraph=True)(program)):
        torch.testing.assert_close(run(x.clone()), by_hand(x))


def test_autograd_at_the_base_goes_through_a_function() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    program = lambda x: vmap(grad(lambda y: Cubes.apply(y * weight).sum()))(rows * x)
    out = compiled(fullgraph=True)(program)(x)
    (found,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(found, 21 * weight**2 * ((rows * x) ** 2).sum(0))


#: In a process of its own: the private names stay replaced.
BESIDE_CONTAINERS = """
import functrans, torch
from functrans.api.private_names import answer_for_good
from torch.func import grad, vmap
rows = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 2.0]])
for replace in (lambda: None, answer_for_good, torch._dynamo.reset):
    replace()
    compiled = torch.compile(vmap(grad(lambda r: (r.sin() * torch.tensor(2)).sum())), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows), 2 * rows.cos())
"""
#: The other way round: replaced before Dynamo is imported.
DYNAMO_LATER = """
import torch
from functrans import compat
with compat.install():
    compiled = torch.compile(torch.func.vmap(torch.sin), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(2)), torch.ones(2).sin())
"""


@pytest.mark.parametrize("program", [BESIDE_CONTAINERS, DYNAMO_LATER], ids=["beside containers", "Dynamo later"])
def test_torch_func_is_compiled_where_private_names_are_replaced(program: str) -> None:
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
