"""The pieces of composites, which are written down once: what was seen of one call holds for all that look alike."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from opinfo import operators, problems
from plain import difference
from rule_cases import quiet_thread
from torch import Tensor
from torch.nn import functional as F

from functrans import grad, jvp, vjp, vmap
from functrans.decompositions import pieces
from functrans.decompositions.table import DECOMPOSITIONS, definition_of
from functrans.extend import DERIVATIVES, derivative, overriding, rules_in_scope
from functrans.operators.info import op_info

aten = torch.ops.aten
quiet = pytest.fixture(autouse=True, scope="module")(quiet_thread)
X = torch.tensor([[0.3, -1.0, 2.0], [0.7, 0.2, -0.4]], dtype=torch.float64)
W = torch.tensor([[1.0, 0.5, -2.0], [0.1, 3.0, 0.4]], dtype=torch.float64)
ROWS = torch.stack([X, X.flip(0) * 2, X - 1])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many definitions were written down, and how many could not be, while a test runs."""
    count: Counter[str] = Counter()
    pieces.changes.append(aten.sin.default)  # what other tests have written is not used
    compiled = pieces.Pieces.compiled

    def noting(self: Any, result: Any) -> Any:
        script = compiled(self, result)
        count["written" if script else "refused"] += 1
        return script

    monkeypatch.setattr(pieces.Pieces, "compiled", noting)
    return count


def forget(*ops: Any) -> None:
    for op in ops:
        op_info(op).specialized = {}


def scripts_of(op: Any) -> list[Any]:
    """What is kept of ``op``'s definition, by looks."""
    return list((definition_of(op, op_info(op)).scripts or {}).values())


def thrice(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called often enough that its pieces come from a script."""

    def last(*args: Any) -> Any:
        for _ in range(2):
            f(*args)
        return f(*args)

    return last


# ---- all of PyTorch's operators


OPERATORS = operators()
#: PyTorch leaves what it returns unwritten, or takes storage for examples.
NOT_COMPARED = ("empty", "as_strided", "resize")


def by_code(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """What ``call`` returns where every definition is run as the code that it is."""
    with monkeypatch.context() as patch:
        patch.setattr(pieces.Definition, "run", pieces.Definition.anew)
        return call()


def check_calls_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Calls of an operator on different values in every mode, by scripts and by the definitions' code."""
    for problem in problems(OPERATORS[name], 3):
        if problem.random or not problem.diff or not problem.float_outputs:
            continue
        rows = [problem.split(leaves)[0] for leaves in problem.rows()]
        f = problem.split(problem.leaves)[1]
        for k, row in enumerate(rows):

            def pulled(row: Any = row, f: Any = f) -> Any:
                out, pullback = vjp(f, *row)
                return *out, *pullback(tuple(map(torch.ones_like, out)))

            modes = {
                "vjp": pulled,
                "jvp": lambda row=row, f=f: sum(jvp(f, row, row), ()),
                "vmap": lambda rows=(row, rows[k - 1]), f=f: vmap(f, randomness="same")(*map(torch.stack, zip(*rows))),
            }
            for mode, call in modes.items():
                torch.manual_seed(0)
                try:
                    expected = by_code(monkeypatch, call)
                except RuntimeError:
                    continue
                torch.manual_seed(0)
                what = difference(call(), expected)
                if what:
                    yield f"{name}, sample {problem.index}, {mode}: {what}"


@pytest.mark.parametrize("part", range(4))
def test_calls_that_look_alike(part: int, written: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for name in list(OPERATORS)[part::4]:
        if not any(word in name for word in NOT_COMPARED):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong += check_calls_alike(name, monkeypatch)
    assert not wrong, "\n".join(wrong)
    assert written["written"] > 2 * written["refused"] > 0, written


def test_a_look_that_says_too_little_is_noticed(monkeypatch: pytest.MonkeyPatch, written: Counter[str]) -> None:
    """The tester, tested: without numbers in the look, what was seen of one call is taken for another's."""
    without_numbers = lambda args, seen: tuple(type(a) for a in args)
    monkeypatch.setattr(pieces, "look_of", without_numbers)
    forget(aten.tensordot.default, aten.layer_norm.default, aten.kl_div.default)
    with pytest.raises((AssertionError, RuntimeError)):
        for name in ("tensordot", "nn.functional.layer_norm", "nn.functional.kl_div"):
            assert not list(check_calls_alike(name, monkeypatch))
    forget(aten.tensordot.default, aten.layer_norm.default, aten.kl_div.default)


# ---- what pieces follow from


def test_numbers_shapes_and_dtypes_are_in_the_look() -> None:
    for shape, factor, dtype in itertools.product([(2, 3), (3, 2)], [0.5, 2.0], [torch.float32, torch.float64]):
        a, b = torch.ones(shape, dtype=dtype), torch.full(shape, factor, dtype=dtype)
        f = lambda x, y, eps=factor: F.cosine_similarity(x, 3 * y, dim=1, eps=eps)
        out = thrice(vmap(f))(a[None], b[None])[0]
        assert out.dtype is dtype
        torch.testing.assert_close(out, f(a, b))


def test_which_arguments_are_one_tensor_is_in_the_look() -> None:
    cosine = lambda x, y: F.cosine_similarity(x, y, dim=1)
    for first, second in ((ROWS, ROWS), (ROWS, ROWS.flip(0)), (ROWS.sin(), ROWS)):
        same = first is second
        f = (lambda x, y: cosine(x, x)) if same else cosine
        expected = torch.stack([cosine(x, y) for x, y in zip(first, second, strict=True)])
        torch.testing.assert_close(thrice(vmap(f))(first, second), expected)


def test_grad_mode_and_the_default_dtype_are_in_the_look() -> None:
    f = lambda x: F.cosine_similarity(x, W, dim=1).sum()
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            close = torch.testing.assert_close
            close(thrice(lambda x: vjp(f, x)[0])(X), f(X))
    count = lambda x: torch.trapezoid(x, dx=0.5)
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            whole = torch.arange(6).reshape(2, 3)
            out = thrice(vmap(count))(whole)
            assert out.dtype is dtype and torch.equal(out, count(whole))
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_not_in_the_look_is_not_written_down(written: Counter[str]) -> None:
    flat = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    for call, x in (
        (lambda x: x.corrcoef(), flat[:, :2]),  # asks whether all are equal
        (lambda x: torch.tensor_split(x, torch.tensor([1]))[0], X),  # reads where
        (lambda x: F.dropout(x, 0.5), X),
        (lambda x: x.movedim(0, 1).reshape(2, 3), X),
    ):
        for values in (x, 2 * x, x - 1):
            torch.manual_seed(0)
            expected = call(values)
            torch.manual_seed(0)
            torch.testing.assert_close(vjp(call, values)[0], expected, equal_nan=True)


def test_results_that_share_memory_with_an_argument_still_do() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 1
        part = torch.narrow_copy(y, 1, 0, 2) * 0 + y.swapaxes(0, 1).swapaxes(0, 1)[:, :2]
        y.ravel().add_(part.sum())
        y.reshape(3, 2)[0].mul_(2)
        return y

    close = torch.testing.assert_close
    for x in (X, W, X * W):
        close(thrice(vjp)(f, x)[0], f(x))
        close(thrice(vmap(f))(torch.stack([x, -x])), torch.stack([f(x), f(-x)]))


def test_negated_and_conjugate_memory() -> None:
    z = torch.complex(X, W)
    f = lambda x: F.cosine_similarity(x, W, dim=1)
    for given in (z.conj().imag, X, z.conj().imag):
        torch.testing.assert_close(vmap(lambda w, g=given: F.cosine_similarity(g, w, dim=1))(ROWS)[0], f_of(given))
    outer = lambda a: torch.tensordot(a, z.conj(), 1)
    for a in (z.mT, z.mT.conj(), z.mT):
        torch.testing.assert_close(thrice(lambda a: vjp(outer, a)[0])(a), outer(a))
    assert f(X).shape == (2,)


def f_of(given: Tensor) -> Tensor:
    return F.cosine_similarity(given, ROWS[0], dim=1)


def test_a_write_to_what_the_definition_made_is_no_write_to_what_it_was_given() -> None:
    """``cosine_similarity`` clamps the norms that it made in place."""
    small = X * 1e-12
    f = lambda x: F.cosine_similarity(x, W, dim=1, eps=1e-3)
    for x in (small, X, small):
        close = torch.testing.assert_close
        close(thrice(vmap(f))(x[None])[0], f(x))
        slope = torch.autograd.functional.jacobian(lambda x: f(x).sum(), x)
        close(thrice(grad(lambda x: f(x).sum()))(x), slope)
        assert torch.equal(x, x.clone())


# ---- what holds when


def test_rules_registered_later_hold() -> None:
    """Also those of a composite that another comes to, which is not asked again once it is written down."""
    f = lambda x: F.cross_entropy(x, torch.tensor([0, 2]))
    plain = thrice(grad(f))(X)
    with overriding(DERIVATIVES, aten.log_softmax.int):
        derivative(aten.log_softmax.int, self=lambda grad, self, dim, dtype: torch.zeros_like(grad), tangent="linear")
        assert torch.count_nonzero(thrice(grad(f))(X)) == 0
    torch.testing.assert_close(thrice(grad(f))(X), plain)
    twice = lambda x, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True: 2 * x
    normed = lambda x: F.layer_norm(x, (3,)).sum()
    before = thrice(grad(normed))(X)
    with rules_in_scope(DECOMPOSITIONS, {aten.layer_norm.default: twice}):
        torch.testing.assert_close(thrice(grad(normed))(X), torch.full_like(X, 2.0))
    torch.testing.assert_close(thrice(grad(normed))(X), before)


def test_a_decomposition_of_the_users_is_run_each_time() -> None:
    factor = [1.0]
    by_list = lambda x, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True: factor[0] * x
    with overriding(DECOMPOSITIONS, aten.layer_norm.default):
        DECOMPOSITIONS.add(aten.layer_norm.default, by_list)
        assert definition_of(aten.layer_norm.default, op_info(aten.layer_norm.default)).scripts is None
        for factor[0] in (1.0, 2.0, 3.0, 4.0):
            slopes = grad(lambda x: F.layer_norm(x, (3,)).sum())(X)
            torch.testing.assert_close(slopes, torch.full_like(X, factor[0]))


def test_a_definition_that_switches_grad_mode_is_run_each_time() -> None:
    def define(x: Tensor) -> Tensor:
        with torch.no_grad():
            held = 2 * x
        return 3 * x + held

    definition = pieces.Definition(aten.relu.default, define, lasting=True)
    for _ in range(4):
        slopes = grad(lambda x: definition.run(x.interpreter, (x,), {}).sum())(X)  # type: ignore[attr-defined]
        torch.testing.assert_close(slopes, torch.full_like(X, 3.0))
    assert list((definition.scripts or {}).values()) == [False]


def test_modes_and_autocast_see_what_they_see_of_the_code() -> None:
    network = lambda x: F.cosine_similarity(x @ W.mT, x @ W.mT + 1, dim=1).sum()
    expected = grad(network)(X)
    single = X.float(), W.float()
    for _ in range(4):
        torch.testing.assert_close(grad(network)(X), expected)
        with torch.autocast("cpu", torch.bfloat16):
            low = grad(lambda x: F.linear(x, single[1]).float().sum())(single[0])
        plain = single[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            F.linear(plain, single[1]).float().sum().backward()
        assert torch.equal(low, plain.grad)


def test_threads_that_write_down_at_once() -> None:
    found: list[Any] = []

    def work(k: int) -> None:
        x = X + k
        f = lambda x: F.cross_entropy(x, torch.tensor([0, 2])) + F.cosine_similarity(x, W, dim=1).sum()
        for _ in range(5):
            found.append((grad(f)(x) - torch.autograd.functional.jacobian(f, x)).abs().max().item())

    forget(aten.cross_entropy_loss.default, aten.cosine_similarity.default)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40 and max(found) < 1e-10


def test_nested_composites_are_written_down_as_one() -> None:
    """``cross_entropy`` is four composites deep."""
    op = aten.cross_entropy_loss.default
    forget(op)
    thrice(grad(lambda x: F.cross_entropy(x, torch.tensor([0, 2]))))(X)
    (script,) = filter(None, scripts_of(op))
    called = {c for c in script.__globals__.values() if isinstance(c, torch._ops.OpOverload)}
    assert called == {aten.log_softmax.int, aten.nll_loss_forward.default}


def test_what_pytorch_refuses_is_refused_each_time() -> None:
    x, weight = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    for call in (
        lambda x: F.conv2d(x, weight.double()),
        lambda x: F.conv2d(x, weight, torch.ones(3).double()),
        lambda x: F.conv2d(x[:, :1], weight),
        lambda x: F.conv2d(x, weight, groups=2),
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.cross_entropy(x[0, 0], torch.tensor([0, 1])),
    ):
        for _ in range(3):
            with pytest.raises((RuntimeError, ValueError)):
                grad(lambda x: call(x).sum())(x)  # noqa: B023
