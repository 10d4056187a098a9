"""Check entries of the derivative table against PyTorch's own autograd, with no transform involved.

The formulas are plain torch code, so an entry can be judged alone: its reverse formulas against
``torch.autograd.grad`` of the same operator, its tangent against forward AD (or reverse of reverse), and every higher
order by differentiating formula and native result alike. Calls to check it on are recorded from the OpInfo samples.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from recorder import Call, Recorder, before_autograd, copies, run_samples
from sampling import reseed
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from functrans.derivatives.table import DERIVATIVES, Derivative

DTYPES = (torch.float64, torch.complex128)
#: what a formula may never do: a wrapper tensor of a transform has no data to read, and shapes must not depend on it
FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.detach.default,
}


def recorded_calls(
    ops: Iterable[OpOverload] | None = None,
    *,
    dtypes: Iterable[torch.dtype] = DTYPES,
    per_op: int = 12,
    samples_per_opinfo: int | None = 24,
    opinfos: Iterable[str] | None = None,
) -> dict[OpOverload, list[Call]]:
    """The distinct calls of ``ops`` (default: all of the table) that the samples of the OpInfos make.

    At most ``per_op`` calls are kept of each operator and dtype, chosen evenly among those with different shapes and
    options; ``opinfos`` names the OpInfos to run (default: all).
    """
    wanted = set(DERIVATIVES if ops is None else ops)
    names = None if opinfos is None else set(opinfos)
    found: dict[tuple[OpOverload, torch.dtype], dict[str, Call]] = defaultdict(dict)
    for info in op_db:
        if names is not None and info.name not in names:
            continue
        for dtype in dtypes:
            if dtype not in info.supported_dtypes("cpu") or not info.supports_autograd:
                continue

            def keep(call: Call, dtype: torch.dtype = dtype) -> None:
                calls = found[call.op, dtype]
                if len(calls) < 10 * per_op and str(call) not in calls:
                    calls[str(call)] = Call(call.op, *copies(call.args, call.kwargs))

            run_samples(info, dtype, Recorder(wanted.__contains__, keep), samples_per_opinfo)
    choose = random.Random(0)
    result: dict[OpOverload, list[Call]] = defaultdict(list)
    for (op, _), calls in found.items():
        result[op].extend(choose.sample(list(calls.values()), min(per_op, len(calls))))
    return dict(result)


# ---------------------------------------------------------------------------------------------- one call


class _Bound:
    """A call with its arguments by name and its differentiable tensors made leaves."""

    def __init__(self, entry: Derivative, call: Call, native: Callable[..., Any] | None) -> None:
        self.entry = entry
        self.op = call.op
        self.native = native or call.op
        args, kwargs = copies(call.args, call.kwargs)
        schema = call.op._schema.arguments
        self.values: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.values.update(zip((a.name for a in schema), args, strict=False))
        self.values.update(kwargs)
        #: (argument, place in its list or None) of each leaf
        self.where: list[tuple[str, int | None]] = []
        self.leaves: list[torch.Tensor] = []
        for name in entry.formulas:
            value = self.values.get(name)
            items = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
            for i, item in items:
                if isinstance(item, torch.Tensor) and (item.is_floating_point() or item.is_complex()):
                    self.where.append((name, i))
                    self.leaves.append(item.requires_grad_())
        self.kwarg_only = {a.name for a in schema if a.kwarg_only}

    def run(self, replaced: dict[str, Any]) -> Any:
        values = {**self.values, **replaced}
        args = [values[a.name] for a in self.op._schema.arguments if a.name not in self.kwarg_only]
        return self.native(*args, **{n: values[n] for n in self.kwarg_only})

    def outputs(self, replaced: dict[str, Any] | None = None) -> tuple[Any, ...]:
        out = self.run(replaced or {})
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def replacing(self, items: list[torch.Tensor | None], only: str | None = None, fill: Any = None) -> dict[str, Any]:
        """Arguments by name, with ``items`` (one per leaf) in place of the leaves; ``fill`` makes what is missing."""
        new: dict[str, Any] = {}
        for (name, i), item, leaf in zip(self.where, items, self.leaves, strict=True):
            if only is not None and name != only:
                continue
            if item is None and fill is not None:
                item = fill(leaf)
            if i is None:
                new[name] = item
            else:
                new.setdefault(name, list(self.values[name]) if fill is not None else [None] * len(self.values[name]))[
                    i
                ] = item
        return new

    def reverse(self, outputs: tuple[Any, ...], cotangents: tuple[Any, ...]) -> list[torch.Tensor | None]:
        """The cotangent of each leaf by the entry's formulas, as an interpreter uses them."""
        known = dict(self.values, result=outputs[0], results=outputs, grad=cotangents[0], grads=cotangents)
        by_name = {}
        for name in dict.fromkeys(name for name, _ in self.where):
            by_name[name] = self.entry.formulas[name](*[known[n] for n in self.entry.needs[name]])
        answers = []
        for (name, i), leaf in zip(self.where, self.leaves, strict=True):
            answer = by_name[name] if i is None else by_name[name][i]
            if answer is not None and self.entry.pointwise:
                if leaf.dtype != answer.dtype:
                    answer = (answer if leaf.is_complex() or not answer.is_complex() else answer.real).to(leaf.dtype)
                answer = answer.sum_to_size(leaf.shape)
            answers.append(answer)
        return answers

    def tangent(self, outputs: tuple[Any, ...], tangents: list[torch.Tensor | None]) -> tuple[Any, ...]:
        """The tangents of the outputs by the entry, as an interpreter uses it."""
        rule = self.entry.tangent
        if rule == "elementwise":
            total = None
            for (name, _), tangent in zip(self.where, tangents, strict=True):
                if tangent is None:
                    continue
                known = dict(self.values, result=outputs[0], grad=tangent.conj())
                term = self.entry.formulas[name](*[known[n] for n in self.entry.needs[name]]).conj()
                total = term if total is None else total + term
            like = outputs[0]
            if total.is_complex() and not like.is_complex():
                total = total.real
            return (total.expand(like.shape).to(like.dtype),)
        if rule == "linear":
            return self.outputs(self.replacing(tangents, fill=torch.zeros_like))
        if rule == "multilinear":
            totals = None
            for (name, _), tangent in zip(self.where, tangents, strict=True):
                if tangent is not None:
                    terms = self.outputs(self.replacing(tangents, only=name, fill=torch.zeros_like))
                    totals = terms if totals is None else tuple(a + b for a, b in zip(totals, terms, strict=True))
            assert totals is not None
            return totals
        known = dict(self.values, result=outputs[0], results=outputs)
        known.update({f"{a}_t": None for a in self.entry.arguments})
        known.update({f"{n}_t": v for n, v in self.replacing(tangents).items()})
        answer = rule(*[known[n] for n in self.entry.needs["tangent"]])
        return tuple(answer) if isinstance(answer, (tuple, list)) else (answer,)


class _PurityCheck(TorchDispatchMode):
    """Refuse what a formula may not do when its values are another transform's wrappers."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op._schema.is_mutable or op in FORBIDDEN:
            raise AssertionError(f"a formula may not use {op}")
        return op(*args, **(kwargs or {}))


def check_entry(
    call: Call,
    entry: Derivative | None = None,
    *,
    order: int = 2,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    trust_nan: bool = True,
    trust_forward: bool = True,
    native: Callable[..., Any] | None = None,
) -> None:
    """Compare ``entry`` (default: that of the table) with PyTorch's own derivative on ``call``.

    Compared are the reverse formulas for every subset of outputs that matters (all of them, each alone), the tangent
    for all arguments and for each alone, and their derivatives up to ``order`` where PyTorch has them. A NaN of
    PyTorch's must be NaN here too; not so in derivatives of order 2 and more, where it often comes of 0 times infinity
    behind a mask, nor with ``trust_nan=False``. With ``trust_forward=False`` the tangent's reference is reverse mode
    used twice. ``native`` stands in for an operator that PyTorch itself cannot differentiate.

    Raises:
        AssertionError: a difference, a wrong shape or dtype, or an impure formula.
    """
    entry = entry or DERIVATIVES.get(call.op)
    assert entry is not None, f"{call.op} has no entry"
    reseed(1)
    bound = _Bound(entry, call, native)
    if not bound.leaves:
        return
    try:
        outputs = bound.outputs()
    except Exception:  # noqa: BLE001 - samples that are meant to fail
        return
    smooth = [i for i, o in enumerate(outputs) if isinstance(o, torch.Tensor) and o.requires_grad]
    close = _Closeness(rtol, atol, trust_nan, trust_forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_purity(bound, outputs, smooth, call)
        for chosen in [smooth] + ([[i] for i in smooth] if len(smooth) > 1 else []):
            if chosen:
                _check_reverse(bound, outputs, chosen, order, close, call)
        if entry.tangent is not None and smooth:
            whole = [torch.randn_like(x) for x in bound.leaves]
            _check_tangent(bound, whole, smooth, order, close, call)
            if len(whole) > 1:
                for i in range(len(whole)):
                    alone = [t if i == j else None for j, t in enumerate(whole)]
                    _check_tangent(bound, alone, smooth, 1, close, call)


def _check_purity(bound: _Bound, outputs: tuple[Any, ...], smooth: list[int], call: Call) -> None:
    def plain(x: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.detach(), x)

    still = _Bound.__new__(_Bound)
    still.__dict__.update(bound.__dict__, values=plain(bound.values), leaves=plain(bound.leaves))
    cotangents = tuple(torch.randn_like(o.detach()) if i in smooth else None for i, o in enumerate(outputs))
    if not smooth:
        return
    tangents: list[torch.Tensor | None] = [torch.randn_like(x) for x in still.leaves]
    outputs = plain(outputs)
    try:
        with torch.no_grad(), before_autograd(), _PurityCheck():
            still.reverse(outputs, cotangents)
            if bound.entry.tangent is not None:
                still.tangent(outputs, tangents)
    except AssertionError as e:
        raise AssertionError(f"{call}: {e}") from None


class _Closeness:
    def __init__(self, rtol: float, atol: float, trust_nan: bool, trust_forward: bool) -> None:
        self.trust_forward = trust_forward
        self.rtol = rtol
        self.atol = atol
        self.trust_nan = trust_nan

    def __call__(
        self, got: Any, expected: Any, like: torch.Tensor, what: str, exact: bool = True, first: bool = True
    ) -> None:
        got = torch.zeros_like(like) if got is None else got
        expected = torch.zeros_like(like) if expected is None else expected
        if exact:
            assert got.shape == like.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(like.shape)}"
            assert got.dtype == like.dtype, f"{what}: dtype {got.dtype}, expected {like.dtype}"
        if not (first and self.trust_nan):
            got = torch.where(expected.isnan(), expected, got)
        single = torch.finfo(expected.dtype).eps > 1e-10
        torch.testing.assert_close(
            got,
            expected,
            rtol=1e-4 if single else self.rtol,
            atol=1e-5 if single else self.atol,
            equal_nan=True,
            check_stride=False,
            msg=lambda m: f"{what}: {m}\ngot {got}\nexpected {expected}",
        )


def _check_reverse(
    bound: _Bound, outputs: tuple[Any, ...], chosen: list[int], order: int, close: _Closeness, call: Call
) -> None:
    given = [torch.randn_like(outputs[i]).detach().requires_grad_() for i in chosen]
    cotangents: list[Any] = [None] * len(outputs)
    for i, g in zip(chosen, given, strict=True):
        cotangents[i] = g
    native = torch.autograd.grad(
        [outputs[i] for i in chosen], bound.leaves, given, create_graph=True, allow_unused=True
    )
    ours = bound.reverse(outputs, tuple(cotangents))
    what = f"{call}, cotangents of outputs {chosen}" if len(outputs) > 1 else str(call)
    for (name, _), leaf, a, b in zip(bound.where, bound.leaves, ours, native, strict=True):
        close(a, b, leaf, f"{what}: cotangent of {name}")
    _check_higher(ours, native, given + bound.leaves, order, close, f"{what}: reverse")


def _check_tangent(
    bound: _Bound, tangents: list[torch.Tensor | None], smooth: list[int], order: int, close: _Closeness, call: Call
) -> None:
    outputs = bound.outputs()
    tangents = [None if t is None else t.detach().requires_grad_() for t in tangents]
    if close.trust_forward:
        native = _native_tangents(bound, outputs, tangents, smooth)
    else:
        native = dict(zip(smooth, _reverse_of_reverse(bound, outputs, tangents, smooth), strict=True))
    ours = bound.tangent(outputs, tangents)
    assert len(ours) == len(outputs), f"{call}: tangent gives {len(ours)} values for {len(outputs)} outputs"
    for i in smooth:
        close(ours[i], native[i], outputs[i].detach(), f"{call}: tangent of output {i}")
    if order < 2:
        return
    try:
        smooth_native = _reverse_of_reverse(bound, outputs, tangents, smooth)
    except (RuntimeError, NotImplementedError):
        return
    inputs = [t for t in tangents if t is not None] + bound.leaves
    _check_higher([ours[i] for i in smooth], smooth_native, inputs, order, close, f"{call}: tangent")


def _native_tangents(
    bound: _Bound, outputs: tuple[Any, ...], tangents: list[torch.Tensor | None], smooth: list[int]
) -> dict[int, Any]:
    try:
        with forward_ad.dual_level():
            duals = [
                x.detach() if t is None else forward_ad.make_dual(x.detach(), t.detach())
                for x, t in zip(bound.leaves, tangents, strict=True)
            ]
            new = bound.replacing(duals)  # type: ignore[arg-type]
            for name, value in new.items():
                if isinstance(value, list):
                    new[name] = [v if v is not None else w for v, w in zip(value, bound.values[name], strict=True)]
            results = bound.outputs(new)
            return {i: forward_ad.unpack_dual(results[i]).tangent for i in smooth}
    except (RuntimeError, NotImplementedError):
        found = _reverse_of_reverse(bound, outputs, tangents, smooth)
        return dict(zip(smooth, found, strict=True))


def _reverse_of_reverse(
    bound: _Bound, outputs: tuple[Any, ...], tangents: list[torch.Tensor | None], smooth: list[int]
) -> list[Any]:
    """The tangents of the outputs, from PyTorch's reverse mode used twice (differentiable itself)."""
    dummies = [torch.randn_like(outputs[i].detach()).requires_grad_() for i in smooth]
    pulled = torch.autograd.grad(
        [outputs[i] for i in smooth], bound.leaves, dummies, create_graph=True, allow_unused=True
    )
    pairs = [
        (p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None and p.requires_grad and t is not None
    ]
    if not pairs:
        return [None] * len(smooth)
    found = torch.autograd.grad(
        [p for p, _ in pairs], dummies, [t for _, t in pairs], create_graph=True, allow_unused=True
    )
    return list(found)


def _check_higher(ours: Any, native: Any, inputs: list[torch.Tensor], order: int, close: _Closeness, what: str) -> None:
    """Differentiate both by reverse mode, again and again, along the same random directions."""
    for k in range(2, order + 1):
        directions = [
            None if b is None and a is None else torch.randn_like(a if b is None else b).detach()
            for a, b in zip(ours, native, strict=True)
        ]
        try:
            theirs = _pull(native, directions, inputs)
        except (RuntimeError, NotImplementedError):  # PyTorch has no derivative of this order
            return
        ours = _pull(ours, directions, inputs)
        for i, (x, a, b) in enumerate(zip(inputs, ours, theirs, strict=True)):
            close(a, b, x, f"{what}, derivative {k} with respect to input {i}", first=False)
        native = theirs


def _pull(values: Any, directions: Any, inputs: list[torch.Tensor]) -> Any:
    pairs = [(v, d) for v, d in zip(values, directions, strict=True) if v is not None and v.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [v for v, _ in pairs], inputs, [d for _, d in pairs], create_graph=True, allow_unused=True
    )
