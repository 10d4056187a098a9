"""An exception raised at one line of the library, and what it leaves behind.

``python tests/checkers/injection.py`` raises at every line event of the library that the programs below reach, each in
a process of its own whose caches are as cold as after the import, and prints what differs afterwards: the state of the
thread, or what the same program returns when it is run again. ``--program NAME`` and ``--lines FILE`` narrow it down.
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # checkpoint imports it: an import that is interrupted cannot be repeated
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import functrans
from functrans import grad, hessian, jacrev, jvp, vjp, vmap
from functrans.core.stack import interpreter_stack
from functrans.extend import DERIVATIVES, RuleTable, TableInterpreter, derivative, overriding, run_transformed
from functrans.pytorch.thread_state import OBSERVERS, STATE

HOME = str(Path(functrans.__file__).parent)
#: Code that runs while the package is imported, or in its own program.
ELSEWHERE = tuple(os.path.join(HOME, name) for name in ("tour", "cli.py"))


class Injected(BaseException):
    """No ``except Exception`` of the library takes it, as it takes no KeyboardInterrupt."""


KEYS = [
    getattr(torch._C.DispatchKey, k)
    for k in ("AutogradFunctionality", "ADInplaceOrView", "Conjugate", "Negative", "ZeroTensor", "Python")
]


def thread() -> dict[str, Any]:
    """All of the thread's state that the library touches."""
    return {
        "interpreters": interpreter_stack(),
        "door_depth": STATE.door_depth,
        "observers": (STATE.observer, *OBSERVERS),
        "modes": _get_current_dispatch_mode_stack(),
        "function modes": _get_current_function_mode_stack(),
        "keys": [torch._C._dispatch_tls_is_dispatch_key_excluded(k) for k in KEYS],
        "grad mode": torch.is_grad_enabled(),
        "forward mode": torch._C._is_fwd_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "dual level": torch.autograd.forward_ad._current_level,
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "torch function": torch._C._is_torch_function_enabled(),
    }


# ------------------------------------------------------------------------------------------------------- the programs

PROGRAMS: dict[str, Callable[[], Any]] = {}


def program(function: Callable[[], Any]) -> Callable[[], Any]:
    PROGRAMS[function.__name__] = function
    return function


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, steps=int(torch.Size(shape).numel()), dtype=torch.float64).reshape(shape)


@program
def pointwise() -> Any:
    def f(x: Tensor) -> Tensor:
        y = torch.sin(x) * x + 2.0 - (3.0 - x) / (x * x + 1) + (x + 2) ** 3
        return (y + torch.where(y > 0, y, torch.exp(y))).sum()

    return vmap(grad(f))(numbers(2, 3)), hessian(f)(numbers(3)), jvp(grad(f), (numbers(3),), (numbers(3),))


@program
def depth() -> Any:
    def f(x: Tensor) -> Tensor:
        return torch.tanh(x) * x

    return vmap(grad(grad(f)))(numbers(3)), grad(lambda x: vmap(lambda e: jvp(f, (e,), (e,))[1])(x).sum())(numbers(3))


@program
def writes() -> Any:
    def f(x: Tensor) -> Tensor:
        y = torch.zeros(3, dtype=x.dtype)
        y[0] = x[1]
        y[1:].add_(x[:2]).mul_(x.sum())
        row = y.view(3, 1).squeeze(1)
        row.cumsum_(0)
        with torch.no_grad():
            y.clamp_(max=4.0)
        torch.add(y, x, out=y)
        y.unsqueeze_(0)
        return (y * x).sum()

    return vmap(grad(f))(numbers(2, 3)), jvp(f, (numbers(3),), (numbers(3),))


@program
def scalar_indices() -> Any:
    table = numbers(4, 2)

    def f(x: Tensor, i: Tensor) -> Tensor:
        y = x.clone()
        y[i] = table[i].sum()
        return y * x[i]

    return vmap(f)(numbers(3, 4), torch.tensor([0, 2, 1]))


@program
def written_arguments() -> Any:
    x = numbers(2, 3)

    def f(e: Tensor) -> Tensor:
        return e.mul_(2)

    return vmap(f)(x), x, vmap(f, chunk_size=1)(x), x


@program
def products() -> Any:
    weights, bias = numbers(4, 3), numbers(4)

    def f(x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, weights, bias)
        z = torch.softmax(y @ weights, -1)
        return (
            torch.einsum("i,i->", z, x) + torch.nn.functional.layer_norm(x, (3,)).sum() + torch.cat([x, z]).var()
        ).sin()

    return vmap(grad(f))(numbers(2, 3)), jacrev(lambda w: (w @ numbers(3)).tanh())(weights), hessian(f)(numbers(3))


@program
def borrowed() -> Any:
    def f(x: Tensor) -> Tensor:
        return (
            torch.linalg.svdvals(x.reshape(2, 2)).sum()
            + torch.special.i0e(x).sum()
            + torch.renorm(x.reshape(2, 2), 2, 0, 0.5).sum()
        )

    return (
        vmap(grad(f))(numbers(2, 4)),
        jvp(grad(f), (numbers(4),), (numbers(4),)),
        vmap(lambda x: torch.renorm(x.reshape(2, 2), 2, 0, 0.5))(numbers(2, 4)),
    )


@program
def randomness() -> Any:
    def f(x: Tensor) -> Tensor:
        return (
            torch.nn.functional.dropout(x, 0.5)
            + torch.rand(3, dtype=x.dtype)
            + torch.bernoulli(torch.full((3,), 0.5, dtype=x.dtype))
        )

    found = []
    for kind in ("different", "same"):
        torch.manual_seed(0)
        found.append(vmap(grad(lambda x: f(x).sum()), randomness=kind)(numbers(2, 3)))
    return found


@program
def looped() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vmap(lambda x: torch.histogram(x, bins=3, range=(-1.0, 2.0)).hist)(numbers(2, 6))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        return grad * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        return tangent * ctx.saved_tensors[0], None

    generate_vmap_rule = True


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * ctx.saved_tensors[0].exp()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Old.apply(x), in_dims[0]


@program
def functions() -> Any:
    def f(x: Tensor) -> Tensor:
        return Cube.apply(x)[0].sum() + Old.apply(x).sum()

    return (
        vmap(grad(f))(numbers(2, 3)),
        jvp(lambda x: Cube.apply(x)[0], (numbers(3),), (numbers(3),)),
        grad(lambda x: grad(f)(x).sum())(numbers(3)),
    )


@program
def modules() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(1, 2, 2), torch.nn.BatchNorm1d(2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4, 1)
    ).double()
    functrans.replace_all_batch_norm_modules_(model)
    weights = dict(model.named_parameters())
    models = [torch.nn.Linear(2, 1).double() for _ in range(2)]
    stacked, buffers = functrans.stack_module_state(models)  # type: ignore[arg-type]

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functrans.functional_call(model, weights, (x.reshape(1, 1, 3),)).sum()

    ensemble = vmap(lambda w, b, x: functrans.functional_call(models[0], (w, b), (x,)), in_dims=(0, 0, None))
    rnn = torch.nn.GRU(2, 2).double()
    return (
        vmap(grad(loss), in_dims=(None, 0))({k: v.detach() for k, v in weights.items()}, numbers(2, 3)),
        ensemble(stacked, buffers, numbers(2)),
        vmap(lambda x: rnn(x)[0])(numbers(2, 3, 2)),
    )


@program
def at_the_base() -> Any:
    x = numbers(3).requires_grad_()
    w = numbers(3).requires_grad_()
    (grad(lambda a: (a.sin() * w).sum())(x) * vmap(lambda a: a * w[0])(x)).sum().backward()

    def f(a: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda b: (b * w).sin(), a, use_reentrant=False).sum()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        grad(lambda a: (a * w).cumsum(0).sum())(x).sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(numbers(3), numbers(3))
        tangent = torch.autograd.forward_ad.unpack_dual(vmap(torch.sin)(dual)).tangent
    return x.grad, w.grad, grad(f)(x.detach()), tangent


@program
def grad_modes() -> Any:
    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = grad(lambda z: (z**3).sum())(x)
        return (x * y).sum()

    with torch.no_grad():
        outer = grad(f)(numbers(3))
    with torch.inference_mode():
        inner = grad(lambda x: torch.linalg.det(x.reshape(2, 2)) + torch.linalg.svdvals(x.reshape(2, 2)).sum())(
            numbers(4)
        )
    return outer, inner.clone()


@program
def pullbacks() -> Any:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x.register_hook(lambda g: g * 2)
        return torch.outer(x, y), {"aux": x.sort()[0]}

    out, pullback, aux = vjp(f, numbers(2), numbers(3), has_aux=True)
    return out, pullback(torch.ones_like(out)), aux


@program
def autocast() -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return vmap(grad(lambda x: (x @ torch.eye(3)).float().sum()))(numbers(2, 3).float())


class Sign(TableInterpreter):
    kind = "sign"
    payload = ("signum",)
    rules: RuleTable[Callable[..., Any]] = RuleTable("sign rules")


@Sign.rules.register(torch.ops.aten.mul.Tensor)
def multiplied(interpreter: Sign, x: Any, y: Any) -> Any:
    return interpreter.carry(
        x.value * y.value, signum=None if x.signum is None or y.signum is None else x.signum * y.signum
    )


@program
def own_transforms() -> Any:
    def sign(f: Callable[..., Any], x: Tensor) -> Any:
        signum = torch.sign(x)  # a value of the level that x is of
        interpreter = Sign(f)
        out = run_transformed(interpreter, lambda: f(interpreter.carry(x, signum=signum)))
        return out.value, out.signum

    floor = torch.ops.aten.floor.default
    with overriding(DERIVATIVES, floor):
        derivative(floor, self=lambda grad: grad, tangent="elementwise")
        through = grad(lambda x: torch.floor(x).sum())(numbers(3))
    return (
        through,
        vmap(lambda x: sign(lambda a: a * a * a, x))(numbers(3)),
        grad(lambda x: torch.floor(x).sum())(numbers(3)),
    )


@program
def caught() -> Any:
    """An exception inside that the program itself handles."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        try:
            y = y + torch.mm(x, x).sum() + vmap(lambda e: torch.full((int(e),), 1.0))(x)[0]
        except RuntimeError:
            y = y.cos()
        return (y * y.sum()).sum()

    return vmap(grad(f))(numbers(2, 3))


@program
def explained() -> Any:
    def f(x: Tensor) -> Tensor:
        return torch.tanh(x).cumsum(0)[0] * vjp(torch.sin, x)[1](x)[0].sum()

    return functrans.explain(vmap(grad(f)), numbers(2, 3)).result, vmap(
        lambda x: functrans.explain(grad(f), x).result
    )(numbers(2, 3))


# ----------------------------------------------------------------------------------------------------- the injections


def ours(path: str) -> bool:
    return path.startswith(HOME) and not path.startswith(ELSEWHERE)


Place = tuple[str, int]


def lines_of(run: Callable[[], Any]) -> dict[Place, int]:
    """The library's lines that ``run`` executes, and how often."""
    seen: dict[Place, int] = {}

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            seen[place] = seen.get(place, 0) + 1
        return local

    def trace(frame: Any, event: str, arg: Any) -> Any:
        return local if ours(frame.f_code.co_filename) else None

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return seen


def raising_at(run: Callable[[], Any], place: Place, count: int) -> bool:
    """Run with an exception at the ``count``-th time that the line at ``place`` begins; whether it came to that."""
    left, done = count, False

    def local(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left, done
        if event == "line" and frame.f_lineno == place[1]:
            left -= 1
            if left == 0:
                done = True
                sys.settrace(None)
                raise Injected
        return local

    def trace(frame: Any, event: str, arg: Any) -> Any:
        return local if frame.f_code.co_filename == place[0] else None

    sys.settrace(trace)
    try:
        run()
    except Injected:
        pass
    finally:
        sys.settrace(None)
    return done


def flat(x: Any) -> list[Any]:
    if isinstance(x, Tensor):
        return [x.detach().clone()]
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for item in x for leaf in flat(item)] if isinstance(x, list | tuple) else [x]


def differences(run: Callable[[], Any], place: Place, count: int, expected: list[Any]) -> str:
    """What an exception at ``place`` leaves behind; empty: nothing."""
    before = thread()
    try:
        if not raising_at(run, place, count):
            return ""
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what was left behind
        return f"raised {type(error).__name__}: {error}"
    after = thread()
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        return ", ".join(f"{name}: {before[name]} became {after[name]}" for name in changed)
    try:
        found = flat(run())
    except BaseException as error:  # noqa: BLE001
        return f"then {type(error).__name__}: {str(error)[:200]} ({traceback.extract_tb(error.__traceback__)[-1]})"
    if len(found) != len(expected) or not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
        return "then gives other numbers"
    changed = [name for name, value in thread().items() if value != before[name]]
    return f"then leaves {changed}" if changed else ""


def in_a_fork(task: Callable[[], Any]) -> Any:
    """What ``task`` returns in a child process, whose caches are those of this one."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            result: Any = task()
        except BaseException:  # noqa: BLE001 - the parent is told
            result = f"the child failed: {traceback.format_exc()}"
        with os.fdopen(writer, "wb") as out:
            out.write(pickle.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        data = source.read()
    os.waitpid(pid, 0)
    return pickle.loads(data) if data else "the child died"


def places(names: Iterable[str]) -> Iterator[tuple[str, Place, int, list[Any]]]:
    """Every line of the library that the programs reach: the first program that does, how often,
    and what the program returns.
    """
    done: set[Place] = set()
    for name in names:
        run = PROGRAMS[name]
        found = in_a_fork(lambda run=run: (lines_of(run), flat(run())))  # type: ignore[misc]
        if isinstance(found, str):
            raise RuntimeError(f"{name}: {found}")  # noqa: TRY004
        lines, expected = found
        for place, times in sorted(lines.items()):
            if place not in done:
                done.add(place)
                yield name, place, times, expected


def violations(wanted: Callable[[str, int], bool], names: Iterable[str] = PROGRAMS) -> Iterator[str]:
    """What exceptions leave behind at the lines that are ``wanted(file:line, number of the line among all)``.

    A line is tried in the first program that reaches it, at the first and at the last time that it is reached there.
    """
    torch.set_num_threads(1)
    tried = 0
    for number, (name, place, times, expected) in enumerate(places(names)):
        shown = f"{os.path.relpath(place[0], HOME)}:{place[1]}"
        if not wanted(shown, number):
            continue
        for count in dict.fromkeys((1, times)):
            tried += 1
            left = in_a_fork(functools.partial(differences, PROGRAMS[name], place, count, expected))
            if left:
                yield f"{name}, {shown}, time {count} of {times}: {left}"
    print(f"{tried} exceptions", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", choices=sorted(PROGRAMS), action="append")
    parser.add_argument(
        "--lines", default="", metavar="FILE[:NUMBER]", help="those that begin so, relative to the package"
    )
    options = parser.parse_args()
    bad = 0
    for text in violations(lambda shown, number: shown.startswith(options.lines), options.program or PROGRAMS):
        bad += 1
        print(text, flush=True)
    print(f"{bad} left something behind")
    sys.exit(bool(bad))
