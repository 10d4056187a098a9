# %% [markdown]
# # An ensemble trained as one network
#
# Networks that start from different weights agree where there are data, and do not where there are none. `vmap` over
# the weights trains all of them at once. The data are scikit-learn's diabetes patients: how the disease of 150 of them
# had progressed after a year, by body mass index.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from functrans import functional_call, grad, stack_module_state, vmap

torch.set_default_dtype(torch.float64)
data = load_diabetes(scaled=False)
index = torch.from_numpy(data.data[:150, 2].copy()).unsqueeze(1)
progression = torch.from_numpy(data.target[:150].copy()).unsqueeze(1)
x, y = (index - index.mean()) / index.std(), (progression - progression.mean()) / progression.std()


def network():
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
    nn.init.normal_(net[0].weight, std=1.0)  # functions that bend
    nn.init.normal_(net[4].weight, std=0.4)
    return net


torch.manual_seed(0)
members = [network() for _ in range(20)]
params, buffers = stack_module_state(members)
template = network()


def loss(params, x, y):
    return (functional_call(template, params, (x,)) - y).square().mean()


# %% [markdown]
# The gradients of all members, beside those that each has on its own in plain PyTorch. Each member sees patients of its
# own, drawn with replacement (a bootstrap), so `x` and `y` have a dimension for the members too:

# %%
drawn = torch.randint(len(x), (len(members), len(x)), generator=torch.Generator().manual_seed(1))
gradients = vmap(grad(loss))(params, x[drawn], y[drawn])
for i, member in enumerate(members):
    alone = torch.autograd.grad((member(x[drawn[i]]) - y[drawn[i]]).square().mean(), tuple(member.parameters()))
    for ours, theirs in zip(gradients.values(), alone, strict=True):
        torch.testing.assert_close(ours[i], theirs)

# %% [markdown]
# Training: gradient descent with momentum, written once for the stacked weights.

# %%
velocity = {name: torch.zeros_like(value) for name, value in params.items()}
params = {name: value.detach() for name, value in params.items()}
for step in range(300):
    gradients = vmap(grad(loss))(params, x[drawn], y[drawn])
    for name in params:
        velocity[name] = 0.9 * velocity[name] - 0.05 * gradients[name]
        params[name] = params[name] + velocity[name]

shown = torch.linspace(14, 52, 200).unsqueeze(1)
at = (shown - index.mean()) / index.std()
predicted = vmap(lambda params: functional_call(template, params, (at,)))(params).squeeze(-1)
predicted = predicted * progression.std() + progression.mean()
among_patients = (shown.squeeze(1) > 20) & (shown.squeeze(1) < 35)
spread = predicted.std(0)
assert spread[~among_patients].max() > 2 * spread[among_patients].max()

# %%
figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
axes.scatter(index, progression, s=8, color="tab:gray", alpha=0.5, label="patients")
axes.plot(shown, predicted.T, color="tab:blue", linewidth=0.5, alpha=0.5)
axes.plot(shown, predicted.mean(0), color="tab:blue", linewidth=2, label="mean of 20 networks")
axes.fill_between(shown.squeeze(1), predicted.mean(0) - 2 * spread, predicted.mean(0) + 2 * spread, alpha=0.2)
axes.set(xlabel="body mass index", ylabel="progression after a year", ylim=(0, 400))
axes.legend(frameon=False, loc="upper left")
plt.show()
