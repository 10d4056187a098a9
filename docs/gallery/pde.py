# %% [markdown]
# # A PDE in the loss: heights between measurements
#
# Where heights were measured at a few places only, maps are drawn by *minimum curvature*: of all surfaces through the
# points, that which bends least, `Δ²u = 0` between them. With a network for the surface, `laplacian` puts the bending
# into the loss. The heights are those of the hills at Jacksboro, which come with Matplotlib.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.cbook import get_sample_data

from functrans import grad_and_value, laplacian, vmap

torch.set_default_dtype(torch.float64)
heights = torch.from_numpy(get_sample_data("jacksboro_fault_dem.npz")["elevation"][:240:4, :240:4].astype(float))
heights = (heights - heights.mean()) / heights.std()
side = torch.linspace(-1, 1, len(heights))
places = torch.cartesian_prod(side, side)  # 60 x 60 of them
draw = torch.Generator().manual_seed(0)
measured = torch.randperm(3600, generator=draw)[:250]
known_at, known = places[measured], heights.flatten()[measured]

params = {
    "w1": 4 * torch.randn(2, 48, generator=draw), "b1": 3 * torch.randn(48, generator=draw),
    "w2": torch.randn(48, 48, generator=draw) / 48**0.5, "b2": torch.zeros(48),
    "w3": torch.randn(48, generator=draw) / 48**0.5,
}  # fmt: skip


def surface(params, place):
    hidden = torch.sin(place @ params["w1"] + params["b1"])
    return torch.tanh(hidden @ params["w2"] + params["b2"]) @ params["w3"]


def bending(params, place):
    """The Laplacian of the surface at one place."""
    return laplacian(lambda place: surface(params, place))(place)


# %% [markdown]
# `laplacian` carries value, gradient and Laplacian forward together. Plain PyTorch takes two backward passes for each
# place:

# %%
some = places[::700]
ours = vmap(bending, in_dims=(None, 0))(params, some)
for place, found in zip(some, ours, strict=True):
    second = torch.autograd.functional.hessian(lambda at: surface(params, at), place)
    torch.testing.assert_close(found, second.trace())


# %%
def loss(params, weight, between):
    misfit = (surface(params, known_at) - known).square().mean()
    if weight == 0:
        return misfit
    return misfit + weight * vmap(bending, in_dims=(None, 0))(params, between).square().mean()


def fitted(weight, steps=250):
    """Adam; the places at which the bending is looked at are drawn anew in each step."""
    draw = torch.Generator().manual_seed(1)
    leaves = {name: value.clone() for name, value in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
    for _ in range(steps):
        gradients, _ = grad_and_value(loss)(leaves, weight, 2 * torch.rand(150, 2, generator=draw) - 1)
        for name, value in leaves.items():
            value.grad = gradients[name]
        optimizer.step()
    return surface(leaves, places).view(60, 60)


without, with_bending = fitted(0.0), fitted(1e-5)
errors = [(found - heights).square().mean().sqrt().item() for found in (without, with_bending)]
print(f"error at all places, in standard deviations: {errors[0]:.2f} without the PDE, {errors[1]:.2f} with it")
assert errors[1] < errors[0]

# %%
figure, all_axes = plt.subplots(1, 3, figsize=(9.5, 3.5), layout="constrained", sharey=True)
titles = ("the hills, and 250 measurements", "fitted to them", "fitted, with the PDE")
for axes, shown, title in zip(all_axes, (heights, without, with_bending), titles, strict=True):
    axes.imshow(shown, cmap="terrain", extent=(-1, 1, 1, -1), vmin=-3, vmax=3)
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])
all_axes[0].scatter(known_at[:, 1], known_at[:, 0], s=3, color="black")
plt.show()
