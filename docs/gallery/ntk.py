# %% [markdown]
# # The neural tangent kernel
#
# How much does a step on one image change what a network says of another? To first order it is the product of two
# Jacobians, `J(a) J(b)ᵀ`: the network's *tangent kernel*. The images are scikit-learn's handwritten digits.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from functrans import functional_call, jacrev, jvp, vjp, vmap

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
digits = load_digits()
labels = torch.from_numpy(digits.target)
images = torch.from_numpy(digits.images).unsqueeze(1) / 16
chosen = torch.cat([(labels == digit).nonzero().squeeze(1)[:30] for digit in range(10)])

net = nn.Sequential(
    nn.Conv2d(1, 12, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(108, 32), nn.Tanh(), nn.Linear(32, 1)
)
params = {name: value.detach() for name, value in net.named_parameters()}


def output(params, image):
    return functional_call(net, params, (image.unsqueeze(0),)).squeeze()


def tangent_kernel(params, a, b):
    """The kernel between two batches of images."""
    rows = [vmap(jacrev(output), in_dims=(None, 0))(params, batch) for batch in (a, b)]
    return sum(rows[0][name].flatten(1) @ rows[1][name].flatten(1).T for name in params)


# %% [markdown]
# An entry by plain PyTorch is the product of two gradients. And without any Jacobian, the kernel is what `jvp` makes of
# what `vjp` returns: a column at a time, for networks whose Jacobian is too large.

# %%
kernel = tangent_kernel(params, images[chosen], images[chosen])


def gradient(image):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(net(image.unsqueeze(0)).squeeze(), tuple(net.parameters()))]
    )


for i, j in ((0, 0), (3, 200), (150, 299)):
    torch.testing.assert_close(kernel[i, j], gradient(images[chosen[i]]) @ gradient(images[chosen[j]]))


def outputs(params):
    return functional_call(net, params, (images[chosen],)).squeeze(1)


def times_kernel(vector):
    _, pullback = vjp(outputs, params)
    return jvp(outputs, (params,), pullback(vector))[1]


vector = torch.linspace(-1, 1, 300)
torch.testing.assert_close(times_kernel(vector), kernel @ vector)

# %% [markdown]
# A very wide network trains as regression with this kernel. Regression with the kernel of ours, *before* any training,
# already reads digits:

# %%
targets = nn.functional.one_hot(labels[chosen], 10).double() - 0.1
other = torch.tensor(sorted(set(range(len(labels))) - set(chosen.tolist())))
fitted = torch.linalg.solve(kernel + 1e-4 * kernel.diagonal().mean() * torch.eye(300), targets)
read = tangent_kernel(params, images[other], images[chosen]) @ fitted
accuracy = (read.argmax(1) == labels[other]).double().mean().item()
assert accuracy > 0.85
print(f"300 images to learn from, {accuracy:.1%} of the other {len(other)} read right")

# %%
scale = kernel.diagonal().rsqrt()
values = torch.linalg.eigvalsh(kernel).flip(0)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
shown = left.imshow(scale[:, None] * kernel * scale, cmap="viridis")
left.set_xticks(range(15, 300, 30), range(10))
left.set_yticks(range(15, 300, 30), range(10))
left.set_title("kernel between 300 images, by digit", fontsize=10)
figure.colorbar(shown, ax=left, shrink=0.8)
right.loglog(range(1, 301), values)
right.set(xlabel="eigenvalue", ylabel="size")
right.set_title("what the network learns first, and last", fontsize=10)
plt.show()
