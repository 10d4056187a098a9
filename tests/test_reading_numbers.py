"""Asking for the number of a tensor inside a transform: what the error says, and where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from functrans import grad, jvp, vmap
from functrans.errors import DataDependentError, NoDataError

X = torch.tensor([1.0, 2.0, 3.0])


def branch(x: Tensor) -> Tensor:
    if x > 0:
        return x
    return -x


def loop(x: Tensor) -> Tensor:
    while x < 10:
        x = x * 2
    return x


def text(error: BaseException) -> str:
    return re.sub(r"\S*(test_reading_numbers.py):\d+", r"\1:N", str(error))


#: By what the message has to name, what users write.
ASKED: list[tuple[str, Callable[[Any], Any]]] = [
    ("bool(tensor)", branch),
    ("bool(tensor)", loop),
    ("bool(tensor)", lambda x: x and 1),
    ("bool(tensor)", lambda x: not x),
    ("bool(tensor)", lambda x: max(x, 2.0)),
    ("bool(tensor)", lambda x: min([x, x + 1])),
    ("bool(tensor)", lambda x: 1 < x < 2),
    ("bool(tensor)", lambda x: x in [torch.tensor(1.0)]),
    ("float(tensor)", lambda x: float(x)),
    ("int(tensor)", lambda x: int(x)),
    ("complex(tensor)", lambda x: complex(x)),
    ("range(n)", lambda x: range(x.long())),
    ("range(n)", lambda x: [1, 2, 3, 4][x.long()]),
    ("tensor.item()", lambda x: x.item()),
    ("tensor.item()", lambda x: torch.zeros(x.long())),
    ("tensor.tolist()", lambda x: x.tolist()),
    ("tensor.tolist()", lambda x: x.reshape(1).tolist()),
    ("format(tensor, spec)", lambda x: f"{x:.3f}"),
    ("numpy()", lambda x: x.numpy()),
    ("numpy()", lambda x: x.__array__()),
    ("aten.nonzero", lambda x: x.reshape(1).nonzero()),
]


@pytest.mark.parametrize(("what", "ask"), ASKED)
def test_under_vmap_the_error_names_what_was_asked_and_where(what: str, ask: Callable[[Any], Any]) -> None:
    for transformed in (
        lambda f: vmap(f)(X),
        lambda f: vmap(lambda x: grad(lambda y: (f(y), y)[1])(x))(X),
        lambda f: grad(lambda x: (vmap(f)(x), x.sum())[1])(X),
    ):
        with pytest.raises((DataDependentError, NoDataError)) as info:
            transformed(ask)
        message = str(info.value)
        assert what in message
        code = ask.__code__
        line = code.co_firstlineno + (code.co_name != "<lambda>")
        assert f"At {__file__}:{line}, in {code.co_name}: `" in message


def test_where_pytorch_s_own_code_asks_its_line_is_named_and_the_cure_is_another() -> None:
    entropy = lambda x: torch.distributions.Binomial(x, torch.tensor(0.5)).entropy()
    sequence = lambda x: torch.nn.utils.rnn.pack_padded_sequence(torch.ones(3, 1, 2), x.long().view(1))
    for ask, where in ((entropy, "torch/distributions/binomial.py"), (sequence, "torch/nn/utils/rnn.py")):
        found = rf"PyTorch's own code called it there, at {where}:\d+, in .*`\. Cure: run this part in a loop"
        with pytest.raises(DataDependentError, match=found) as info:
            vmap(ask)(X)
        assert f"At {__file__}:{ask.__code__.co_firstlineno}, in <lambda>: `" in str(info.value)
    for ask in (torch.unique, lambda x: torch.split(torch.ones(3), x.long())):
        with pytest.raises(DataDependentError) as info:
            vmap(ask)(X)
        assert "PyTorch's own code" not in str(info.value)


def test_texts() -> None:
    found = []
    for ask in (
        branch,
        lambda x: float(x),
        lambda x: range(x.long()),
        lambda x: x.tolist(),
        lambda x: f"{x:.3f}",
        lambda x: x.numpy(),
    ):
        with pytest.raises((DataDependentError, NoDataError)) as info:
            vmap(ask)(X)
        found.append(text(info.value))
    with pytest.raises(NoDataError) as info:
        grad(lambda x: x.numpy())(X)
    found.append(text(info.value))
    assert_expected_inline(
        "\n".join(found),
        """\
bool(tensor), which `if`, `while`, `assert`, `and`, `or` and `not` call, was called on a batched tensor inside vmap(branch) at level 1; its result depends on the numbers of each of the 3 examples, for all of which the function runs once. At test_reading_numbers.py:N, in branch: `if x > 0:`. Cure: torch.where(condition, a, b) computes both and chooses for each example; `&`, `|` and `~` take the place of `and`, `or` and `not`.
float(tensor) was called on a batched tensor inside vmap(<lambda>) at level 1; its result depends on the numbers of each of the 3 examples, for all of which the function runs once. At test_reading_numbers.py:N, in <lambda>: `lambda x: float(x),`. Cure: keep it a tensor, which arithmetic takes as it takes a number; what is the same for every example can be passed as a number, or as a tensor with in_dims=None.
a tensor as a Python integer, which range(n), list[i] and sizes ask for, was called on a batched tensor inside vmap(<lambda>) at level 1; its result depends on the numbers of each of the 3 examples, for all of which the function runs once. At test_reading_numbers.py:N, in <lambda>: `lambda x: range(x.long()),`. Cure: index a tensor with it, x[i]; a length or size has to be the same for every example: pass it as an int.
tensor.tolist() was called on a batched tensor inside vmap(<lambda>) at level 1; its result depends on the numbers of each of the 3 examples, for all of which the function runs once. At test_reading_numbers.py:N, in <lambda>: `lambda x: x.tolist(),`. Cure: return the tensor from the function, and convert the result outside of vmap.
format(tensor, spec), as in an f-string with a format, was called on a batched tensor inside vmap(<lambda>) at level 1; its result depends on the numbers of each of the 3 examples, for all of which the function runs once. At test_reading_numbers.py:N, in <lambda>: `lambda x: f"{x:.3f}",`. Cure: leave the format out, f'{x}', to see all examples; or return the tensor from the function, and convert the result outside of vmap.
numpy() was called on a tensor inside vmap(<lambda>) at level 1, where it stands for more than its numbers. At test_reading_numbers.py:N, in <lambda>: `lambda x: x.numpy(),`. Return the tensor from the function, and convert the result.
numpy() was called on a tensor inside grad(<lambda>) at level 1, where it stands for more than its numbers. At test_reading_numbers.py:N, in <lambda>: `grad(lambda x: x.numpy())(X)`. Call .detach() first.""",  # noqa: E501
    )


def test_under_grad_and_jvp_numbers_can_be_read() -> None:
    for ask, value in (
        (lambda x: float(x[1]), 2.0),
        (lambda x: x[0].item(), 1.0),
        (lambda x: x.tolist(), [1.0, 2.0, 3.0]),
        (lambda x: bool(x[0] > 0), True),
    ):
        seen: list[Any] = []

        def f(x: Tensor, ask: Any = ask, seen: Any = seen) -> Tensor:
            seen.append(ask(x))
            return x.sum()

        grad(f)(X)
        jvp(f, (X,), (X,))
        assert seen == [value, value]


def test_the_cures_work() -> None:
    torch.testing.assert_close(vmap(lambda x: torch.where(x > 2, x, -x))(X), torch.tensor([-1.0, -2.0, 3.0]))
    torch.testing.assert_close(vmap(lambda x, i: X[i] * x)(X, torch.tensor([2, 1, 0])), X * X.flip(0))
    torch.testing.assert_close(vmap(lambda x, s: x * float(s), in_dims=(0, None))(X, torch.tensor(2.0)), 2 * X)
    torch.testing.assert_close(
        vmap(lambda x: torch.where((x > 1) & ~(x > 2), x, 0.0))(X), torch.tensor([0.0, 2.0, 0.0])
    )
