# %% [markdown]
# # Influence functions: which images taught it that
#
# Had an image not been among the training data, how much would the loss on others differ? To first order it is
# `-g · H⁻¹ gᵢ`: two gradients around the inverse Hessian (Koh and Liang 2017). No second training is needed. The images
# are scikit-learn's threes and eights; the labels of a few are wrong.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from functrans import grad, hessian, vmap

torch.set_default_dtype(torch.float64)
digits = load_digits()
digit = torch.from_numpy(digits.target)
chosen = (digit == 3) | (digit == 8)
images, is_eight = torch.from_numpy(digits.data)[chosen] / 16, (digit[chosen] == 8).double()
assert 0.4 < is_eight.mean() < 0.6
draw = torch.Generator().manual_seed(0)
order = torch.randperm(len(images), generator=draw)
train, test = order[:160], order[160:]

labels = is_eight.clone()
wrong = train[:8]
labels[wrong] = 1 - labels[wrong]


def example_loss(weights, image, label):
    return F.binary_cross_entropy_with_logits(image @ weights, label)


def total_loss(weights, kept):
    losses = vmap(example_loss, in_dims=(None, 0, 0))(weights, images[train], labels[train])
    return (losses * kept).sum() + 0.5 * weights.square().sum()


def trained(kept, weights, steps):
    for _ in range(steps):
        weights = weights - torch.linalg.solve(hessian(total_loss)(weights, kept), grad(total_loss)(weights, kept))
    return weights


weights = trained(torch.ones(160), torch.zeros(64), 8)
assert grad(total_loss)(weights, torch.ones(160)).norm() < 1e-8

# %%
gradients = vmap(grad(example_loss), in_dims=(None, 0, 0))(weights, images[train], labels[train])


def test_loss(weights):
    return F.binary_cross_entropy_with_logits(images[test] @ weights, is_eight[test])


# without an image its gradient is missing, and the minimum moves by the inverse Hessian of it
moved = torch.linalg.solve(hessian(total_loss)(weights, torch.ones(160)), gradients.T).T
influence = moved @ grad(test_loss)(weights)

# %% [markdown]
# The truth is to train again without the image: here for each of the 160, as a batch of Newton's methods, and for two
# of them in plain PyTorch.

# %%
without = vmap(trained, in_dims=(0, None, None))(1 - torch.eye(160), weights, 3)
difference = vmap(test_loss)(without) - test_loss(weights)


def trained_in_plain_pytorch(kept):
    again = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([again], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(images[train][kept] @ again, labels[train][kept], reduction="sum")
        value = losses + 0.5 * again.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return again.detach()


for i in (0, 100):
    torch.testing.assert_close(without[i], trained_in_plain_pytorch(torch.arange(160) != i), atol=1e-5, rtol=1e-5)

assert torch.corrcoef(torch.stack([influence, difference]))[0, 1] > 0.98

# %% [markdown]
# An image that has to argue for itself against all others is suspicious: its influence on its own loss finds the wrong
# labels.

# %%
own = (moved * gradients).sum(1)
found = own.argsort(descending=True)[:8]
right = len(set(found.tolist()) & set(range(8)))
print(f"{right} of the 8 wrong labels are among the 8 images with the largest influence on themselves")
assert right >= 6

# %%
figure = plt.figure(figsize=(9, 4), layout="constrained")
grid = figure.add_gridspec(2, 6)
axes = figure.add_subplot(grid[:, :2])
flipped = torch.arange(160) < 8
axes.axline((0, 0), slope=1, color="tab:gray", linewidth=0.8)
axes.scatter(influence[~flipped], difference[~flipped], s=10, label="right label")
axes.scatter(influence[flipped], difference[flipped], s=16, marker="s", label="wrong label")
axes.set(xlabel="change of the test loss, predicted", ylabel="after training again without it")
axes.locator_params(nbins=4)
axes.legend(frameon=False)
for place, i in enumerate(found):
    axes = figure.add_subplot(grid[place // 4, 2 + place % 4])
    axes.imshow(images[train[i]].view(8, 8), cmap="gray_r")
    axes.set_title(f"labelled {8 if labels[train[i]] else 3}", fontsize=10, color="tab:red" if i < 8 else "black")
    axes.set_axis_off()
plt.show()
