"""The independent oracle: the transforms from ``torch.autograd.grad`` and a Python loop, and exact comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from loop import for_each_alone
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


class Plain:
    """The same three transforms from ``torch.autograd.grad`` and a loop: the independent oracle."""

    @staticmethod
    def vjp(f: Callable[..., Any], *primals: Tensor) -> tuple[Any, Callable[..., Any]]:
        with torch.enable_grad():
            inputs = tuple(p.clone() if p.requires_grad else p.detach().clone().requires_grad_() for p in primals)
            # A function may write its argument: hand it a copy, and differentiate for the original.
            outputs = f(*(p.clone() for p in inputs))

        def pullback(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
            if not pairs:
                return tuple(torch.zeros_like(p) for p in inputs)
            outs, cots = zip(*pairs)
            with torch.enable_grad():
                return torch.autograd.grad(
                    outs, inputs, cots, create_graph=True, allow_unused=True, materialize_grads=True
                )

        return outputs, pullback

    @staticmethod
    def jvp(f: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        # J t as the derivative of u -> J^T u, which is linear in u.
        flat_primals, spec = tree_flatten(primals)
        flat_tangents = tree_flatten(tangents)[0]

        def flat_f(*leaves: Tensor) -> Any:
            return f(*tree_unflatten(list(leaves), spec))

        outputs, pullback = Plain.vjp(flat_f, *flat_primals)
        with torch.enable_grad():
            probes = tuple(torch.zeros_like(o).requires_grad_() for o in outputs)
            gradients = pullback(probes)
            pairs = [(g, t) for g, t in zip(gradients, flat_tangents) if g.requires_grad]
            if not pairs:
                return outputs, tuple(torch.zeros_like(o) for o in outputs)
            gs, ts = zip(*pairs)
            return outputs, torch.autograd.grad(
                gs, probes, ts, create_graph=True, allow_unused=True, materialize_grads=True
            )

    @staticmethod
    def vmap(f: Callable[..., Any], in_dims: Any = 0, randomness: str = "error") -> Callable[..., Any]:
        return for_each_alone(f, in_dims)


class PlainTransforms(Plain):
    """``Plain`` with all the transforms that programs use."""

    @staticmethod
    def vjp(f: Callable[..., Any], *primals: Tensor, has_aux: bool = False) -> Any:
        kept: list[Any] = []

        def outputs_only(*args: Tensor) -> tuple[Tensor, ...]:
            out = f(*args)
            if has_aux:
                out, aux = out
                kept.append(aux)
            return (out,)

        (out,), pullback = Plain.vjp(outputs_only, *primals)
        result = (out, lambda cotangent: pullback((cotangent,)))
        return (*result, kept[-1]) if has_aux else result

    @staticmethod
    def jvp(f: Callable[..., Any], primals: Any, tangents: Any, has_aux: bool = False) -> Any:
        kept: list[Any] = []

        def outputs_only(*args: Tensor) -> tuple[Tensor, ...]:
            out = f(*args)
            if has_aux:
                out, aux = out
                kept.append(aux)
            return (out,)

        (out,), (tangent,) = Plain.jvp(outputs_only, primals, tangents)
        return (out, tangent, kept[-1]) if has_aux else (out, tangent)

    @staticmethod
    def grad_and_value(f: Callable[..., Any], argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        def transformed(*args: Tensor) -> Any:
            picked = argnums if isinstance(argnums, tuple) else (argnums % len(args),)

            def of_picked(*values: Tensor) -> Any:
                full = list(args)
                for i, value in zip(picked, values):
                    full[i] = value
                return f(*full)

            out, pullback, *aux = PlainTransforms.vjp(of_picked, *(args[i] for i in picked), has_aux=has_aux)
            gradients = pullback(torch.ones_like(out))
            gradient = tuple(gradients) if isinstance(argnums, tuple) else gradients[0]
            return gradient, (out, aux[0]) if has_aux else out

        return transformed

    @staticmethod
    def grad(f: Callable[..., Any], argnums: Any = 0, has_aux: bool = False) -> Callable[..., Any]:
        def transformed(*args: Tensor) -> Any:
            gradient, value = PlainTransforms.grad_and_value(f, argnums, has_aux)(*args)
            return (gradient, value[1]) if has_aux else gradient

        return transformed

    @staticmethod
    def vmap(f: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, chunk_size: Any = None) -> Callable[..., Any]:
        def transformed(*args: Tensor) -> Any:
            dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
            out = Plain.vmap(f, in_dims=dims)(*args)
            if not isinstance(out_dims, tuple):
                return out.movedim(0, out_dims)
            return tuple(o[0] if d is None else o.movedim(0, d) for o, d in zip(out, out_dims))

        return transformed


class Numeric:
    """The outermost derivative by central differences, any inner one by ``inner``; for small problems."""

    STEP = 1e-5

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.inside = False
        self.vmap = Plain.vmap

    def call(self, f: Callable[..., Any], args: Any) -> list[Tensor]:
        self.inside = True
        try:
            return [t.detach() for t in tree_flatten(f(*tree_map(torch.clone, args)))[0]]
        finally:
            self.inside = False

    def along(self, f: Callable[..., Any], primals: Any, tangents: Any) -> list[Tensor]:
        ahead, behind = (
            self.call(f, tree_map(lambda p, t, s=sign: p + s * self.STEP * t, primals, tangents)) for sign in (1, -1)
        )
        return [(a - b) / (2 * self.STEP) for a, b in zip(ahead, behind)]

    def jvp(self, f: Callable[..., Any], primals: Any, tangents: Any) -> Any:
        if self.inside:
            return self.inner.jvp(f, primals, tangents)
        return tuple(self.call(f, primals)), tuple(self.along(f, primals, tangents))

    def vjp(self, f: Callable[..., Any], *primals: Tensor) -> Any:
        if self.inside:
            return self.inner.vjp(f, *primals)

        def pullback(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gradients = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in primals]
            for gradient in gradients:
                for i in range(gradient.numel()):
                    tangents = [torch.zeros_like(g) for g in gradients]
                    at = next(k for k, g in enumerate(gradients) if g is gradient)
                    tangents[at].view(-1)[i] = 1.0
                    moved = self.along(f, tuple(primals), tuple(tangents))
                    gradient.view(-1)[i] = sum((c.conj() * m).real.sum() for c, m in zip(cotangents, moved))
            return tuple(gradients)

        return tuple(self.call(f, primals)), pullback


def closer(got: Any, other: Any, numeric: Any) -> bool:
    """Whether ``got`` agrees with finite differences, and better than ``other`` does."""

    leaves = [tree_flatten(tree)[0] for tree in (got, other, numeric)]
    if any(len({(t.shape, t.layout) for t in same}) > 1 or same[0].layout != torch.strided for same in zip(*leaves)):
        return False

    def error(tree: Any) -> float:
        pairs = zip(tree_flatten(tree)[0], tree_flatten(numeric)[0])
        errors = [(a.detach() - n).abs().max() / n.abs().max().clamp(min=1.0) for a, n in pairs if n.numel()]
        return float(torch.stack(errors).max()) if errors else 0.0  # nan if one is, which Python's max would lose

    return error(got) < 1e-5 and not error(other) <= error(got)  # the other's may be nan


def difference(got: Any, expected: Any, relative_to_largest: float = 0.0) -> str:
    """Empty if equal in structure, type, dtype, shape and value; else what differs.

    ``relative_to_largest``: compare with an absolute tolerance of that times the largest expected entry.
    """
    got_leaves, got_spec = tree_flatten(got)
    expected_leaves, expected_spec = tree_flatten(expected)
    if got_spec != expected_spec:
        return f"structure {got_spec}, expected {expected_spec}"
    for i, (g, e) in enumerate(zip(got_leaves, expected_leaves)):
        if not isinstance(e, Tensor):
            if type(g) is not type(e) or g != e:
                return f"output {i} is {g!r}, expected {e!r}"
            continue
        if type(g) is not Tensor:
            return f"output {i} is a {type(g).__name__}, expected a Tensor"
        g, e = g.detach(), e.detach()
        if g.shape != e.shape or g.dtype != e.dtype or g.layout != e.layout:
            return f"output {i}: {g.dtype} {tuple(g.shape)} {g.layout}, expected {e.dtype} {tuple(e.shape)} {e.layout}"
        tolerance: dict[str, Any] = {}
        if relative_to_largest and e.numel():
            tolerance = {"rtol": 0.0, "atol": relative_to_largest * max(1.0, float(e.abs().max()))}
        try:
            torch.testing.assert_close(g, e, equal_nan=True, **tolerance)
        except AssertionError as error:
            return f"output {i}: " + " ".join(str(error).split())
    return ""
