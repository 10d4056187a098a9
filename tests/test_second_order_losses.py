"""Losses with weights, weight norms, norms and products of zeros: derivatives up to third order in every mix of modes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from four_mixes import along, check_mixes, derivative
from slow_ways import some
from torch import Tensor, nn

from functrans import functional_call, grad, jvp, vmap


def positive(*shape: int, seed: int = 0) -> Tensor:
    return some(*shape, seed=seed).abs() + 0.3


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


REDUCTIONS = ("none", "mean", "sum")


def check_each(f: Callable[..., Any], args: tuple[Tensor, ...], **options: Any) -> None:
    """All arguments moving together, and each alone."""
    for moving in (None, *([i] for i in range(len(args)))):
        check_mixes(along(f, args, moving), **{"radius": 0.02, "rtol": 1e-4, "atol": 1e-6, **options})


# ---- losses with weights

LABELS = {
    "one example": ((3,), torch.tensor(2)),
    "examples": ((4, 3), torch.tensor([0, 2, 1, 2])),
    "sequences": ((2, 3, 2), torch.tensor([[0, 2], [1, 2]])),
    "images": ((2, 3, 2, 2), torch.tensor([[[0, 2], [1, 2]], [[0, 1], [1, 0]]])),
    "volumes": ((1, 3, 2, 1, 2), torch.tensor([[[[0, 2]], [[1, 2]]]])),
}


@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LABELS)
def test_class_weights(name: str, reduction: str, ignore_index: int) -> None:
    shape, target = LABELS[name]
    args, options = (some(*shape), positive(3)), {"reduction": reduction, "ignore_index": ignore_index}
    check_each(lambda x, w: F.nll_loss(x, target, w, **options), args)
    for label_smoothing in (0.0, 0.2):
        check_each(
            lambda x, w, s=label_smoothing: F.cross_entropy(x, target, w, label_smoothing=s, **options), args, order=2
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 3, 2)], ids=str)
def test_probabilities_as_targets(shape: tuple[int, ...], reduction: str) -> None:
    args = some(*shape), some(*shape, seed=1).softmax(int(len(shape) > 1)), positive(3)
    check_each(lambda x, p, w: F.cross_entropy(x, p, w, reduction=reduction, label_smoothing=0.1), args)


def test_class_weights_of_a_batch() -> None:
    x, weights = some(5, 4, 3), positive(5, 3)
    target = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2], [2, 0, 0, 1], [0, 2, 1, 1], [1, 2, 2, 0]])

    def f(x: Tensor, target: Tensor, w: Tensor) -> Tensor:
        return jvp(grad(lambda w: F.cross_entropy(x, target, w)), (w,), (w.sin(),))[1]

    expected = torch.stack([f(*row) for row in zip(x, target, weights, strict=True)])
    torch.testing.assert_close(vmap(f)(x, target, weights), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_weights(reduction: str) -> None:
    x, y, w, v = some(4, 3), some(4, 3, seed=1).sigmoid(), positive(4, 3, seed=2), positive(3, seed=3)
    labels = torch.tensor([0, 2, 1, 2])
    options: dict[str, Any] = {"reduction": reduction}
    check_each(lambda x, y, w: F.binary_cross_entropy(x.sigmoid(), y, w, **options), (x, y, w))
    check_each(lambda x, y, w, v: F.binary_cross_entropy_with_logits(x, y, w, pos_weight=v, **options), (x, y, w, v))
    check_each(lambda x, w: F.multi_margin_loss(x, labels, weight=w, p=2, **options), (x, v), order=2, radius=1e-3)
    check_each(lambda x, w: F.multi_margin_loss(x[1] * 3, labels[1], weight=w, **options), (x, v), radius=2e-3)
    check_each(lambda x, y, w: F.multilabel_soft_margin_loss(x, y, w, **options), (x, y, v))
    check_each(lambda x, y, w: F.gaussian_nll_loss(x, y, w, full=True, **options), (x, y, w))
    apart = y + 2 + positive(4, 3, seed=4)
    check_each(lambda x, y, w: F.l1_loss(x, y, weight=w, **options), (apart, y, w))
    check_each(lambda x, y, w: F.mse_loss(x, y, weight=w, **options), (apart, y, w))
    check_each(lambda x, y, w: F.huber_loss(x, y, weight=w, **options), (apart, y, w))


def test_weights_that_a_loss_does_not_hand_on() -> None:
    """``F.l1_loss`` forgets its weight where it hands itself over to a tensor subclass."""
    x, y, w = some(3, 2), some(3, 2, seed=1), positive(3, 2)
    torch.testing.assert_close(grad(lambda x: F.l1_loss(x, y, weight=w, reduction="sum"))(x), w * (x - y).sign())
    torch.testing.assert_close(
        vmap(lambda x, y, w: F.l1_loss(x, y, weight=w))(x, y, w), (w * (x - y).abs()).sum(1) / w.sum(1)
    )
    torch.testing.assert_close(vmap(lambda x, y: F.l1_loss(x, y))(x, y), (x - y).abs().mean(1))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="a later PyTorch has it")
@pytest.mark.parametrize("ignore_index", [None, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunked_linear_cross_entropy(reduction: str, ignore_index: int | None) -> None:
    labels = torch.tensor([0, 2, 1, 1, 0])
    chunks = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "options": nn.LinearCrossEntropyOptions(batch_chunk_size=2),
    }
    check_each(
        lambda x, a, b, w: F.linear_cross_entropy(x, a, labels, linear_bias=b, weight=w, **chunks),
        (some(5, 4), some(3, 4, seed=1), some(3, seed=2), positive(3)),
    )


def test_tangents_that_pytorch_would_drop() -> None:
    """An argument without a formula: reverse mode says so, and forward mode too."""
    x = positive(2, 3)
    inverse = lambda tolerances: torch.linalg.pinv(x, atol=tolerances[0], rtol=tolerances[1]).sum()
    with pytest.raises(NotImplementedError, match="'atol'"):
        jvp(inverse, (x[:, 0],), (x[:, 1],))
    with pytest.raises(RuntimeError, match="'atol'"):
        grad(inverse)(x[:, 0])


def test_the_weight_of_a_backward_operator() -> None:
    """PyTorch's own formulas know nothing of it; ours are traced."""
    x = positive(3) / 10
    slope = lambda w: torch.ops.aten.binary_cross_entropy_backward(x, x, x, w)
    check_each(slope, (positive(3, seed=4),))


# ---- weight norms


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm(dim: int, shape: tuple[int, ...]) -> None:
    if dim >= len(shape):
        return
    sizes = [n if d == dim % len(shape) else 1 for d, n in enumerate(shape)]
    args = some(*shape, seed=1), some(*sizes, seed=2)
    check_each(lambda v, g: torch._weight_norm(v, g, dim), args)
    if dim in (0, len(shape) - 1):
        check_each(lambda v, g: torch._weight_norm_interface(v, g, dim), args)


def test_weight_norm_figure() -> None:
    v, d, c, w = vector(0.7, -0.3), vector(1, 0.5), vector(0.9, -1.7), torch.full((1, 1), 1.3, dtype=torch.float64)
    f = lambda t: (c * torch._weight_norm((v + t * d + 0.3 * t * t).unsqueeze(0), w, 0)).sum()
    for mix in ("ff", "fr", "rf", "rr"):
        assert float(derivative(f, mix)(torch.tensor(0.2, dtype=torch.float64))) == pytest.approx(0.8589383, rel=1e-6)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hook", "parametrization"]
)
def test_modules_with_weight_norm(norm: Callable[..., Any], dim: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = norm(nn.Linear(3, 2).double(), dim=dim)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = some(5, 3)
    check_mixes(
        along(
            lambda *p: functional_call(layer, dict(zip(parameters, p, strict=True)), (x,)).tanh(),
            tuple(parameters.values()),
        ),
        radius=0.02,
    )


# ---- norms and products of zeros

NUMBERS = {
    "zeros": vector(0, 0, 0),
    "one zero": vector(0, 1.5, -2),
    "two zeros": vector(0.7, 0, 2, 0),
    "no zero": vector(0.7, -1.2, 2.1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_products_of_zeros(name: str) -> None:
    for dtype in (torch.float64, torch.complex128):
        x = NUMBERS[name].to(dtype)
        for f in (torch.prod, lambda x: x.prod(0, keepdim=True), lambda x: x.cumprod(0)):
            check_mixes(along(f, (x,)), order=4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("p", [2, 4, 6])
def test_even_norms_of_vectors_with_zeros(p: int, dtype: torch.dtype) -> None:
    for x in (NUMBERS["one zero"], NUMBERS["two zeros"], NUMBERS["no zero"]):
        check_mixes(along(lambda x: torch.linalg.vector_norm(x, p), (x.to(dtype),)), order=4, rtol=1e-3)


def test_norms_of_vectors_with_a_zero() -> None:
    """``|x| ** p`` has as many derivatives at 0 as fit below p."""
    t = torch.zeros((), dtype=torch.float64)
    for p, order in ((2.5, 2), (3, 2), (3.5, 3), (5, 3)):
        f = lambda t, p=p: torch.linalg.vector_norm(torch.stack([t, 1 + t]), p)
        expected = lambda t, p=p: (1 + t) * (1 + 0 * t)  # the term of the first number is of order p
        for mix in ("ff", "fr", "rf", "rr") + (("frf", "rrr", "fff") if order == 3 else ()):
            torch.testing.assert_close(derivative(f, mix)(t), derivative(expected, mix)(t))


@pytest.mark.parametrize("p", [1, 1.5, 2, 2.5, 3, 4, float("inf")])
def test_zero_vectors_have_slope_zero(p: float) -> None:
    """In every mix, and nothing of them reaches the rows beside them."""
    direction, row, zero = vector(1, 2, -3), vector(0.7, -1.2, 2.1), torch.zeros((), dtype=torch.float64)
    norms = lambda t: torch.linalg.vector_norm(torch.stack([t * direction, row + t * direction]), p, -1)
    check_mixes(lambda t: norms(t)[1])
    for mix in ("f", "r", "ff", "fr", "rf", "rr", "frf", "rrr"):
        assert float(derivative(lambda t: norms(t)[0], mix)(zero)) == 0


@pytest.mark.parametrize("f", [torch.var, torch.std], ids=["var", "std"])
def test_rows_that_do_not_vary(f: Callable[..., Any]) -> None:
    x = torch.stack([vector(2, 2, 2), vector(0.7, -1.2, 2.1)])
    if f is torch.var:
        check_mixes(along(lambda x: f(x, -1), (x,)))
    check_mixes(along(lambda x: f(x, -1)[1], (x,)))


def test_sums_of_no_exponentials() -> None:
    """A row, or a beginning, of -inf has no derivative to give, and leaves the others theirs."""
    rows, t = (
        torch.stack([vector(-float("inf"), -float("inf"), -float("inf")), vector(-float("inf"), 1, 0.5)]),
        vector(1, 2, 3),
    )
    for f in (lambda x: x.logsumexp(1)[1], lambda x: x.logcumsumexp(1)[1, 1:], lambda x: x.logcumsumexp(0)[1, 1:]):
        check_mixes(along(lambda s, f=f: f(rows + t * s), (vector(0.2).reshape(()),)))


def test_slices_of_zeros() -> None:
    rows = torch.stack([vector(0, 0, 0), vector(0.7, -1.2, 2.1), vector(0.1, 0.1, -0.1)])
    for f in (lambda x: x.renorm(2, 0, 0.5), F.normalize, lambda x: F.cosine_similarity(x, x.roll(1, 1))):
        check_mixes(along(lambda s, f=f: f(rows * (1 + s)), (vector(0.2).reshape(()),)))


@pytest.mark.parametrize("f", [torch.abs, torch.sgn, torch.angle], ids=["abs", "sgn", "angle"])
def test_complex_zeros(f: Callable[..., Any]) -> None:
    z = torch.complex(vector(0, 1.5), vector(0, -0.7))
    check_mixes(along(lambda s: f(z * torch.complex(1 + s, s)), (vector(0.2).reshape(()),)))


def test_running_sums_of_exponentials() -> None:
    for x in (some(4), some(4) * 100):
        check_mixes(along(lambda x: x.logcumsumexp(0), (x,)), rtol=1e-4)
        check_mixes(along(lambda x: x.logsumexp(0), (x,)), rtol=1e-4)


# ---- connectionist temporal classification

CTC_TARGETS = torch.tensor([[1, 2, 2], [3, 1, 0], [2, 0, 0]])
CTC_LENGTHS = (6, 5, 2), (3, 2, 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_ctc_loss(padded: bool, tensors: bool, reduction: str) -> None:
    """Equal labels side by side, sequences that are shorter than the input, and one without labels."""
    targets = (
        CTC_TARGETS if padded else torch.cat([row[:n] for row, n in zip(CTC_TARGETS, CTC_LENGTHS[1], strict=True)])
    )
    lengths = [torch.tensor(n) if tensors else n for n in CTC_LENGTHS]
    f = lambda x: F.ctc_loss(x.log_softmax(2), targets, *lengths, reduction=reduction)
    check_mixes(
        along(f, (some(6, 3, 4),)),
        order=3 if padded and not tensors and reduction == "sum" else 2,
        radius=0.05,
        rtol=1e-4,
        atol=1e-6,
    )


def test_ctc_loss_where_no_path_leads() -> None:
    """With zero_infinity it counts for nothing at any order; without, the gradient is PyTorch's NaN."""
    targets, lengths, x = torch.tensor([[1, 1, 1], [1, 2, 0]]), ((4, 4), (3, 2)), some(4, 2, 3)

    def f(x: Tensor, zero_infinity: bool) -> Tensor:
        return F.ctc_loss(x.log_softmax(2), targets, *lengths, reduction="sum", zero_infinity=zero_infinity)

    check_mixes(along(lambda x: f(x, True), (x,)), order=2, radius=0.05, rtol=1e-4, atol=1e-6)
    assert grad(lambda x: grad(lambda x: f(x, True))(x).sin().sum())(x)[:, 0].eq(0).all()
    assert grad(lambda x: grad(lambda x: f(x, False))(x).sin().sum())(x)[:, 0].isnan().all()


def test_ctc_loss_of_a_batch() -> None:
    """The product of the Hessian and a vector, with targets and lengths of each example."""
    x, v = some(2, 6, 3, 4), some(2, 6, 3, 4, seed=1)
    targets = torch.stack([CTC_TARGETS, CTC_TARGETS.flip(1).clamp(min=1)])
    ends, counts = torch.tensor([[6, 5, 2], [6, 6, 3]]), torch.tensor([[3, 2, 0], [2, 2, 1]])

    def product(x: Tensor, v: Tensor, targets: Tensor, ends: Tensor, counts: Tensor) -> Tensor:
        return jvp(grad(lambda x: F.ctc_loss(x.log_softmax(2), targets, ends, counts)), (x,), (v,))[1]

    rows = [product(*row) for row in zip(x, v, targets, ends, counts, strict=True)]
    torch.testing.assert_close(vmap(product)(x, v, targets, ends, counts), torch.stack(rows))
