"""Where a message says that something happened: the line of the user's, whatever library code is between."""

from __future__ import annotations

import copy
import functools
import operator
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from functrans import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from functrans.core.tensor import WrapperTensor
from functrans.errors import DeadWrapperError, OtherThreadError
from functrans.extend import RuleTable, TableInterpreter, run_transformed

aten = torch.ops.aten
LINEAR = torch.nn.Linear(3, 3).requires_grad_(False)
DEEP = torch.nn.Sequential(
    torch.nn.Sequential(LINEAR, torch.nn.GELU()), torch.nn.LayerNorm(3), torch.nn.Softmax(-1)
).requires_grad_(False)
ATTENTION = torch.nn.MultiheadAttention(3, 1).requires_grad_(False)
CONV = torch.nn.Conv1d(1, 2, 2).requires_grad_(False)
LSTM = torch.nn.LSTM(3, 2).requires_grad_(False)
CAPTURED = torch.arange(9.0).reshape(3, 3)


class Super(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)  # the line of the user's that is innermost


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 2


@torch.library.custom_op("made_at::triple", mutates_args=())
def triple(x: Tensor) -> Tensor:
    return x * 3


triple.register_autograd(lambda ctx, g: g * 3)


@triple.register_vmap
def _triple_of_a_batch(info: Any, in_dims: Any, x: Tensor) -> Any:
    return triple(x), in_dims[0]


def out_of(function: Callable[..., Any], *args: Any) -> Tensor:
    buffer = torch.zeros(3, 3)
    function(*args, out=buffer)
    return buffer + 0


#: Each makes a tensor from a 3 by 3 matrix, on one line.
CALLS: dict[str, Callable[[Any], Any]] = {
    "operator": lambda x: x * x,
    "operator with a number": lambda x: x + 1.0,
    "reflected": lambda x: 1.0 - x,
    "reflected, by PyTorch": lambda x: 2.0 ** x,
    "division of a number": lambda x: 1 / x,
    "negation": lambda x: -x,
    "power": lambda x: x ** 2,
    "power by a tensor": lambda x: x ** x,
    "comparison": lambda x: x > 0,
    "product": lambda x: x @ x,
    "captured first": lambda x: CAPTURED * x,
    "captured product": lambda x: CAPTURED @ x,
    "function": lambda x: torch.sin(x),
    "function without a short way": lambda x: torch.cumsum(x, 0),
    "function with a keyword": lambda x: torch.sum(x, dim=0),
    "method": lambda x: x.exp(),
    "method without a short way": lambda x: x.logsumexp(0),
    "method with a keyword": lambda x: x.mean(dim=0, keepdim=True),
    "operator overload": lambda x: aten.cos.default(x),
    "operator packet": lambda x: aten.tanh(x),
    "index": lambda x: x[0],
    "index by a tensor": lambda x: x[torch.tensor([0, 1])],
    "view": lambda x: x.view(9),
    "transposed": lambda x: x.T,
    "view of a view": lambda x: x[0].reshape(3, 1),
    "unbind": lambda x: x.unbind(0)[1],
    "iteration": lambda x: [row for row in x][2],
    "split": lambda x: x.split(2)[0],
    "chunk": lambda x: torch.chunk(x, 3)[1],
    "several outputs": lambda x: x.max(0)[0],
    "several outputs, by name": lambda x: torch.topk(x, 2).values,
    "cat": lambda x: torch.cat([x, CAPTURED]),
    "stack": lambda x: torch.stack([x, x]),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "norm, which is Python": lambda x: torch.norm(x),
    "composite": lambda x: torch.kron(x, x),
    "decomposed": lambda x: F.smooth_l1_loss(x, CAPTURED),
    "softmax of F": lambda x: F.softmax(x, -1),
    "relu of F": lambda x: F.relu(x),
    "relu of F, by keyword": lambda x: F.relu(input=x),
    "gelu of F": lambda x: F.gelu(x),
    "linear of F": lambda x: F.linear(x, CAPTURED),
    "max_pool of F": lambda x: F.max_pool1d(x, 2),
    "layer_norm of F": lambda x: F.layer_norm(x, (3,)),
    "cross_entropy of F": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2])),
    "pad of F": lambda x: F.pad(x, (1, 1)),
    "module": lambda x: LINEAR(x),
    "modules in modules": lambda x: DEEP(x),
    "module of several outputs": lambda x: ATTENTION(x, x, x)[0],
    "convolution": lambda x: CONV(x.unsqueeze(1)),
    "recurrent": lambda x: LSTM(x)[0],
    "functional_call": lambda x: functional_call(LINEAR, {"weight": CAPTURED}, (x,)),
    "linear algebra": lambda x: torch.linalg.inv(x + 9 * torch.eye(3)),
    "linear algebra, several outputs": lambda x: torch.linalg.slogdet(x).logabsdet,
    "fft": lambda x: torch.fft.rfft(x),
    "clone": lambda x: x.clone(),
    "deepcopy": lambda x: copy.deepcopy(x),
    "detach": lambda x: x.detach(),
    "dtype": lambda x: x.double(),
    "factory": lambda x: torch.zeros(3),
    "tensor from numbers": lambda x: torch.tensor([1.0, 2.0]),
    "factory like": lambda x: torch.ones_like(x),
    "new": lambda x: x.new_zeros(2),
    "random": lambda x: torch.bernoulli(x.sigmoid().clamp(0, 1)),
    "dropout": lambda x: F.dropout(x, 0.5),
    "write": lambda x: x.clone().mul_(2),
    "write to a view": lambda x: torch.select(x.clone(), 0, 0).zero_(),
    "write by a function of F": lambda x: F.relu(x.clone(), inplace=True),
    "out=": lambda x: torch.sin(x, out=torch.empty(3, 3)),
    "autograd.Function": lambda x: Double.apply(x),
    "custom operator": lambda x: triple(x),
    "partial": lambda x: functools.partial(torch.add, x)(x),
    "reduce": lambda x: functools.reduce(operator.mul, [x, x, x]),
    "map": lambda x: next(map(torch.sin, x)),
    "sum of Python": lambda x: sum([x, x]),
    "no_grad": lambda x: torch.no_grad()(torch.square)(x),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False),
    "gradient": lambda x: grad(lambda y: (y**2).sum())(x),
    "gradient of a constant": lambda x: grad(lambda y: CAPTURED.sum())(x),
    "vmap": lambda x: vmap(torch.sin)(x),
    "vmap, moved": lambda x: vmap(torch.sin, out_dims=1)(x),
    "value of vjp": lambda x: vjp(torch.sin, x)[0],
    "pullback": lambda x: vjp(torch.sin, x)[1](x)[0],
    "tangent": lambda x: jvp(torch.sin, (x,), (x,))[1],
    "jacobian": lambda x: jacrev(torch.sin)(x[0]),
    "forward jacobian": lambda x: jacfwd(torch.sin)(x[0]),
    "hessian": lambda x: hessian(lambda y: y.sin().sum())(x[0]),
    "scripted from C": lambda x: torch.broadcast_tensors(x, x)[0],
    "meshgrid": lambda x: torch.meshgrid(x[0], x[0], indexing="ij")[0],
    "tensordot": lambda x: torch.tensordot(x, x, 1),
    "cdist": lambda x: torch.cdist(x, x),
    "to_dense": lambda x: x.to_sparse().to_dense(),
}  # fmt: skip


def escaped(kind: str, function: Callable[[Tensor], Any]) -> Tensor:
    """What ``function`` makes inside a transform, after the transform."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(function(x))
        return x.sum()

    x = torch.eye(3) + torch.arange(9.0).reshape(3, 3) / 9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "grad":
            grad(keep)(x)
        elif kind == "jvp":
            jvp(keep, (x,), (x,))
        elif kind == "vmap":
            vmap(keep, randomness="different")(torch.stack([x, 2 * x]))
        else:
            vmap(grad(keep), randomness="different")(torch.stack([x, 2 * x]))
    return kept[0]


@pytest.mark.parametrize("kind", ["grad", "vmap", "jvp", "vmap of grad"])
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_used_too_late_was_made_on_the_users_line(name: str, kind: str) -> None:
    if kind == "jvp" and name in ("custom operator", "checkpoint"):
        pytest.skip("forward mode has no meaning for it")
    function = CALLS[name]
    made = escaped(kind, function)
    where = f"It was made at {__file__}:{function.__code__.co_firstlineno}, in <lambda>."
    value: Tensor | None = made
    while type(value) is WrapperTensor:
        value = None if value.interpreter.kind == "vmap" and value.bdim is not None else value.value
    if value is not None:  # it is one for all examples, and taken
        with pytest.warns(UserWarning, match=re.escape(where)):
            torch.testing.assert_close(made + 1, value + 1)
    else:
        with pytest.raises(DeadWrapperError, match=re.escape(where)):
            made + 1


def test_the_innermost_line_of_the_users_counts() -> None:
    module = Super(3, 3).requires_grad_(False)
    made = escaped("grad", lambda x: module(x))
    with pytest.warns(UserWarning, match=f"{__file__}:{Super.forward.__code__.co_firstlineno + 1}, in forward"):
        made + 1


def test_the_line_is_the_users_where_a_module_is_not_called_as_one() -> None:
    made = escaped(
        "grad", lambda x: LINEAR.forward(x)
    )  # the frames that a module's call has are passed by without a look
    with pytest.warns(UserWarning, match=f"It was made at {__file__}:"):
        made + 1


def test_what_a_transform_calls_its_function_with_says_so() -> None:
    made = escaped("vmap", lambda x: x)
    with pytest.raises(DeadWrapperError) as info:
        made.cos()
    assert_expected_inline(
        re.sub(r"(\S*)(test_made_at.py):\d+", r"\2:N", str(info.value)),
        """A tensor that belongs to vmap(keep) at level 1 was used after that transform had ended. It was made when the transform wrapped the arguments of its function, which is defined at test_made_at.py:N. Return it from the transformed function (has_aux=True for values beside the result) instead of storing it.""",  # noqa: E501
    )


def test_a_write_leaves_alone_where_a_tensor_was_made() -> None:
    def write(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        return y

    made = escaped("grad", write)
    with pytest.warns(UserWarning, match=f"{__file__}:{write.__code__.co_firstlineno + 1}, in write"):
        made + 1


@torch.library.custom_op("made_at::slow", mutates_args=())
def slow(x: Tensor) -> Tensor:
    return x.sin()


class Slow(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return slow(x)  # where the operator is called


def test_the_warning_of_the_loop_names_the_users_line() -> None:
    module = torch.nn.Sequential(Slow())
    with pytest.warns(UserWarning, match="no batching rule for made_at.slow.default") as caught:
        vmap(module)(torch.ones(2, 3))
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, Slow.forward.__code__.co_firstlineno + 1)]


# ---- threads


class Table(TableInterpreter):
    kind = "table"
    payload = ("mark",)
    rules = RuleTable("rules of this test")


Table.rules.add(aten.sin.default, lambda interpreter, x: interpreter.carry(x.value.sin(), mark=1))
Table.rules.add(aten.cumsum.default, lambda interpreter, x, dim: interpreter.carry(x.value.cumsum(dim), mark=1))
Table.rules.add(aten.mul.Tensor, lambda interpreter, x, y: interpreter.carry(x.value * y.value, mark=1))

USES: list[Callable[[Any], Any]] = [torch.sin, lambda x: x * x, lambda x: x.cumsum(0), lambda x: torch.ones(3) * x]


def in_a_table(body: Callable[[Tensor], Any]) -> None:
    interpreter, x = Table(body), torch.ones(3)
    run_transformed(interpreter, lambda: body(interpreter.carry(x, mark=1)))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: grad(f)(torch.ones(3)),
        lambda f: vmap(f)(torch.ones(2, 3)),
        lambda f: jvp(f, (torch.ones(3),), (torch.ones(3),)),
        in_a_table,
    ],
)
@pytest.mark.parametrize("busy", [False, True])
def test_a_tensor_in_another_thread_is_refused(
    use: Callable[[Any], Any], transformed: Callable[..., Any], busy: bool
) -> None:
    found: list[BaseException] = []

    def work(x: Tensor) -> None:
        try:
            if busy:
                vmap(lambda y: use(x))(torch.ones(2))
            else:
                use(x)
        except BaseException as error:  # noqa: BLE001 - a thread does not raise
            found.append(error)

    def body(x: Tensor) -> Tensor:
        thread = threading.Thread(target=work, args=(x,))
        thread.start()
        thread.join()
        return x.sum() if not isinstance(getattr(x, "interpreter", None), Table) else x

    transformed(body)
    (error,) = found
    assert isinstance(error, OtherThreadError), repr(error)


def test_text_of_another_thread() -> None:
    found = []

    def body(x: Tensor) -> Tensor:
        def work() -> None:
            with pytest.raises(OtherThreadError) as info:
                x + 1
            found.append(str(info.value))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return x

    vmap(body)(torch.ones(2))
    assert_expected_inline(
        found[0],
        """A tensor that belongs to vmap(body) at level 1 was used in another thread than the one in which that transform runs. Each thread has a stack of transforms of its own: run the whole transform in the thread, or hand it plain tensors.""",  # noqa: E501
    )


def test_a_transform_in_another_thread_is_its_own() -> None:
    results: list[Tensor] = []

    def body(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: results.append(grad(lambda y: (y**2).sum())(torch.ones(3))))
        thread.start()
        thread.join()
        return x * results[0][0]

    assert torch.equal(vmap(body)(torch.ones(2)), torch.full((2,), 2.0))
