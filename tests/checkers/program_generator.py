"""Random smooth programs R^n -> R^n, as source text: nested functions, one per transform, with captured values of every
level around them, in-place writes, writes through views, ``out=``, no_grad and enable_grad blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Block:
    """A header line and its indented body."""

    header: str
    body: list[Line] = field(default_factory=list)


Line = str | Block


def render(lines: list[Line], indent: int = 0) -> Iterator[str]:
    for line in lines:
        if isinstance(line, str):
            yield "    " * indent + line
        else:
            yield "    " * indent + line.header
            yield from render(line.body or ["pass"], indent + 1)


@dataclass
class Variable:
    name: str
    shape: str  # "vector", "matrix" or "scalar"
    level: int
    writable: bool  # made at this level by an op that gives new memory, or a view of such a thing
    root: str = ""  # the variable whose memory this one is a view of


POINTWISE = [
    "{a}.sin()", "{a}.cos()", "{a}.tanh()", "{a}.sigmoid()", "torch.exp(-{a} * {a})",
    "torch.nn.functional.softplus({a})",
    "0.5 * {a}", "{a} - 0.3", "{a} ** 2 * 0.3", "-{a}", "1.0 / (1.0 + {a} * {a})", "torch.log1p({a} * {a})",
    "{a}.clone()",
    "torch.nn.functional.gelu({a})", "{a}.atan()", "torch.erf({a})", "{a}.detach() * 0.7",
    "{a}.square().add(1.0).sqrt()",
]  # fmt: skip
BINARY = [
    "{a} + {b}", "{a} * {b}", "{a} - 0.5 * {b}", "{a} / (1.0 + {b} * {b})", "torch.where({b} > 0.1, {a}, 0.5 * {b})",
    "torch.addcmul({a}, {b}, {a}, value=0.3)", "torch.lerp({a}, {b}, 0.3)", "torch.hypot({a}, {b} + 3.0)",
]  # fmt: skip
VECTOR = [
    "{M} @ {a} * 0.5", "torch.nn.functional.linear({a}, {M}) * 0.3", "{a}.softmax(0)", "{a}.cumsum(0) * 0.5",
    "{a}.sum() * {b}", "{a}.mean() + {b}", "{a}.logsumexp(0) * {b}", "{a}.dot({b}) * 0.3 + {a}", "{a}.flip(0)",
    "{a}[torch.tensor([2, 0, 1])]", "{a}[[0, 0, 1]]", "torch.cat([{a}[1:], {b}[:1]])", "{M}[0] * {a}",
    "{M}.sum(1) * 0.3",
    "{a}.index_select(0, torch.tensor([1, 1, 2]))", "{a}.gather(0, torch.tensor([2, 1, 1]))", "{M}.diagonal() + {a}",
    "torch.einsum('ij,j->i', {M}, {a}) * 0.4", "torch.stack([{a}, {b}]).sum(0)", "{M}[torch.tensor([0, 2, 1]), 1]",
    "({a} - {a}.mean()) / ({a}.var() + 0.1).sqrt()", "torch.linalg.vector_norm({a} + 2.0) * {b}",
    "{a}.roll(1, 0) * {b}", "{M}.mean(0) + {a}.prod() * 0.1", "({a} * {b}).var(0) * 0.3 + {a}", "{M}.amax(1) * 0.5",
    "torch.bmm({M}.unsqueeze(0), {a}.reshape(1, 3, 1)).reshape(3) * 0.3",
    "{a}.index_add(0, torch.tensor([0, 0]), {b}[:2])",
    "torch.masked_fill({a}, torch.tensor([True, False, False]), 0.2)", "{a}.unfold(0, 2, 1).sum() * {b} * 0.2",
]  # fmt: skip
MATRIX = [
    "torch.outer({a}, {b}) * 0.5", "{M} @ {M} * 0.3", "{M} * {a}", "{M} + {a}.unsqueeze(1)", "{M}.t() * 0.7",
    "{M}.tanh()",
    "torch.stack([{a}, {b}, {a} * {b}], 1)", "{M}.softmax(-1)", "torch.tril({M})", "{a}.expand(3, 3) * {M}",
    "torch.linalg.solve({M} * 0.1 + 2.0 * torch.eye(3, dtype=torch.float64), {M})", "torch.diag_embed({a})",
    "torch.cdist({M} + {a}, {M} + 4.0) * 0.2", "{M}.transpose(0, 1).contiguous()",
    "torch.einsum('i,j->ji', {a}, {b}) * 0.4",
]  # fmt: skip
SCALAR = ["{a}.sum() * 0.5", "{a}.dot({b}) * 0.4", "{M}.mean()", "{M}.trace() * 0.3", "{a}[1]", "{a}.norm() * 0.5"]
VIEWS = {
    "vector": [("{a}.view(3)", "vector"), ("{a}[:]", "vector"), ("{a}.view(3, 1).squeeze(1)", "vector")],
    "matrix": [
        ("{a}.t()", "matrix"), ("{a}[1]", "vector"), ("{a}[:, 2]", "vector"), ("{a}.diagonal()", "vector"),
        ("{a}.t()[0]", "vector"), ("{a}.transpose(0, 1).t()", "matrix"), ("{a}.unsqueeze(0)[0]", "matrix"),
    ],
}  # fmt: skip
WRITES = {
    "vector": [
        "{w}.add_({a})", "{w}.mul_({a})", "{w}.mul_(0.7)", "{w}.copy_({a})", "{w} += {a}", "{w} *= 0.5", "{w}.sin_()",
        "{w}[0] = {a}[1]", "{w}[1:] = {a}[:-1]", "{w}[torch.tensor([2, 0])] = {a}[:2]",
        "{w}.view(3, 1)[1:].copy_({a}[:2].view(2, 1))",
        "{w}[0] = 0.25", "{w}[1:].mul_({a}[1:])", "{w}[{w} > 0.4] = 0.1", "{w}.fill_(0.3)", "{w}.tanh_()",
        "{w}.sub_({a}, alpha=0.5)",
        "{w}[1] += {a}.sum() * 0.3", "{w}[:2].add_({a}[1:])", "{w}.index_add_(0, torch.tensor([1]), {a}[:1])",
        "write_out(torch.mul, {a}, {b}, out={w})", "write_out(torch.sin, {a}, out={w})",
        "{w}.addcmul_({a}, {b}, value=0.3)",
        "{w}.lerp_({a}, 0.5)", "{w}.masked_fill_(torch.tensor([False, True, False]), 0.4)", "{w}.zero_().add_({a})",
    ],
    "matrix": [
        "{w}[0] = {a}", "{w}.t()[1].mul_({a})", "{w}.diagonal().add_({a})", "{w}[:, 1:].transpose(0, 1)[0].add_({a})",
        "{w}.mul_(0.6)", "{w}[1, 2] = {a}[0]", "{w}[:, 1] = {a}", "{w}.add_({a})",
        "{w}[torch.tensor([0, 2])] = {M}[:2]",
        "{w}.view(9)[2:5].copy_({a})", "{w}.t().copy_({M})", "{w}[0:2][1][1:] = {a}[:2]", "{w}.tril_()",
        "write_out(torch.matmul, {M}, {M}, out={w})", "{w}.select(1, 0).sub_({a})", "{w}.addmm_({M}, {M}, alpha=0.2)",
    ],
}  # fmt: skip


class Generator:
    """Writes one program; ``grad_modes`` says whether it may contain no_grad and enable_grad blocks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.count = 0
        self.grad_modes = self.random.random() < 0.4
        self.depth = self.random.choice([1, 2, 2, 3, 3, 4])

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def pick(self, scope: list[Variable], shape: str) -> str:
        # The innermost values most often, but those of every level around as well.
        candidates = [v for v in scope if v.shape == shape]
        top = max(v.level for v in candidates)
        inner = [v for v in candidates if v.level == top]
        return self.random.choice(inner if self.random.random() < 0.65 else candidates).name

    def fill(self, template: str, scope: list[Variable], **names: str) -> str:
        text = template
        for hole, shape in (("{a}", "vector"), ("{b}", "vector"), ("{M}", "matrix")):
            while hole in text:
                text = text.replace(hole, self.pick(scope, shape), 1)
        return text.format(**names) if names else text

    def statement(self, scope: list[Variable], level: int, argument: str, out: list[Line]) -> None:
        r = self.random.random()
        mine = [v for v in scope if v.writable and v.level == level]
        if r < 0.12 and mine:
            source = self.random.choice(mine)
            if source.shape in VIEWS:
                template, shape = self.random.choice(VIEWS[source.shape])
                name = self.name("v")
                out.append(f"{name} = " + template.replace("{a}", source.name))
                scope.append(Variable(name, shape, level, True, source.root or source.name))
                return
        if r < 0.42 and mine:
            target = self.random.choice(mine)
            if target.shape in WRITES:
                # Outside of all transforms out= is PyTorch's own, which takes nothing that requires grad.
                templates = [t for t in WRITES[target.shape] if level > 0 or "write_out" not in t]
                template = self.random.choice(templates).replace("{w}", target.name)
                # What is written to its own memory piece by piece depends on the order, and eager leaves that open.
                root = target.root or target.name
                out.append(self.fill(template, [v for v in scope if (v.root or v.name) != root]))
                return
        if r < 0.48:
            name = self.name("b")
            out.append(f"{name} = buffer({argument})")
            scope.append(Variable(name, "vector", level, True))
            return
        shape, templates = self.random.choice(
            [("vector", POINTWISE), ("vector", BINARY), ("vector", VECTOR), ("vector", VECTOR), ("matrix", MATRIX)]
            + [("scalar", SCALAR)] * (self.random.random() < 0.3)
        )
        template = self.random.choice(templates)
        name = self.name({"vector": "v", "matrix": "m", "scalar": "s"}[shape])
        out.append(f"{name} = {self.fill(template, scope)}")
        # Only what is surely new memory may be written: no view, and no result of reshape or contiguous.
        views = (".diagonal()", ".t()", "[", ".contiguous()", ".reshape", "expand", ".view", ".flip")
        fresh = not template.endswith("]") and not any(v in template for v in views)
        scope.append(Variable(name, shape, level, fresh))

    def statements(self, scope: list[Variable], level: int, argument: str, count: int, out: list[Line]) -> None:
        while count > 0:
            if self.grad_modes and self.random.random() < 0.2:
                block = Block(self.random.choice(["with torch.no_grad():"] * 2 + ["with torch.enable_grad():"]))
                self.statements(scope, level, argument, self.random.randint(1, 2), block.body)
                out.append(block)
                count -= 2
            else:
                self.statement(scope, level, argument, out)
                count -= 1

    def function(self, header: str, arguments: list[str], scope: list[Variable], level: int, returns: str) -> Block:
        """A function of ``arguments`` (vectors) at ``level``; ``returns`` is vector, scalar, or vector+aux and so on.
        """
        block = Block(header)
        inner = scope + [Variable(a, "vector", level, False) for a in arguments]
        x = arguments[0]
        if self.random.random() < 0.5:
            fresh = self.name("w")
            block.body.append(f"{fresh} = {x}.clone()")
            inner.append(Variable(fresh, "vector", level, True))
        self.statements(inner, level, x, self.random.randint(1, 3), block.body)
        for _ in range(1 + (self.random.random() < 0.12)):
            if level < self.depth:
                body: list[Line] = block.body
                if self.grad_modes and self.random.random() < 0.2:
                    mode = Block(self.random.choice(["with torch.no_grad():", "with torch.enable_grad():"]))
                    block.body.append(mode)
                    body = mode.body
                self.transform(inner, level + 1, body)
        self.statements(inner, level, x, self.random.randint(0, 2), block.body)
        # Whatever a transform gave and whatever was written must show in the result.
        mine = [v for v in inner if v.level == level and v.shape == "vector" and (v.name[0] == "r" or v.writable)]
        shown = [v.name for v in mine if v.name[0] == "r"] + [v.name for v in mine if v.writable][-2:]
        vector = " + 0.5 * ".join(dict.fromkeys([self.pick(inner, "vector"), *shown]))
        matrices = [v.name for v in inner if v.level == level and v.shape == "matrix"][-1:]
        if matrices:
            vector += f" + 0.3 * {matrices[0]}.sum(0)"
        result = f"({vector}).sum()" if returns.startswith("scalar") else vector
        if self.random.random() < 0.5 and returns.startswith("scalar"):
            result = f"(({vector}) * {self.pick(inner, 'vector')}).mean()"
        if returns.endswith("+aux"):
            result += f", {self.pick(inner, 'vector')}"
        elif returns.endswith("+outer"):  # for out_dims None: nothing of this level
            result += f", {self.pick(scope, 'vector')}"
        block.body.append(f"return {result}")
        return block

    def transform(self, scope: list[Variable], level: int, out: list[Line]) -> None:
        """Define a function at ``level`` and apply a transform to it: a new vector of the level below."""
        kind = self.random.choice(["grad", "grad", "grad_and_value", "vjp", "jvp", "vmap", "vmap"])
        f, x, y, r = self.name("f"), self.name("x"), self.name("y"), self.name("r")
        a, b, c = (self.pick(scope, "vector") for _ in range(3))
        two = self.random.random() < 0.35
        arguments = [x, y] if two else [x]
        aux = self.random.random() < 0.25
        header = f"def {f}({', '.join(arguments)}):"

        def define(returns: str) -> None:
            out.append(self.function(header, arguments, scope, level, returns + ("+aux" if aux else "")))

        call = f"{a}, {b}" if two else a
        has_aux = ", has_aux=True" if aux else ""
        if kind in ("grad", "grad_and_value"):
            define("scalar")
            argnums, picked = (
                self.random.choice([(", argnums=(0, 1)", 2), (", argnums=1", 1), (", argnums=-1", 1), ("", 1)])
                if two
                else ("", 1)
            )
            g = f"F.{kind}({f}{argnums}{has_aux})({call})"
            target = "g" if picked == 1 else "(g, h)"
            total = "g" if picked == 1 else "g + 0.5 * h"
            if kind == "grad_and_value":
                target, total = f"{target}, {'(v, k)' if aux else 'v'}", f"{total} + 0.1 * v"
            elif aux:
                target = f"{target}, k"
            out.append(f"{target} = {g}")
            out.append(f"{r} = {total}{' + k' if aux else ''}")
        elif kind == "vjp":
            define("vector")
            out.append(f"{'o, pullback, k' if aux else 'o, pullback'} = F.vjp({f}, {call}{has_aux})")
            gradients = f"pullback({c})[0]" + (f" + pullback({a})[1]" if two else "")
            out.append(f"{r} = {gradients} + 0.5 * o{' + k' if aux else ''}")
        elif kind == "jvp":
            define("vector")
            tangent = f"{c}, {a}.cos()" if two else c
            out.append(f"{'o, t, k' if aux else 'o, t'} = F.jvp({f}, ({call},), ({tangent},){has_aux})")
            out.append(f"{r} = o * 0.5 + t{' + k' if aux else ''}")
        else:
            i, j = (self.random.choice([0, 1, -1, -2]) for _ in range(2))
            second = self.random.choice(["None", str(j)]) if two else ""
            stacked = f"torch.stack([{a}, 0.5 * {c}], {i})"
            other = "" if not two else f", {b}" if second == "None" else f", torch.stack([{b}, {a}.sin()], {j})"
            in_dims = f"({i}, {second})" if two else self.random.choice([str(i), f"({i},)"])
            o = self.random.choice([0, 1, -1, -2])
            chunk = ", chunk_size=1" if self.random.random() < 0.08 else ""
            second_out = self.random.choice(["", "", "+aux", "+outer"]) if not chunk else ""
            out.append(self.function(header, arguments, scope, level, "vector" + second_out))
            p = self.random.choice([0, 1, -1])
            out_dims = {"": str(o), "+aux": f"({o}, {p})", "+outer": f"({o}, None)"}[second_out]
            target = "o" if not second_out else "o, k"
            out.append(f"{target} = F.vmap({f}, in_dims={in_dims}, out_dims={out_dims}{chunk})({stacked}{other})")
            collapse = self.random.choice([f"o.sum({o})", f"o.select({o}, 1)", f"o.mean({o}) + o.select({o}, 0)"])
            extra = {"": "", "+aux": f" + k.sum({p})", "+outer": " + k"}[second_out]
            out.append(f"{r} = {collapse}{extra}")
        scope.append(Variable(r, "vector", level - 1, False))

    def program(self) -> Block:
        outer = [Variable("c0", "vector", -1, False), Variable("C0", "matrix", -1, False)]
        return self.function("def program(F, x0, c0, C0, buffer, write_out):", ["x0"], outer, 0, "vector")
