# %% [markdown]
# # Per-example gradients and DP-SGD
#
# The gradient of a batch's mean loss hides who asked for what. `vmap(grad(loss))` keeps the examples apart: written for
# one image, computed for all of them at once. The images are scikit-learn's handwritten digits.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from functrans import grad, vmap

torch.set_default_dtype(torch.float64)
digits = load_digits()
images = torch.from_numpy(digits.data) / 16
labels = torch.from_numpy(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]


def logits(params, image):
    return torch.tanh(image @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, image, label):
    return F.cross_entropy(logits(params, image), label)


def new_params():
    draw = torch.Generator().manual_seed(1)
    w1, w2 = torch.randn(64, 24, generator=draw) / 8, torch.randn(24, 10, generator=draw) / 5
    return {"w1": w1, "b1": torch.zeros(24), "w2": w2, "b2": torch.zeros(10)}


per_example = vmap(grad(loss), in_dims=(None, 0, 0))

# %% [markdown]
# In plain PyTorch the same takes a loop, with a backward pass for each image:

# %%
params = new_params()
gradients = per_example(params, images[:16], labels[:16])
leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
for i in range(16):
    one_by_one = torch.autograd.grad(loss(leaves, images[i], labels[i]), tuple(leaves.values()))
    for ours, theirs in zip(gradients.values(), one_by_one, strict=True):
        torch.testing.assert_close(ours[i], theirs)

# %% [markdown]
# *Differentially private SGD* clips each example's gradient to a norm of `clip`, adds noise of that size to the sum,
# and takes a step: no single image can move the weights far.


# %%
def norms(gradients):
    return sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def trained(private, steps=100, batch=300, clip=0.5, noise=4.0):
    rate = 2.0 if private else 0.5
    params, draw, accuracy = new_params(), torch.Generator().manual_seed(2), []
    for _ in range(steps):
        chosen = train[torch.rand(len(train), generator=draw) < batch / len(train)]
        gradients = per_example(params, images[chosen], labels[chosen])
        scale = (clip / norms(gradients)).clamp(max=1) if private else torch.ones(len(chosen))
        for name, g in gradients.items():
            total = torch.tensordot(scale, g, 1)
            if private:
                total += noise * clip * torch.randn(total.shape, generator=draw)
            params[name] = params[name] - rate * total / batch
        right = logits(params, images[test]).argmax(1) == labels[test]
        accuracy.append(right.double().mean().item())
    return params, accuracy


plain, plain_accuracy = trained(private=False)
private, private_accuracy = trained(private=True)
assert plain_accuracy[-1] > 0.93 and 0.8 < private_accuracy[-1] < plain_accuracy[-1]

# %% [markdown]
# The norms say which images a trained network still finds hard. Below: how accurate both networks become, how the norms
# of the one that was trained without privacy are spread, and its hardest images with their labels.

# %%
hardness = norms(per_example(plain, images[train], labels[train]))
hardest = train[hardness.argsort(descending=True)[:10]]

figure = plt.figure(figsize=(9, 4.6), layout="constrained")
grid = figure.add_gridspec(2, 10, height_ratios=(2.2, 1))
axes = figure.add_subplot(grid[0, :5])
axes.plot(plain_accuracy, label="SGD")
axes.plot(private_accuracy, label="DP-SGD")
axes.set(xlabel="step", ylabel="accuracy on 397 other images", ylim=(0, 1))
axes.legend(frameon=False)
axes = figure.add_subplot(grid[0, 5:])
axes.hist(hardness.log10().numpy(), bins=40, color="tab:gray")
axes.set(xlabel="log₁₀ of the gradient's norm", ylabel="images")
for column, index in enumerate(hardest):
    axes = figure.add_subplot(grid[1, column])
    axes.imshow(images[index].view(8, 8), cmap="gray_r")
    axes.set_title(str(labels[index].item()), fontsize=10)
    axes.set_axis_off()
plt.show()
