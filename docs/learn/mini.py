"""functrans in miniature, as the lessons of docs/learn/ make it. Written by lessons.py."""

import contextlib
import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
TOP = None  # the innermost running interpreter; None: plain PyTorch


class Wrapper(torch.Tensor):
    """A tensor of one interpreter: a value, and what the interpreter says of it."""

    @staticmethod
    def __new__(cls, interpreter, value, shape=None, **said):
        if value.requires_grad:
            raise NotImplementedError("a tensor that PyTorch's own autograd follows: detach it first")
        self = torch.Tensor._make_wrapper_subclass(cls, value.shape if shape is None else shape, dtype=value.dtype)
        vars(self).update(interpreter=interpreter, value=value, **said)
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


def dispatch(op, args, kwargs):
    """Send an operator to the interpreter of the top level among its arguments; without one, to plain PyTorch."""
    owners = [x.interpreter for x in tree_leaves((args, kwargs)) if isinstance(x, Wrapper)]
    owners += [TOP] if TOP and torch.Tag.nondeterministic_seeded in op.tags else []  # without this
    owners.sort(key=lambda interpreter: interpreter.level)
    return owners[-1].process(op, args, kwargs) if owners else op(*args, **kwargs)


@contextlib.contextmanager
def at(level):
    """The code inside is of this level: that of an interpreter, or None for plain PyTorch."""
    global TOP
    before, TOP = TOP, level
    try:
        with contextlib.ExitStack() as stack:
            if level and not any(isinstance(mode, Door) for mode in _get_current_dispatch_mode_stack()):
                stack.enter_context(Door())
                stack.enter_context(torch._C._AutoDispatchBelowAutograd())  # without this
            yield
    finally:
        TOP = before


class Interpreter:
    """A running transform. ``process`` says what an operator means at its level."""

    def __init__(self, **said):
        self.below, self.level = TOP, TOP.level + 1 if TOP else 1
        vars(self).update(said)

    def run(self, function, *args):
        with at(self):
            return function(*args)

    def lower(self, function, *args, **kwargs):
        with at(self.below):
            return function(*args, **kwargs)

    def values(self, tree):
        return tree_map(lambda x: x.value if mine(self, x) else x, tree)

    def own(self, y):
        return y if mine(self, y) else self.constant(y)


def mine(level, x):
    """Whether an interpreter has wrapped ``x`` itself; all else is a constant to it."""
    answer = isinstance(x, Wrapper)
    answer = answer and x.interpreter is level  # without this
    return answer


class Jvp(Interpreter):
    def constant(self, value):
        return Wrapper(self, value, tangent=torch.zeros_like(value))

    def process(self, op, args, kwargs):
        tangents = {name: x.tangent for name, x in named(op, args, kwargs).items() if mine(self, x)}
        args, kwargs = self.values((args, kwargs))
        out = self.lower(op, *args, **kwargs)
        known = named(op, args, kwargs) | {"result": out}
        return Wrapper(self, out, tangent=self.lower(tangent_of, op, known, tangents))


def jvp(f, primals, tangents):
    """The value of ``f``, and its tangent for these tangents of the inputs."""
    level = Jvp()
    y = level.own(level.run(f, *(Wrapper(level, x, tangent=t) for x, t in zip(primals, tangents))))
    return y.value, y.tangent


class Grad(Interpreter):
    def constant(self, value):
        self.count += 1
        return Wrapper(self, value, tape_index=self.count)

    def process(self, op, args, kwargs):
        sources = {name: x.tape_index for name, x in named(op, args, kwargs).items() if mine(self, x)}
        args, kwargs = self.values((args, kwargs))
        y = self.constant(self.lower(op, *args, **kwargs))
        self.tape.append((op, named(op, args, kwargs) | {"result": y.value}, sources, y.tape_index))
        return y


def pull(tape, cotangents):
    """Walk a tape backwards; the cotangents of what it began with are left."""
    for op, known, sources, index in reversed(tape):
        if index in cotangents:
            known = known | {"grad": cotangents.pop(index)}
            for name, formula in DERIVATIVES[op][1].items():
                if name in sources:
                    found, source = apply(formula, known), sources[name]
                    found = sum_to(found, known[name].shape)  # without this
                    cotangents[source] = cotangents[source] + found if source in cotangents else found
    return cotangents


def grad(f):
    """The gradient of a function of one tensor whose result is a number."""

    def gradient(x):
        level = Grad(tape=[], count=0)
        start = level.constant(x)
        y = level.own(level.run(f, start))
        if y.dim():
            raise ValueError(f"grad of a function whose result has the shape {tuple(y.shape)}; expected a number")
        cotangents = pull(level.tape, {y.tape_index: torch.ones((), dtype=y.dtype)})
        return cotangents[start.tape_index] if start.tape_index in cotangents else torch.zeros_like(x)

    return gradient


def sum_back(grad, self, dim):
    summed = [d % self.dim() for d in dim or range(self.dim())]
    return grad.view([1 if d in summed else n for d, n in enumerate(self.shape)]).expand(self.shape)


DERIVATIVES = {
    aten.sin.default: ("elementwise", {"self": lambda grad, self: grad * self.cos()}),
    aten.cos.default: ("elementwise", {"self": lambda grad, self: -grad * self.sin()}),
    aten.tanh.default: ("elementwise", {"self": lambda grad, result: grad - grad * result * result}),
    aten.neg.default: ("elementwise", {"self": lambda grad: -grad}),
    aten.add.Tensor: ("elementwise", {"self": lambda grad: grad, "other": lambda grad, alpha: grad * alpha}),
    aten.sub.Tensor: ("elementwise", {"self": lambda grad: grad, "other": lambda grad, alpha: grad * -alpha}),
    aten.mul.Tensor: (
        "elementwise",
        {"self": lambda grad, other: grad * other, "other": lambda grad, self: grad * self},
    ),
    aten.sum.default: ("linear", {"self": lambda grad, self: grad.expand(self.shape)}),
    aten.sum.dim_IntList: ("linear", {"self": sum_back}),
    aten.expand.default: ("linear", {"self": lambda grad: grad}),
    aten.view.default: ("linear", {"self": lambda grad, self: grad.view(self.shape)}),
    **dict.fromkeys([aten.ones_like.default, aten.zeros_like.default, aten.rand.default], ("elementwise", {})),
}


def named(op, args, kwargs):
    """The arguments of a call by the names in the operator's schema."""
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    return defaults | dict(zip([a.name for a in op._schema.arguments], args)) | kwargs


def apply(formula, known):
    """Call a formula with what its parameters ask for."""
    return formula(*(known[name] for name in inspect.signature(formula).parameters))


def tangent_of(op, known, tangents):
    """The tangent of a result, from those of the arguments."""
    kind, formulas = DERIVATIVES[op]
    if kind == "linear":
        still = {name: torch.zeros_like(known[name]) for name in formulas if name not in tangents}
        return op(**{name: x for name, x in known.items() if name != "result"} | still | tangents)
    parts = [apply(formulas[name], known | {"grad": t}) for name, t in tangents.items() if name in formulas]
    return sum(parts, torch.zeros_like(known["result"]))


def sum_to(x, shape):
    """Undo broadcasting: sum over what a tensor of this shape was repeated along."""
    extra = x.dim() - len(shape)
    repeated = [d for d, n in enumerate(x.shape) if d < extra or n != shape[d - extra]]
    return x.sum(repeated).view(shape) if repeated else x


class Vmap(Interpreter):
    def batched(self, value):
        return Wrapper(self, value, value.shape[1:])

    def constant(self, value):
        return self.batched(value.expand(self.size, *value.shape))

    def process(self, op, args, kwargs):
        in_dims = [0 if mine(self, x) else None for x in args]
        args, kwargs = self.values((args, kwargs))
        return self.batched(self.lower(BATCHING[op], op, self.size, in_dims, *args, **kwargs))


def vmap(f):
    """``f`` for each example along the first dimension of its arguments."""

    def mapped(*args):
        level = Vmap(size=len(args[0]))
        y = level.run(f, *map(level.batched, args))
        y = level.own(y)  # without this
        return level.values(y)

    return mapped


def padded(x, rank):
    """A physical value with dimensions of size 1 behind the batch, up to this number of logical ones."""
    return x if x.dim() > rank else x.view(len(x), *[1] * (rank + 1 - x.dim()), *x.shape[1:])


def elementwise(op, size, in_dims, *args, **kwargs):
    """What is elementwise for one example is so for all of them."""
    rank = max(x.dim() - (d is not None) for x, d in zip(args, in_dims) if isinstance(x, torch.Tensor))
    args = [x if d is None else padded(x, rank) for x, d in zip(args, in_dims)]  # without this
    return op(*args, **kwargs)


def sum_rule(op, size, in_dims, x, dim=(), *keepdim):
    dims = [d % (x.dim() - 1) + 1 for d in dim or range(x.dim() - 1)]
    return x.sum(dims, *keepdim) if dims else x


BATCHING = {
    **{op: elementwise for op, (kind, _) in DERIVATIVES.items() if kind == "elementwise"},
    **dict.fromkeys([aten.sum.default, aten.sum.dim_IntList], sum_rule),
    aten.expand.default: lambda op, size, in_dims, x, shape: padded(x, len(shape)).expand(size, *shape),
    aten.view.default: lambda op, size, in_dims, x, shape: x.view(size, *shape),
    aten.rand.default: lambda op, size, in_dims, shape, **kwargs: op([size, *shape], **kwargs),
}


class Door(TorchDispatchMode):
    """Where operators come in that have no wrapper among their arguments."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})
