# %% [markdown]
# # MAML: learning to learn from two images
#
# Model-agnostic meta-learning looks for weights from which a few steps of gradient descent on a few images lead far.
# The derivative that it needs goes through those steps: a `grad` of a `grad`, and a `vmap` over the tasks. A task here
# is to tell two digits apart, having seen one image of each; which digits, and which of them is called 1, differs from
# task to task. The images are scikit-learn's handwritten digits.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from functrans import grad, vmap

torch.set_default_dtype(torch.float64)
data = load_digits()
images, labels = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
known = [images[:1000][labels[:1000] == digit] for digit in range(10)]
new = [images[1000:][labels[1000:] == digit] for digit in range(10)]
draw = torch.Generator().manual_seed(0)


def logit(params, image):
    return torch.tanh(image @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, images, targets):
    return F.binary_cross_entropy_with_logits(logit(params, images), targets)


def new_params():
    return {
        "w1": torch.randn(64, 32, generator=draw) / 8, "b1": torch.zeros(32),
        "w2": torch.randn(32, generator=draw) / 6, "b2": torch.zeros(()),
    }  # fmt: skip


def adapted(params, images, targets, steps):
    """The weights after some steps on the images of one task."""
    for _ in range(steps):
        gradients = grad(loss)(params, images, targets)
        params = {name: value - 0.5 * gradients[name] for name, value in params.items()}
    return params


def after_adapting(params, few, few_targets, others, other_targets):
    return loss(adapted(params, few, few_targets, 2), others, other_targets)


# %% [markdown]
# A batch of tasks, each with images to learn from and others to be asked about.


# %%
def tasks(number, of_digit, few=1, others=15):
    def drawn(images):
        return images[torch.randperm(len(images), generator=draw)[: few + others]]

    pairs = [torch.randperm(10, generator=draw)[:2].tolist() for _ in range(number)]
    both = torch.stack([torch.stack([drawn(of_digit[digit]) for digit in pair]) for pair in pairs])
    targets = torch.tensor([0.0, 1.0])[:, None].expand(number, 2, few + others)
    parts = (both[:, :, :few], targets[:, :, :few], both[:, :, few:], targets[:, :, few:])
    return [part.flatten(1, 2) for part in parts]


meta_gradient = vmap(grad(after_adapting), in_dims=(None, 0, 0, 0, 0))

# %% [markdown]
# In plain PyTorch the steps are recorded with `create_graph=True`, one task after the other:

# %%
params, batch = new_params(), tasks(3, known)
gradients = meta_gradient(params, *batch)
for i in range(3):
    few, few_targets, others, other_targets = (part[i] for part in batch)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    moved = leaves
    for _ in range(2):
        steps = torch.autograd.grad(loss(moved, few, few_targets), tuple(moved.values()), create_graph=True)
        moved = {name: value - 0.5 * step for (name, value), step in zip(moved.items(), steps, strict=True)}
    by_hand = torch.autograd.grad(loss(moved, others, other_targets), tuple(leaves.values()))
    for ours, theirs in zip(gradients.values(), by_hand, strict=True):
        torch.testing.assert_close(ours[i], theirs)

# %% [markdown]
# Meta-training, and the accuracy on new images after 0, 1, 2, ... steps. For comparison the weights where it began, and
# ones that were trained on the same tasks without a thought of adapting (`grad(loss)`, the same number of steps).


# %%
def trained(params, gradient, steps=200):
    params = {name: value.clone() for name, value in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    for _ in range(steps):
        gradients = gradient(params, tasks(12, known))
        for name, value in params.items():
            value.grad = gradients[name].mean(0)
        optimizer.step()
    return params


few, few_targets, others, other_targets = tasks(200, new)


def accuracies(params, steps=6):
    def right(steps):
        def one(few, few_targets, others, other_targets):
            moved = adapted(params, few, few_targets, steps)
            return ((logit(moved, others) > 0) == (other_targets > 0)).double().mean()

        return vmap(one)(few, few_targets, others, other_targets).mean().item()

    return [right(n) for n in range(steps + 1)]


joint = vmap(grad(loss), in_dims=(None, 0, 0))
curves = {
    "meta-trained": accuracies(trained(params, lambda p, batch: meta_gradient(p, *batch))),
    "trained on the tasks together": accuracies(trained(params, lambda p, batch: joint(p, *batch[2:]))),
    "untrained": accuracies(params),
}
for name, curve in curves.items():
    print(f"{name}: {curve[2]:.1%} right after two steps")
assert curves["meta-trained"][2] > 0.05 + max(curve[2] for name, curve in curves.items() if name != "meta-trained")

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for name, curve in curves.items():
    axes.plot(curve, "o-", markersize=4, label=name)
axes.axvline(2, color="tab:gray", linewidth=0.8, linestyle="--")
axes.set(xlabel="steps on two images", ylabel="accuracy on other images", ylim=(0.4, 1))
axes.legend(frameon=False, loc="lower right")
plt.show()
