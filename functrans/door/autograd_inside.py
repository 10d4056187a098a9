"""``torch.autograd.grad`` inside of transforms.

NOTE [Gradients inside]
A gradient of what levels know goes down the stack. Under vmap it is that of each example: of the whole batch, since the
examples do not depend on each other; by a tensor that they share, one example after the other. At a grad level the
gradient is differentiated in turn, or it is an error: NOTE [Gradients of gradients on one tape]. At a jvp level its
tangent is the gradient of the tangent. What is left at the base is PyTorch's: a graph of captured tensors that require
grad, or of those that ``requires_grad_()`` made leaves of inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import lift, scan
from functrans.core.errors import InsideTransformError
from functrans.core.errors.refusals import concrete, refuse
from functrans.core.interpreter import Interpreter
from functrans.core.subclasses import ones_for
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import STATE, lowered, running_at
from functrans.core.torch_private import without_torch_function
from functrans.door.torch_function import ENTRANCES, OF_ANY_TYPES
from functrans.interpreters.grad.again import CURE, pull_again, record_gradients
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter


def plain_if_constant(x: Any) -> Any:
    value = concrete(x) if type(x) is WrapperTensor else None
    return x if value is None else value


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """``torch.autograd.grad`` with a wrapper among its arguments."""
    options: dict[str, Any] = {
        "retain_graph": retain_graph,
        "create_graph": create_graph,
        "allow_unused": allow_unused,
        "is_grads_batched": is_grads_batched,
        "materialize_grads": materialize_grads,
    }
    if isinstance(inputs, dict):
        found = grad(outputs, tuple(inputs.values()), grad_outputs, **options)
        return dict(zip(inputs, found, strict=True))
    outs, ins = (list(x) if isinstance(x, list | tuple) else [x] for x in (outputs, inputs))
    if any(type(x) is WrapperTensor and x.interpreter.carries_autograd for x in (*outs, *ins)):
        # a derivative that is borrowed from PyTorch
        return without_torch_function(torch.autograd.grad, (), (outputs, inputs, grad_outputs), options)
    given = list(grad_outputs) if isinstance(grad_outputs, list | tuple) else [grad_outputs] * len(outs)
    plain_outs, plain_ins, plain_given = ([plain_if_constant(x) for x in xs] for xs in (outs, ins, given))
    top = STATE.top
    below = not any(type(x) is WrapperTensor for x in (*plain_outs, *plain_ins))
    if below and (top is None or any(not isinstance(x, Tensor) or x.requires_grad for x in plain_outs)):
        cotangents = None if grad_outputs is None else plain_given
        if any(type(x) is WrapperTensor for x in plain_given):
            # of the transforms, into which the formulas that the engine calls go, too
            return without_torch_function(torch.autograd.grad, (), (plain_outs, plain_ins, cotangents), options)
        with running_at(None):
            found = torch.autograd.grad(plain_outs, plain_ins, cotangents, **options)
        return tuple(g if g is None else lift(g, None, top) for g in found)
    if top is None:  # of a transform that has ended
        refuse(next(x for x in (*plain_outs, *plain_ins) if type(x) is WrapperTensor), "torch.autograd.grad", CURE)
    if is_grads_batched:
        raise InsideTransformError("torch.autograd.grad with is_grads_batched=True", top.name, "functrans.vmap")
    for out, c in zip(outs, given, strict=True):
        if c is None and out.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        if c is not None and c.shape != out.shape:
            raise RuntimeError(f"a cotangent of shape {tuple(c.shape)} for an output of shape {tuple(out.shape)}")
    given = [ones_for(out, *out.shape) if c is None else c for out, c in zip(outs, given, strict=True)]
    results = gradients(outs, ins, given, create_graph)
    if all(g is None for g in results) and not materialize_grads:
        cure = CURE
        if any(Tensor.requires_grad.__get__(x) for x in ins):  # type: ignore[attr-defined]
            cure = "x.requires_grad_() after x was made: requires_grad=True of what makes x is not seen"
        raise InsideTransformError("torch.autograd.grad of what has not been recorded", top.name, cure)
    if materialize_grads:
        results = [torch.zeros_like(x) if g is None else g for x, g in zip(ins, results, strict=True)]
    elif not allow_unused and any(g is None for g in results):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. "
            "Set allow_unused=True if this is the desired behavior."
        )
    return tuple(g if g is None else lift(g, scan([g])[0], top) for g in results)


def gradients(outs: list[Any], ins: list[Any], cotangents: list[Any], create: bool) -> list[Any]:
    """The gradients for ``ins``, each of the level that knows most of it; None where nothing depends on it."""
    level = scan([*outs, *ins])[0]
    if level is None:
        return at_the_base(outs, ins, cotangents, create)
    rule = next((RULES[kind] for kind in type(level).__mro__ if kind in RULES), None)
    if rule is None:
        raise InsideTransformError("torch.autograd.grad", level.name, CURE)
    with running_at(level):
        return rule(level, outs, ins, cotangents, create)


def at_the_base(outs: list[Tensor], ins: list[Tensor], cotangents: list[Any], create: bool) -> list[Any]:
    recorded = [(o, c) for o, c in zip(outs, cotangents, strict=True) if o.requires_grad]
    places = [i for i, x in enumerate(ins) if x.requires_grad]
    results: list[Any] = [None] * len(ins)
    if recorded and places:
        options: Any = {"create_graph": create, "retain_graph": True, "allow_unused": True}
        given = [o for o, _ in recorded], [ins[i] for i in places], [c for _, c in recorded]
        if scan(given[2])[0] is not None:
            found = without_torch_function(torch.autograd.grad, (), given, options)
        else:
            with running_at(None):
                found = torch.autograd.grad(*given, **options)
        for i, g in zip(places, found, strict=True):
            results[i] = g
    return results


def values_at(level: Interpreter, xs: Iterable[Any]) -> list[Any]:
    """What ``xs`` are one level down."""
    return [x.value if type(x) is WrapperTensor and x.interpreter is level else x for x in xs]


def added(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def vmap_rule(
    level: VmapInterpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], create: bool
) -> list[Any]:
    pairs = list(zip(outs, cotangents, strict=True))
    own = [i for i, x in enumerate(ins) if bdim_at(level, x) is not None]
    common = [i for i, x in enumerate(ins) if bdim_at(level, x) is None]
    varying: list[tuple[Any, Any]] = []
    alike: list[tuple[Any, Any]] = []
    for o, c in pairs:
        both = bdim_at(level, o), bdim_at(level, c)
        (alike if both == (None, None) else varying).append((o, c))
    results: list[Any] = [None] * len(ins)
    with lowered(level):
        if own:  # which what has no batch cannot depend on
            batched = [(o, of_batch(level, c, o)) for o, c in varying if bdim_at(level, o) is not None]
            given = values_at(level, [o for o, _ in batched]), values_at(level, [ins[i] for i in own])
            for i, g in zip(own, gradients(*given, [c for _, c in batched], create), strict=True):
                results[i] = None if g is None else level.batched(g, ins[i].bdim)
        if common:
            below = values_at(level, [ins[i] for i in common])
            given = values_at(level, [o for o, _ in alike]), values_at(level, [c for _, c in alike])
            for i, g in zip(common, gradients(given[0], below, given[1], create), strict=True):
                results[i] = None if g is None else level.constant(g)
            values, of_each = values_at(level, [o for o, _ in varying]), []
            for k in range(level.batch_size if varying else 0):  # each has a gradient of its own by what they share
                of_each.append(gradients(values, below, [of_one(level, o, c, k) for o, c in varying], create))
            for i, gs in zip(common, zip(*of_each, strict=True), strict=False):
                batch = None if gs[0] is None else level.batched(torch.stack(gs), 0)
                with running_at(level):
                    results[i] = added(results[i], batch)
    return results


def bdim_at(level: VmapInterpreter, x: Any) -> int | None:
    return x.bdim if type(x) is WrapperTensor and x.interpreter is level else None


def of_batch(level: VmapInterpreter, c: Any, like: WrapperTensor) -> Tensor:
    """The cotangent ``c`` of ``like``, for the whole batch."""
    if type(c) is WrapperTensor and c.interpreter is level:
        if c.bdim is not None:
            return c.value.movedim(c.bdim, like.bdim)
        c = c.value
    return c.unsqueeze(like.bdim).expand(like.value.shape)


def of_one(level: VmapInterpreter, out: Any, c: Any, k: int) -> Tensor:
    """The cotangent of example ``k`` alone, for the batch if ``out`` has one."""
    if bdim_at(level, out) is None:
        return c.value.select(c.bdim, k)
    whole = of_batch(level, c, out)
    return torch.zeros_like(whole).select_scatter(whole.select(out.bdim, k), out.bdim, k)


def jvp_rule(level: JvpInterpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], create: bool) -> list[Any]:
    """The tangent of a gradient by ``z`` is the gradient of the tangent, less its part by the tangent of ``z``."""
    tangent_of = lambda x: x.tangent if type(x) is WrapperTensor and x.interpreter is level else None
    values, below, given = (values_at(level, xs) for xs in (outs, ins, cotangents))
    moving = [(tangent_of(o), c) for o, c in zip(outs, given, strict=True) if tangent_of(o) is not None]
    of_cotangents = [(o, tangent_of(c)) for o, c in zip(values, cotangents, strict=True) if tangent_of(c) is not None]
    if (moving or of_cotangents) and (level.seeds is None or any(t.requires_grad for t in level.seeds)):
        what = "torch.autograd.grad along tangents that are no constants"
        raise InsideTransformError(what, level.name, "the tangents' detach(), or functrans.grad")
    with lowered(level):
        primals = gradients(values, below, given, create)
        tangents: list[Any] = [None] * len(ins)
        for pairs in (moving, of_cotangents):
            if pairs:
                found = gradients([o for o, _ in pairs], below, [c for _, c in pairs], create)
                tangents = list(map(added, tangents, found))
        for i, (x, g) in enumerate(zip(ins, primals, strict=True)):
            t = tangent_of(x)
            if t is not None and g is not None:
                (own,) = gradients([t], [below[i]], [-g], create)
                tangents[i] = added(tangents[i], own)
    return [None if p is None else level.dual(p, t) for p, t in zip(primals, tangents, strict=True)]


def grad_rule(
    level: GradInterpreter, outs: list[Any], ins: list[Any], cotangents: list[Any], create: bool
) -> list[Any]:
    recorded = [(o, c) for o, c in zip(outs, cotangents, strict=True) if level.index_of(o) is not None]
    others = [(o, c) for o, c in zip(outs, cotangents, strict=True) if level.index_of(o) is None]
    results: list[Any] = [None] * len(ins)
    further = [i for i, x in enumerate(ins) if level.index_of(x) is None]
    moving = [(o, c) for o, c in others if level.index_of(c) is not None]
    if (recorded or moving) and not create:
        what = "torch.autograd.grad of what depends on the arguments, without create_graph=True,"
        raise InsideTransformError(what, level.name, f"create_graph=True, or {CURE}")
    if recorded and type(level).pull is not GradInterpreter.pull:
        raise InsideTransformError("torch.autograd.grad past a way back of its own", level.name, CURE)
    if recorded and len(further) < len(ins):
        by_index: dict[Any, Any] = {}
        for o, c in recorded:
            by_index[o.tape_index] = by_index[o.tape_index] + c if o.tape_index in by_index else c
        found = pull_again(level, by_index, {level.index_of(x) for x in ins})
        results = [found.get(level.index_of(x)) for x in ins]  # type: ignore[arg-type]
    if further and (recorded or moving):
        pairs = [*recorded, *others]
        below = values_at(level, [ins[i] for i in further])
        ahead = lambda o, i, c: gradients(o, i, c, create=True)
        found_below = record_gradients(level, ahead, [o for o, _ in pairs], below, [c for _, c in pairs])
        for i, g in zip(further, found_below, strict=True):
            results[i] = g
    elif further and others:
        with lowered(level):
            values, given = (values_at(level, xs) for xs in zip(*others, strict=True))
            found_below = gradients(values, values_at(level, [ins[i] for i in further]), given, create)
        for i, g in zip(further, found_below, strict=True):
            results[i] = None if g is None else level.constant(g)
    return results


#: By kind of interpreter: from outputs, inputs, cotangents and create_graph to gradients of that level.
RULES: dict[type[Interpreter], Callable[..., list[Any]]] = {
    VmapInterpreter: vmap_rule,
    JvpInterpreter: jvp_rule,
    GradInterpreter: grad_rule,
}


ENTRANCES[torch.autograd.grad] = grad
OF_ANY_TYPES.add(torch.autograd.grad)
