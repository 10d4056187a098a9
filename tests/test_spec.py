"""The examples of the ``grad`` reference pages that the project started from, verbatim but for the import."""

from __future__ import annotations

import pytest
import torch
from plain import difference

import functrans


def test_first_and_second_derivative() -> None:
    from functrans import grad

    x = torch.randn([])
    cos_x = grad(lambda x: torch.sin(x))(x)
    assert torch.allclose(cos_x, x.cos())

    # Second-order gradients
    neg_sin_x = grad(grad(lambda x: torch.sin(x)))(x)
    assert torch.allclose(neg_sin_x, -x.sin())


def test_per_example_gradients() -> None:
    from functrans import grad, vmap

    batch_size, feature_size = 3, 5

    def model(weights, feature_vec):
        # Very simple linear model with activation
        assert feature_vec.dim() == 1
        return feature_vec.dot(weights).relu()

    def compute_loss(weights, example, target):
        y = model(weights, example)
        return ((y - target) ** 2).mean()  # MSELoss

    weights = torch.randn(feature_size, requires_grad=True)
    examples = torch.randn(batch_size, feature_size)
    targets = torch.randn(batch_size)
    inputs = (weights, examples, targets)
    grad_weight_per_example = vmap(grad(compute_loss), in_dims=(None, 0, 0))(*inputs)

    # d/dw (relu(w.e) - t)^2 = 2 (relu(w.e) - t) [w.e > 0] e
    activation = examples @ weights
    expected = (2 * (activation.relu() - targets) * (activation > 0)).unsqueeze(1) * examples
    torch.testing.assert_close(grad_weight_per_example, expected)

    # the weights require grad, so the result is recorded by autograd at the base
    assert grad_weight_per_example.grad_fn is not None
    direction = torch.randn(batch_size, feature_size)
    (grad_weight_per_example * direction).sum().backward()
    reference = weights.detach().clone().requires_grad_()
    rows = [
        torch.autograd.grad(compute_loss(reference, e, t), reference, create_graph=True)[0]
        for e, t in zip(examples, targets)
    ]
    (torch.stack(rows) * direction).sum().backward()
    assert not difference(grad_weight_per_example.detach(), torch.stack(rows).detach())
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad, reference.grad)


def test_has_aux_and_argnums() -> None:
    from functrans import grad

    def my_loss_func(y, y_pred):
        loss_per_sample = (0.5 * y_pred - y) ** 2
        loss = loss_per_sample.mean()
        return loss, (y_pred, loss_per_sample)

    fn = grad(my_loss_func, argnums=(0, 1), has_aux=True)
    y_true = torch.rand(4)
    y_preds = torch.rand(4, requires_grad=True)
    out = fn(y_true, y_preds)
    # > output is ((grads w.r.t y_true, grads w.r.t y_preds), (y_pred, loss_per_sample))

    (g_true, g_preds), (y_pred, loss_per_sample) = out
    residual = 0.5 * y_preds - y_true
    torch.testing.assert_close(g_true, -2 * residual / 4)
    torch.testing.assert_close(g_preds, residual / 4)
    torch.testing.assert_close(loss_per_sample, residual**2)
    torch.testing.assert_close(y_pred, y_preds)
    assert g_preds.requires_grad and loss_per_sample.requires_grad
    g_preds.sum().backward()
    torch.testing.assert_close(y_preds.grad, torch.full((4,), 0.125))


def f_with_no_grad(x):
    with torch.no_grad():
        c = x**2
    return x - c


def test_no_grad_inside_is_respected() -> None:
    x = torch.randn([])
    torch.testing.assert_close(functrans.grad(f_with_no_grad)(x), torch.ones([]))


def test_no_grad_outside_is_not() -> None:
    x = torch.randn([])
    with torch.no_grad():
        torch.testing.assert_close(functrans.grad(f_with_no_grad)(x), torch.ones([]))
        torch.testing.assert_close(functrans.grad(torch.sin)(x), x.cos())
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_higher_orders(order: int) -> None:
    f, x = torch.sin, torch.tensor(0.3, dtype=torch.float64)
    for _ in range(order):
        f = functrans.grad(f)
    torch.testing.assert_close(f(x), torch.sin(x + order * torch.pi / 2))
