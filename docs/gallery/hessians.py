# %% [markdown]
# # Hessians: Newton's method and standard errors
#
# A logistic regression has few weights, so its Hessian is a small matrix, and says much: Newton's method divides by it,
# and its inverse at the optimum is the covariance of the weights. The data are scikit-learn's breast cancer
# measurements: for each of 569 tumours the means of ten properties of its cells.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from torch.nn import functional as F

from functrans import grad, hessian, hvp

torch.set_default_dtype(torch.float64)
data = load_breast_cancer()
measured = torch.from_numpy(data.data[:, :10].copy())
inputs = torch.cat([torch.ones(len(measured), 1), (measured - measured.mean(0)) / measured.std(0)], 1)
malignant = torch.from_numpy(1 - data.target).double()
names = ["constant", *(name.removeprefix("mean ") for name in data.feature_names[:10])]


def loss(weights):
    """The negative logarithm of the posterior, with a normal prior of variance 4 for each weight."""
    return F.binary_cross_entropy_with_logits(inputs @ weights, malignant, reduction="sum") + weights @ weights / 8


# %% [markdown]
# `hessian(loss)` is the derivative of the derivative. For this loss it is known in closed form, and PyTorch has a loop
# over backward passes:

# %%
weights = torch.linspace(-0.5, 0.5, 11)
matrix = hessian(loss)(weights)
p = torch.sigmoid(inputs @ weights)
torch.testing.assert_close(matrix, inputs.T @ ((p * (1 - p)).unsqueeze(1) * inputs) + torch.eye(11) / 4)
torch.testing.assert_close(matrix, torch.autograd.functional.hessian(loss, weights))

direction = torch.linspace(1, 2, 11)
_, (product,) = hvp(loss, (weights,), (direction,))
torch.testing.assert_close(product, matrix @ direction)

# %% [markdown]
# Newton's method against gradient descent with the largest step that is safe, one over the largest eigenvalue:


# %%
def descend(step, steps):
    weights, losses = torch.zeros(11), []
    for _ in range(steps):
        losses.append(loss(weights).item())
        weights = weights - step(weights)
    return weights, torch.tensor(losses)


def newton_step(weights):
    return torch.linalg.solve(hessian(loss)(weights), grad(loss)(weights))


steepest = 1 / torch.linalg.eigvalsh(hessian(loss)(torch.zeros(11)))[-1]
best, by_newton = descend(newton_step, 12)
_, by_gradient = descend(lambda weights: steepest * grad(loss)(weights), 200)
assert grad(loss)(best).norm() < 1e-9 and by_gradient[-1] > loss(best) + 1e-3

# %% [markdown]
# Newton is there after eight steps; gradient descent has a long way to go after 200. On the right the weights, with two
# standard errors each: the square roots of the diagonal of the inverse Hessian.

# %%
covariance = torch.linalg.inv(hessian(loss)(best))
errors = covariance.diagonal().sqrt()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.loglog(range(1, 201), by_gradient - loss(best), label="gradient descent")
left.loglog(range(1, 13), (by_newton - loss(best)).clamp(min=1e-13), "o-", label="Newton", markersize=4)
left.set(xlabel="step", ylabel="loss above the minimum")
left.legend(frameon=False)
right.errorbar(best, range(11), xerr=2 * errors, fmt="o", capsize=3, markersize=4)
right.axvline(0, color="tab:gray", linewidth=0.8)
right.set_yticks(range(11), names)
right.invert_yaxis()
right.set_xlabel("weight, ± 2 standard errors")
plt.show()
