# %% [markdown]
# # Laplace approximation: a network that knows what it has not seen
#
# A classifier is as sure of itself far from all data as among them. Around the trained weights, the posterior is close
# to a normal distribution whose precision is the curvature of the loss; what follows for predictions is `J Σ Jᵀ`. The
# data are scikit-learn's wines from three cultivars, by two of their measurements.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_wine
from torch.nn import functional as F

from functrans import grad, hessian, jacrev, vmap

torch.set_default_dtype(torch.float64)
data = load_wine()
columns = [data.feature_names.index(name) for name in ("flavanoids", "color_intensity")]
measured, cultivar = torch.from_numpy(data.data[:, columns].copy()), torch.from_numpy(data.target)
inputs = (measured - measured.mean(0)) / measured.std(0)

SHAPES = {"w1": (2, 10), "b1": (10,), "w2": (10, 3), "b2": (3,)}


def logits(weights, x):
    """A network of 63 weights, which are one vector."""
    pieces = weights.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    w1, b1, w2, b2 = (piece.view(shape) for piece, shape in zip(pieces, SHAPES.values(), strict=True))
    return torch.tanh(x @ w1 + b1) @ w2 + b2


def loss(weights):
    return F.cross_entropy(logits(weights, inputs), cultivar, reduction="sum") + 0.1 * weights.square().sum()


weights = torch.randn(63, generator=torch.Generator().manual_seed(0))
momentum = torch.zeros(63)
for _ in range(500):
    momentum = 0.9 * momentum - 2e-3 * grad(loss)(weights)
    weights = weights + momentum
assert grad(loss)(weights).norm() < 0.5

# %% [markdown]
# The curvature, without its part that may be negative (Gauss-Newton): the Jacobian of each example's logits, around the
# Hessian of its loss by the logits.


# %%
def curvature(weights, x, label):
    jacobian = jacrev(logits)(weights, x)
    return jacobian.T @ hessian(F.cross_entropy)(logits(weights, x), label) @ jacobian


precision = vmap(curvature, in_dims=(None, 0, 0))(weights, inputs, cultivar).sum(0) + 0.2 * torch.eye(63)
covariance = torch.linalg.inv(precision)

by_loop = 0.2 * torch.eye(63)
for x in inputs:
    jacobian = torch.autograd.functional.jacobian(lambda w, x=x: logits(w, x), weights)
    p = torch.softmax(logits(weights, x), 0)
    by_loop += jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
torch.testing.assert_close(precision, by_loop)

# %% [markdown]
# The logits at a point have a covariance, too, and the larger it is the closer the probabilities are to one another.


# %%
def probabilities(x):
    """By the weights alone, and with their uncertainty (logits scaled down, after MacKay 1992)."""
    mean, jacobian = logits(weights, x), jacrev(logits)(weights, x)
    variance = torch.einsum("ki,ij,kj->k", jacobian, covariance, jacobian)
    return torch.softmax(mean, 0), torch.softmax(mean / (1 + torch.pi / 8 * variance).sqrt(), 0)


flavanoids, color = torch.linspace(-1, 8, 90), torch.linspace(-3, 20, 90)
points = torch.cartesian_prod(flavanoids, color)
alone, averaged = vmap(probabilities)((points - measured.mean(0)) / measured.std(0))
far = torch.tensor([8.0, 20.0])
sure, unsure = (p.max().item() for p in probabilities((far - measured.mean(0)) / measured.std(0)))
print(f"far from all wines: {sure:.0%} sure by the weights alone, {unsure:.0%} with their uncertainty")
assert sure > 0.9 and unsure < 0.8

# %%
figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
for axes, shown, title in zip(both, (alone, averaged), ("trained weights", "Laplace approximation"), strict=True):
    sureness = shown.max(1).values.view(90, 90).T
    filled = axes.contourf(flavanoids, color, sureness, levels=torch.linspace(1 / 3, 1, 11).tolist(), cmap="Greys")
    for kind, marker in enumerate("os^"):
        axes.scatter(*measured[cultivar == kind].T, s=12, marker=marker, edgecolor="white", linewidth=0.4)
    axes.set(title=title, xlabel="flavanoids")
both[0].set_ylabel("color intensity")
figure.colorbar(filled, ax=both, label="probability of the likeliest cultivar", format="%.1f")
plt.show()
