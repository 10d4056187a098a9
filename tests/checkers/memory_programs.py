"""Random programs of views and writes inside of nested transforms, beside the same programs without either.

A tensor of such a program is a set of places in a buffer. Which places a view has is found when the program is made, by
PyTorch itself: every tensor is shadowed by integers whose elements are their own places. The pure program reads by
indexing and writes by ``index_put``, and is transformed by torch.func; the other one is text with views, writes through
them and writes to arguments, for functrans.

    python tests/checkers/memory_programs.py --cases 2000 --seed 7   # a statistic
    python tests/checkers/memory_programs.py --seed 7 --show         # one program, and what differs
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import functrans
from functrans.errors import CapturedOnceError, InsideTransformError

F64 = torch.float64
SHAPES: list[tuple[int, ...]] = [(2, 3), (3,), (3, 2), ()]
LARGEST = 36

# ---- what a statement may be; {a} and {b} are read, {w} is written


UNARY = [
    "{a}.sin()", "torch.tanh({a})", "{a} * 0.7", "{a} * {a}", "{a}.clone()", "{a}.neg()", "torch.sigmoid({a})",
    "torch.where({a} > 0.1, {a}, {a} * 0.5)", "{a}.clone(memory_format=torch.contiguous_format)",
]  # fmt: skip
OF_VECTORS = [
    "{a}.cumsum(-1) * 0.5", "{a}.flip(0)", "{a}.sum(0)", "{a}.mean(-1, keepdim=True)", "{a}.softmax(-1)",
    "{a}.roll(1, 0)", "{a}[[0, -1]]", "{a}.amax(0)", "torch.cat([{a}, {a} * 0.5], -1)",
    "torch.stack([{a}, {a}.sin()], 1)", "{a}.repeat_interleave(2, 0)",
]  # fmt: skip
OF_MATRICES = ["torch.tril({a})", "{a} @ {a}.t() * 0.3", "{a}.t() * 0.5"]
BINARY = [
    "{a} + {b}", "{a} * {b}", "{a} - 0.5 * {b}", "torch.where({b} > 0, {a}, {b})", "torch.maximum({a}, {b})",
]  # fmt: skip
MADE = ["torch.zeros({shape}, dtype=F64)", "torch.ones_like({a})", "{a}.new_zeros({shape})"]

VIEWS = [
    "{a}.view_as({a})", "{a}[...]", "{a}.unsqueeze(0)", "{a}.unsqueeze(-1)", "{a}.contiguous()", "{a}[None]",
    "{a}.squeeze()", "{a}.view({a}.shape)",
]  # fmt: skip
VIEWS_OF_VECTORS = [
    "{a}[{i}]", "{a}[1:]", "{a}[::2]", "{a}.view(-1)", "{a}.reshape(-1)", "{a}.flatten()", "{a}.ravel()",
    "{a}.select({k}, -1)", "{a}.narrow({k}, 0, 1)", "{a}[..., -1:]", "{a}.chunk(2, {k})[-1]", "{a}.unbind({k})[-1]",
    "{a}.split(1, {k})[0]", "{a}.tensor_split(2, {k})[0]", "{a}.unfold({k}, 2, 1)", "{a}.movedim(0, -1)",
    "{a}.view(-1, 1)", "torch.atleast_2d({a})", "torch.einsum('...->...', {a})", "{a}.expand(2, {shape_})",
]  # fmt: skip
VIEWS_OF_MATRICES = [
    "{a}.mT", "{a}.transpose(0, -1)", "{a}.diagonal()", "{a}.diagonal(1, 0, -1)", "{a}[:, 1:]", "{a}[:, 0]",
    "{a}[1:].mT", "{a}.flatten(0, 1)", "{a}.unflatten(-1, (1, -1))", "{a}.swapaxes(0, 1)", "{a}.view({last}, -1)",
    "{a}.reshape({last}, -1)", "{a}.mT.reshape(-1)", "{a}.mT.ravel()", "{a}.mT.contiguous()",
]  # fmt: skip

#: In place, and what is there afterwards. {row} and {like} are tensors of the shape of {w}[0] and of {w}.
WRITES = [
    ("{w}.fill_(0.3)", "torch.full_like({w}, 0.3)"), ("{w}.zero_()", "torch.zeros_like({w})"),
    ("{w}.mul_(0.6)", "{w} * 0.6"), ("{w}.sin_()", "{w}.sin()"), ("{w}.mul_({w})", "{w} * {w}"),
    ("{w}[...] = 0.7 * {w}", "{w} * 0.7"), ("{w}.add_({a})", "{w} + {a}"), ("{w}.mul_({a})", "{w} * {a}"),
    ("{w}.copy_({a})", "{a}.expand({w}.shape)"), ("{w}[...] = {a}", "{a}.expand({w}.shape)"),
    ("{w}.sub_({a}, alpha=0.5)", "{w} - 0.5 * {a}"), ("{w}.addcmul_({a}, {a}, value=0.3)", "{w} + 0.3 * {a} * {a}"),
    ("torch.add({w}, {a}, out={w})", "{w} + {a}"), ("{w}.view_as({w}).add_({a})", "{w} + {a}"),
    ("torch.ops.aten.mul_.Tensor({w}, {a})", "{w} * {a}"), ("torch.mul({like}, 0.7, out={w})", "{like} * 0.7"),
    ("{w}.lerp_({like}, 0.3)", "torch.lerp({w}, {like}, 0.3)"),
]  # fmt: skip
WRITES_OF_VECTORS = [
    ("{w}[{w} > 0.2] = 0.1", "torch.where({w} > 0.2, torch.full_like({w}, 0.1), {w})"),
    ("{w}[0] = 0.15", "{w}.index_fill(0, FIRST, 0.15)"),
    ("{w}.index_fill_(0, FIRST, 0.4)", "{w}.index_fill(0, FIRST, 0.4)"),
    ("{w}.cumsum_(0)", "{w}.cumsum(0)"), ("{w}[1:].mul_(0.3)", "torch.cat([{w}[:1], {w}[1:] * 0.3])"),
    ("{w}[-1] = {row}", "torch.cat([{w}[:-1], {row}[None]])"),
    ("{w}[0].add_({row})", "torch.cat([({w}[0] + {row})[None], {w}[1:]])"),
    ("{w}[torch.tensor(0)] = {row}", "torch.cat([{row}[None], {w}[1:]])"),
    ("{w}.index_put_((FIRST,), {row}[None])", "torch.cat([{row}[None], {w}[1:]])"),
    ("{w}.index_copy_(0, FIRST, {row}[None])", "torch.cat([{row}[None], {w}[1:]])"),
    ("{w}.index_add_(0, FIRST, 2 * {row}[None])", "torch.cat([({w}[0] + 2 * {row})[None], {w}[1:]])"),
    ("{w}.masked_scatter_({w} > 0, {like})", "{w}.masked_scatter({w} > 0, {like})"),
    ("{w}.put_(FIRST, {like}.reshape(-1)[:1])", "{w}.put(FIRST, {like}.reshape(-1)[:1])"),
]  # fmt: skip
WRITES_OF_MATRICES = [
    ("{w}.tril_()", "{w}.tril()"), ("{w}.t().mul_(0.4)", "{w} * 0.4"),
    ("{w}[:, 0] = 0.45", "{w}.index_fill(1, FIRST, 0.45)"),
    ("{w}.diagonal().add_(0.3)", "{w} + 0.3 * torch.eye(*{w}.shape, dtype=F64)"),
]  # fmt: skip


@dataclass
class Known:
    """A tensor of a program: ``shadow`` has the strides that it has, and its places for elements."""

    name: str
    shadow: Tensor
    buffer: Any
    level: int
    writable: bool = True

    @property
    def rank(self) -> int:
        return self.shadow.dim()

    def distinct(self) -> bool:
        """Whether no two elements have one place: only then may it be written."""
        return self.shadow.unique().numel() == self.shadow.numel()


def numbers_like(shadow: Tensor) -> Tensor:
    return torch.empty_strided(shadow.shape, shadow.stride(), dtype=F64).fill_(0.5)


def places_of(x: Tensor) -> Tensor:
    """The shadow of a new tensor with the strides of ``x``."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
    return torch.arange(last + 1).as_strided(x.shape, x.stride())


def fits(shape: Sequence[int], target: Sequence[int]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(shape, target)) == tuple(target)
    except RuntimeError:
        return False


@dataclass
class Text:
    """The two programs, line by line."""

    real: list[str] = field(default_factory=list)
    pure: list[str] = field(default_factory=list)

    def add(self, real: str, pure: str) -> None:
        self.real.append(real)
        self.pure.append(pure)


class Generator:
    """Writes one program, and the table of places that its pure form refers to."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.places: list[Tensor] = []
        self.depth = self.random.choice([1, 2, 2, 3, 3])
        self.count = self.nests = 0
        #: buffers of arguments around: what they are called outside is neither written while they are in use nor, if
        #: they are written, read
        self.unwritten: set[Any] = set()
        self.unread: set[Any] = set()

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def index(self, shadow: Tensor) -> str:
        self.places.append(shadow.clone(memory_format=torch.contiguous_format))
        return f"PLACES[{len(self.places) - 1}]"

    def pick(self, scope: list[Known], level: int, allowed: Callable[[Known], bool] = lambda t: True) -> Known | None:
        found = [t for t in scope if t.buffer not in self.unread and allowed(t)]
        mine = [t for t in found if t.level == level]
        return self.random.choice(mine if mine and self.random.random() < 0.7 else found) if found else None

    def statement(self, scope: list[Known], level: int, text: Text) -> None:
        source = self.pick(scope, level)
        assert source is not None
        kind = self.random.random()
        if kind < 0.35:
            templates = VIEWS + VIEWS_OF_VECTORS * (source.rank > 0) * 2 + VIEWS_OF_MATRICES * (source.rank > 1) * 2
            self.computed(scope, level, text, source, None, self.random.choice(templates))
        elif kind < 0.65:
            self.write(scope, level, text)
        elif kind < 0.72 and level < self.depth:
            self.transform(scope, level + 1, text)
        else:
            templates = UNARY + BINARY * 2 + OF_VECTORS * (source.rank > 0) + OF_MATRICES * (source.rank == 2) + MADE
            self.computed(scope, level, text, source, self.pick(scope, level), self.random.choice(templates))

    def computed(self, scope: list[Known], level: int, text: Text, a: Known, b: Known | None, template: str) -> None:
        """A new tensor, or a view of ``a``: PyTorch says which, of the shadow."""
        shape = tuple(a.shadow.shape)
        dim = self.random.randrange(max(a.rank, 1))
        holes = {"i": self.random.randrange(max(shape[0], 1)) if shape else 0, "k": dim, "shape": shape}
        holes |= {"shape_": ", ".join(["-1"] * a.rank), "last": shape[-1] if shape else 1}
        filled = lambda a, b: template.format(a=a, b=b, **holes)
        space = {"torch": torch, "F64": F64}
        shadow = None
        try:
            if "{b}" not in template and not template.startswith("torch.einsum"):
                shadow = eval(filled("a", ""), {**space, "a": a.shadow})
            # of numbers, for functions that integers have not
            numbers = {"a": numbers_like(a.shadow), "b": None if b is None else numbers_like(b.shadow)}
            result = eval(filled("a", "b"), {**space, **numbers})
        except (RuntimeError, IndexError, ValueError):
            if shadow is None:
                return
            result = None
        if template.startswith("torch.einsum"):
            shadow = a.shadow
        shares = shadow is not None and same_memory(shadow, a.shadow)
        if not shares and result is None:
            return
        if not 0 < (shadow if shares else result).numel() <= LARGEST:
            return
        name = self.name("v" if shares else "h")
        real = f"{name} = {filled(a.name, '' if b is None else b.name)}"
        if shares:
            scope.append(Known(name, shadow, a.buffer, a.level, a.writable))
            text.add(real, f"{name} = Places({a.name}.buffer, {self.index(shadow)})")
        else:
            made = Known(name, places_of(result), self.name("buffer"), level)
            scope.append(made)
            value = filled(f"{a.name}.read()", "" if b is None else f"{b.name}.read()")
            text.add(real, f"{name} = new({value}, {self.index(made.shadow)})")

    def write(self, scope: list[Known], level: int, text: Text) -> None:
        """In place, now and then to a tensor of a level around: with values of that level or those around it."""
        outer = self.random.random() < 0.06

        def writable(t: Known) -> bool:
            mine = t.level < level if outer else t.level == level
            return mine and t.writable and t.buffer not in self.unwritten and t.distinct()

        target = self.pick(scope, level, writable)
        if target is None:
            return
        shape = target.shadow.shape

        def other(fitting: Callable[[Any], bool]) -> Known | None:
            def allowed(t: Known) -> bool:
                return t.buffer != target.buffer and fitting(t.shadow.shape) and (not outer or t.level <= target.level)

            return self.pick(scope, level, allowed)

        sources = {
            "a": other(lambda s: fits(s, shape)), "row": other(lambda s: s == shape[1:]), "like": other(shape.__eq__)
        }  # fmt: skip
        rank = target.rank
        pairs = (
            WRITES * 2 + WRITES_OF_VECTORS * (rank > 0) * (not outer) + WRITES_OF_MATRICES * (rank == 2) * (not outer)
        )
        pairs = [p for p in pairs if all(s is not None or f"{{{name}}}" not in p[0] for name, s in sources.items())]
        real, pure = self.random.choice(pairs)
        names = {name: "" if s is None else s.name for name, s in sources.items()} | {"w": target.name}
        value = pure.format(**{hole: f"{name}.read()" for hole, name in names.items()})
        text.add(real.format(**names), f"{target.name}.write({value})")

    def transform(self, scope: list[Known], level: int, text: Text) -> None:
        """A function of one tensor, transformed; what it writes to its argument reaches the caller's."""
        kind = self.random.choice(["grad", "grad_and_value", "vjp", "jvp", "vmap", "vmap"])
        given = self.pick(scope, level - 1, lambda t: t.distinct() and (kind != "vmap" or 0 < t.rank < 4))
        if given is None:
            return
        self.nests += 1
        dim = self.random.randrange(given.rank) if kind == "vmap" else 0
        shadow = given.shadow.select(dim, 0) if kind == "vmap" else given.shadow
        mine = given.level == level - 1 and given.writable and given.buffer not in self.unwritten
        writes = mine and self.random.random() < 0.35
        f, result = self.name("f"), self.name("r")
        argument = Known(self.name("x"), shadow, self.name("argument"), level, writes)
        before = self.unwritten, self.unread
        self.unwritten, self.unread = (
            self.unwritten | {given.buffer},
            self.unread | ({given.buffer} if writes else set()),
        )
        inner, body = [*scope, argument], Text()
        for _ in range(self.random.randint(2, 6)):
            self.statement(inner, level, body)
        own = [t for t in inner if t.level == level and t.buffer not in self.unread]
        self.unwritten, self.unread = before
        shown = self.random.sample(own, min(len(own), 3))
        shown += [argument] * (argument not in shown)
        scalar = kind.startswith("grad")
        returned = []
        for read in ("{}", "{}.read()"):
            names = [read.format(t.name) for t in shown]
            sums = " + ".join(f"({n} * weights({n})).sum() * 0.{3 + k}" for k, n in enumerate(names))
            returned.append(sums if scalar else f"{names[0]} * (1 + 0.1 * ({sums}))")
        x = argument.name
        text.real += [f"def {f}({x}):", *("    " + line for line in body.real), f"    return {returned[0]}"]
        text.pure += [f"def {f}(value):", f"    {x} = new(value, {self.index(shadow)})"]
        text.pure += [*("    " + line for line in body.pure), f"    return {returned[1]}, {x}.read()"]
        name, value = given.name, f"{given.name}.read()"
        shape: Sequence[int] = given.shadow.shape
        if kind == "vmap":
            shape = list(shown[0].shadow.shape)
            out = self.random.randrange(len(shape) + 1)
            shape.insert(out, given.shadow.shape[dim])
            in_dim, out_dim = (self.random.choice([d, d - n]) for d, n in ((dim, given.rank), (out, len(shape))))
            real = f"{result} = F.vmap({f}, in_dims={in_dim}, out_dims={out_dim})({name})"
            pure = f"{result}, last = F.vmap({f}, in_dims={in_dim}, out_dims=({out_dim}, {in_dim}))({value})"
        elif kind == "grad":
            real, pure = f"{result} = F.grad({f})({name})", f"{result}, last = F.grad({f}, has_aux=True)({value})"
        elif kind == "grad_and_value":
            real = f"{result}, y = F.grad_and_value({f})({name}); {result} = {result} * y"
            pure = f"{result}, (y, last) = F.grad_and_value({f}, has_aux=True)({value}); {result} = {result} * y"
        elif kind == "vjp":
            after = f"{result} = pullback(weights(y))[0] + 0.3 * y.sum()"
            real = f"y, pullback = F.vjp({f}, {name}); {after}"
            pure = f"y, pullback, last = F.vjp({f}, {value}, has_aux=True); {after}"
        else:
            shape = shown[0].shadow.shape
            real = f"y, t = F.jvp({f}, ({name},), (weights({name}),)); {result} = y * 0.5 + t"
            pure = f"y, t, last = F.jvp({f}, ({value},), (weights({value}),), has_aux=True); {result} = y * 0.5 + t"
        text.add(real, pure)
        made = Known(self.name("h"), places_of(torch.empty(list(shape))), self.name("buffer"), level - 1)
        text.add(
            f"{made.name} = {result}.clone(memory_format=torch.contiguous_format)",
            f"{made.name} = new({result}, {self.index(made.shadow)})",
        )
        if made.shadow.numel() <= LARGEST and made.rank < 5:
            scope.append(made)
        if writes:
            text.pure.append(f"{name}.write(last)")

    def program(self) -> tuple[str, str]:
        """The text with writes, and the pure one; both return all that was computed at the base."""
        scope, text = [], Text()
        for k, shape in enumerate(SHAPES):
            known = Known(f"i{k}", places_of(torch.empty(shape)), f"input{k}", 0)
            scope.append(known)
            text.add(f"i{k} = inputs[{k}].clone()", f"i{k} = new(inputs[{k}], {self.index(known.shadow)})")
        while self.nests < 1 or self.random.random() < 0.4:
            for _ in range(self.random.randint(0, 3)):
                self.statement(scope, 0, text)
            self.transform(scope, 1, text)
        text.add(
            f"return [{', '.join(t.name for t in scope)}]",
            f"return [{', '.join(f'{t.name}.read()' for t in scope)}]",
        )
        lines = (["def program(F, inputs):", *("    " + line for line in part)] for part in (text.real, text.pure))
        real, pure = ("\n".join(part) for part in lines)
        return real, pure


def same_memory(x: Tensor, other: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# ---- running them


class Places:
    """A tensor of the pure program."""

    def __init__(self, buffer: list[Tensor], places: Tensor) -> None:
        self.buffer, self.places = buffer, places

    def read(self) -> Tensor:
        return self.buffer[0][self.places.reshape(-1)].reshape(self.places.shape)

    def write(self, value: Tensor) -> None:
        flat = value.expand(self.places.shape).reshape(-1)
        self.buffer[0] = self.buffer[0].index_put((self.places.reshape(-1),), flat)


def new(value: Tensor, places: Tensor) -> Places:
    made = Places([torch.zeros(int(places.max()) + 1, dtype=F64)], places)
    made.write(value)
    return made


def weights(x: Tensor) -> Tensor:
    return torch.cos(torch.arange(x.numel(), dtype=F64) + 1).reshape(x.shape)


def run(source: str, library: Any, seed: int, places: list[Tensor]) -> list[Tensor]:
    space = {"torch": torch, "F64": F64, "Places": Places, "new": new, "weights": weights, "PLACES": places}
    space["FIRST"] = torch.tensor([0])
    exec(compile(source, "<program>", "exec"), space)  # noqa: S102 - the text of Generator
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, dtype=F64, generator=generator) * 0.6 for shape in SHAPES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [x.detach() for x in space["program"](library, inputs)]  # type: ignore[operator]


#: What functrans refuses on purpose: what a loop would write repeatedly, places that a batch hides.
REFUSALS = (CapturedOnceError, InsideTransformError)


def outcome(seed: int, library: Any = functrans) -> tuple[str, str]:
    """``right``, ``refused``, or what is wrong, and the program."""
    generator = Generator(seed)
    real, pure = generator.program()
    try:
        expected = run(pure, torch.func, seed, generator.places)
    except RuntimeError as error:
        if "INTERNAL ASSERT FAILED" not in str(error):  # torch.func's own, where constants are written from inside
            raise
        return "undecided", real
    try:
        found = run(real, library, seed, generator.places)
    except REFUSALS:
        return "refused", real
    except Exception as error:  # noqa: BLE001 - which is what is wrong
        return f"{type(error).__name__}: {error}", real
    for k, (x, y) in enumerate(zip(found, expected, strict=True)):
        if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-7, atol=1e-9):
            return f"result {k} is {x.tolist()}, expected {y.tolist()}", real
    return "right", real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the program of this seed, and what came of it")
    options = parser.parse_args()
    if options.show:
        print(*reversed(outcome(options.seed)), sep="\n")
        return
    counts: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.cases):
        found, _ = outcome(seed)
        known = found in ("right", "refused", "undecided")
        counts[found if known else "wrong"] += 1
        if not known:
            print(f"{seed}: {found}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
