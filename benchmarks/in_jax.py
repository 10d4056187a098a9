"""The workloads in JAX, each under one ``jax.jit``: the optional extra ``bench``.

The numbers are handed over through NumPy before anything is timed, and a call is over when its results are ready.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy
import torch
from cases import oscillator
from torch.utils import _pytree as pytree

jax: Any = None

if importlib.util.find_spec("jax") is not None:
    # One thread, as for the others, and no thread that only hands over: then the processor time of the process is the
    # time that a call takes (timing.py), with jax as well. XLA takes NPROC for the number of processors.
    os.environ["NPROC"] = "1"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of a GPU's memory, too
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_default_matmul_precision", "float32")  # not TF32
    jax.config.update("jax_enable_x64", True)  # for the comparison; what is given as float32 remains float32

Params = dict[str, Any]
IN_JAX: dict[str, Callable[..., Any]] = {}


def in_jax(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the version of the workloads of these names."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        IN_JAX.update(dict.fromkeys(names, function))
        return function

    return register


def usable(device: str) -> bool:
    """Whether JAX is installed and computes on the device."""
    return jax is not None and jax.default_backend() == {"cpu": "cpu", "cuda": "gpu"}[device]


class Compiled:
    """A function under ``jax.jit``, with its arguments in place."""

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], captured: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._jitted = jax.jit(function)
        self._args, self._kwargs = pytree.tree_map(to_jax, (tuple(args), dict(captured)))

    def __call__(self) -> Any:
        return jax.block_until_ready(self._jitted(*self._args, **self._kwargs))

    def result(self) -> Any:
        """What a call returns, as tensors."""
        return pytree.tree_map(_to_torch, self())

    def peak_memory(self) -> int:
        """Bytes of results and temporaries, by the compiler's own account: its plan is fixed before the call."""
        plan = self._jitted.lower(*self._args, **self._kwargs).compile().memory_analysis()
        return plan.output_size_in_bytes + plan.temp_size_in_bytes


def to_jax(value: Any) -> Any:
    return jnp.asarray(value.detach().cpu().numpy()) if isinstance(value, torch.Tensor) else value


def _to_torch(value: Any) -> torch.Tensor:
    return torch.from_numpy(numpy.array(value))


def _layers(params: Params) -> list[tuple[Any, Any]]:
    names = sorted({name.rpartition(".")[0] for name in params}, key=int)
    return [(params[f"{name}.weight"], params[f"{name}.bias"]) for name in names]


def _mlp(params: Params, x: Any) -> Any:
    *layers, (weight, bias) = _layers(params)
    for w, b in layers:
        x = jnp.tanh(x @ w.T + b)
    return x @ weight.T + bias


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def _convolutional(params: Params, image: Any) -> Any:
    (w1, b1), (w2, b2), (w3, b3) = _layers(params)

    def convolution(x: Any, weight: Any, bias: Any) -> Any:
        return jax.lax.conv(x[None], weight, (1, 1), "SAME")[0] + bias[:, None, None]

    def pool(x: Any) -> Any:
        channels, height, width = x.shape
        return x.reshape(channels, height // 2, 2, width // 2, 2).mean((2, 4))

    x = pool(jax.nn.relu(convolution(image, w1, b1)))
    x = pool(jax.nn.relu(convolution(x, w2, b2)))
    return w3 @ x.ravel() + b3


def _per_example(net: Callable[[Params, Any], Any]) -> Callable[..., Any]:
    def loss(params: Params, image: Any, label: Any) -> Any:
        return _cross_entropy(net(params, image), label)

    def gradients(params: Params, images: Any, labels: Any) -> Params:
        return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, images, labels)

    return gradients


in_jax("per-example gradients, MLP 784-256-256-10, batch 64")(_per_example(_mlp))
in_jax("per-example gradients, CNN, batch 32")(_per_example(_convolutional))


@in_jax("Hessian 64x64 of an MLP, one point")
def hessian_one(point: Any, params: Params) -> Any:
    return jax.hessian(lambda x: _mlp(params, x)[0])(point)


@in_jax("Hessian 64x64 of an MLP, 32 points")
def hessian_many(points: Any, params: Params) -> Any:
    return jax.vmap(jax.hessian(lambda x: _mlp(params, x)[0]))(points)


def _transformer_block(params: Params, x: Any, heads: int = 4) -> Any:
    def linear(name: str, x: Any) -> Any:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]

    batch, length, width = x.shape
    q, k, v = jnp.moveaxis(linear("qkv", norm("norm1", x)).reshape(batch, length, 3, heads, -1), 2, 0)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) * (width // heads) ** -0.5
    mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v).reshape(batch, length, width)
    x = x + linear("out", mixed)
    return x + linear("down", jax.nn.gelu(linear("up", norm("norm2", x)), approximate=False))


@in_jax("HVP of a transformer block")
def hvp_transformer(params: Params, direction: Params, x: Any) -> Params:
    gradient = jax.grad(lambda p: jnp.square(_transformer_block(p, x)).mean())
    return jax.jvp(gradient, (params,), (direction,))[1]


@in_jax("gradient of an ensemble of 10 MLPs")
def ensemble(stacked: Params, x: Any, labels: Any) -> Params:
    gradient = jax.grad(lambda params: _cross_entropy(_mlp(params, x), labels))
    return jax.vmap(gradient)(stacked)


@in_jax("jacrev R^256 -> R^256")
def jacobian(x: Any, weight: Any) -> Any:
    return jax.jacrev(lambda x: jnp.tanh(weight @ jnp.sin(x)))(x)


@in_jax("Laplacian of an MLP, 128 points of dim 16")
def laplacian(points: Any, params: Params) -> Any:
    return jax.vmap(lambda x: jnp.trace(jax.hessian(lambda x: _mlp(params, x)[0])(x)))(points)


@in_jax("NTK 16x16 by contraction")
def ntk_contraction(params: Params, left: Any, right: Any) -> Any:
    jacobians = jax.vmap(jax.jacrev(_mlp), in_axes=(None, 0))
    one, two = jacobians(params, left), jacobians(params, right)

    def contract(a: Any, b: Any) -> Any:
        return jnp.einsum("naf,mbf->nmab", a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1))

    return sum(contract(one[name], two[name]) for name in one)


@in_jax("NTK 16x16 by vjp and jvp products")
def ntk_products(params: Params, left: Any, right: Any) -> Any:
    def pair(x: Any, y: Any) -> Any:
        output, pullback = jax.vjp(lambda p: _mlp(p, x), params)

        def product(cotangent: Any) -> Any:
            return jax.jvp(lambda p: _mlp(p, y), (params,), pullback(cotangent))[1]

        return jax.vmap(product)(jnp.eye(output.size, dtype=output.dtype))

    return jax.vmap(lambda x: jax.vmap(lambda y: pair(x, y))(right))(left)


@in_jax("jvp with Python-number operands")
def numbers(x: Any, t: Any) -> Any:
    return jax.jvp(oscillator, (x,), (t,))
