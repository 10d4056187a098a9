"""Random smooth programs R^n -> R^n under random nestings of the transforms, functrans against torch.func.

A program is source text: nested functions, one per transform, each with captured values of every level around it,
in-place writes, writes through views, ``out=``, no_grad and enable_grad blocks. Where torch.func refuses a program that
has no grad-mode blocks, plain autograd and a loop are the oracle.

    python tests/checkers/program_fuzzer.py --cases 5000 --seed 3   # statistic, and a shrunken repro of each failure
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plain import PlainTransforms, difference
from program_generator import Block, Generator, Line, render
from torch import Tensor

N = 3  # length of every vector; matrices are N x N

# ---- running a program


HELPERS = {
    # torch.func cannot write batched values to an unbatched buffer, nor anything tracked to out=.
    "oracle": '''
def buffer(like):
    return torch.zeros_like(like)

def write_out(op, *args, out):
    out.copy_(op(*args))
''',
    "functrans": '''
def buffer(like):
    return torch.zeros(3, dtype=torch.float64)

def write_out(op, *args, out):
    op(*args, out=out)
''',
}


def run(source: str, backend: Any, seed: int, backward: bool) -> tuple[Tensor, ...]:
    """The value of a program, what it left in its argument and, for ``backward``, the base-level gradient."""
    space: dict[str, Any] = {"torch": torch}
    helpers = HELPERS["oracle" if backend in (torch.func, PlainTransforms) else "functrans"]
    exec(compile(helpers + source, "<program>", "exec"), space)  # noqa: S102 - the text of Generator
    generator = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(N, dtype=torch.float64, generator=generator) * 0.7 for _ in range(2))
    matrix = torch.randn(N, N, dtype=torch.float64, generator=generator) * 0.5
    if backward:
        x.requires_grad_()
    value = space["program"](backend, x, c, matrix, space["buffer"], space["write_out"])
    if type(value) is not Tensor:
        raise TypeError(f"the program returned a {type(value).__name__}")
    if not backward:
        return value, x.clone(), c.clone()
    gradient = torch.zeros_like(x)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True, materialize_grads=True)
    return value.detach(), gradient, c.clone()


def outcome_of(source: str, backend: Any, seed: int, backward: bool) -> tuple[Any, Exception | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run(source, backend, seed, backward), None
        except Exception as error:  # noqa: BLE001 - whatever it raises is the outcome
            return None, error


def serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        source, name, seed, backward = pipe.recv()
        oracle = torch.func if name == "torch.func" else PlainTransforms
        value, error = outcome_of(source, oracle, seed, backward)
        numbers = None if value is None else [t.tolist() for t in value]
        pipe.send((numbers, error and f"{type(error).__name__}: {error}"))


class Oracle:
    """torch.func and plain autograd in a process of their own: some writes through views crash torch.func."""

    def __init__(self) -> None:
        self.process: Any = None

    def ask(self, source: str, name: str, seed: int, backward: bool) -> tuple[Any, str | None]:
        context = multiprocessing.get_context("spawn")
        if self.process is None:
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
            self.pipe.recv()
        self.pipe.send((source, name, seed, backward))
        try:
            numbers, error = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            self.process = None
            return None, "crashed"
        return (None if numbers is None else tuple(torch.tensor(n, dtype=torch.float64) for n in numbers)), error


ORACLE = Oracle()


BY_INVERSE = """def solve(matrix, side):
    return torch.linalg.inv(matrix) @ side

"""

FAILURES = ("wrong", "error", "error where only plain autograd answers")


def judge(source: str, backend: Any, seed: int, backward: bool) -> tuple[str, str]:
    """What the program shows of ``backend``, and the difference or error."""
    expected, refusal = ORACLE.ask(source, "torch.func", seed, backward)
    plain_applies = "no_grad" not in source and "enable_grad" not in source
    if refusal == "crashed":
        return "skipped: torch.func crashes", ""
    if refusal is not None and not plain_applies:
        return "skipped: torch.func refuses, and grad modes have no other oracle", str(refusal)
    if expected is not None and not all(bool(t.isfinite().all()) for t in expected):
        return "skipped: not finite", ""
    got, error = outcome_of(source, backend, seed, backward)
    if refusal is None:
        what = f"{type(error).__name__}: {error}" if error is not None else difference(got, expected, 1e-8)
        if not what:
            return "match", ""
        if error is None and plain_applies:
            plain, failure = ORACLE.ask(source, "plain", seed, backward)
            if failure is None and not difference(got, plain, 1e-8):
                return "torch.func differs from plain autograd, functrans does not", what
        if error is None and "torch.linalg.solve(" in source:
            # PyTorch's forward mode takes the LU factors for constants, which the next derivative notices.
            solved, failure = ORACLE.ask(
                BY_INVERSE + source.replace("torch.linalg.solve(", "solve("), "torch.func", seed, backward
            )
            if failure is None and not difference(got, solved, 1e-8):
                return "torch.func is wrong with solve, and agrees with functrans by the inverse", what
        return ("wrong" if error is None else "error"), what
    if error is not None and "modified by an inplace operation" in f"{error}":
        return "skipped: torch.func and functrans refuse: a value was modified that a derivative needs", str(error)
    if error is not None and "not implemented" in f"{error}" and "mplement" in refusal:
        return "skipped: torch.func and functrans refuse: PyTorch has no derivative of an operator", str(error)
    plain, failure = ORACLE.ask(source, "plain", seed, backward)
    if failure is not None:
        return "skipped: torch.func and plain autograd refuse", str(failure)
    if error is not None:
        return "error where only plain autograd answers", f"{type(error).__name__}: {error}"
    what = difference(got, plain, 1e-8)
    return ("wrong", what) if what else ("match: plain autograd (torch.func refuses)", "")


# ---- making failures small


def smaller(lines: list[Line]) -> Iterator[list[Line]]:
    """Every program one step smaller: a line gone, a block's lines without the block, a value replaced by another."""
    # from the end: what is used last goes first
    for i, line in reversed(list(enumerate(lines))):
        yield lines[:i] + lines[i + 1 :]
        if isinstance(line, Block):
            if line.header.startswith("with"):
                yield lines[:i] + line.body + lines[i + 1 :]
            for body in smaller(line.body):
                yield lines[:i] + [Block(line.header, body)] + lines[i + 1 :]
        elif " = " in line and "F." not in line and line.partition(" = ")[0].isidentifier():
            left, _, right = line.partition(" = ")
            for name in ("x0.clone()", "c0.clone()"):
                if right != name and not right.startswith("c0"):
                    yield lines[:i] + [f"{left} = {name}"] + lines[i + 1 :]
        elif line.startswith("return ") and " + 0.5 * " in line:
            terms = line.removeprefix("return ").split(" + 0.5 * ")
            for k in range(len(terms)):
                yield lines[:i] + ["return " + " + 0.5 * ".join(terms[:k] + terms[k + 1 :])] + lines[i + 1 :]


def shrink(program: Block, still_fails: Callable[[str], bool], budget: int = 1500) -> Block:
    progress = True
    while progress and budget > 0:
        progress, position = False, 0
        while budget > 0:
            body = next(itertools.islice(smaller(program.body), position, None), None)
            if body is None:
                break
            candidate = Block(program.header, body)
            budget -= 1
            if still_fails("\n".join(render([candidate]))):
                program, progress = candidate, True
            else:
                position += 1
    return program


def repro(source: str, seed: int, backward: bool) -> str:
    """A script of its own that shows the difference."""
    inputs = (
        f"generator = torch.Generator().manual_seed({seed})\n"
        f"x, c = (torch.randn({N}, dtype=torch.float64, generator=generator) * 0.7 for _ in range(2))\n"
        f"matrix = torch.randn({N}, {N}, dtype=torch.float64, generator=generator) * 0.5\n"
        + ("x.requires_grad_()\n" if backward else "")
    )
    after = "print(torch.autograd.grad(value.sum(), x))\n" if backward else ""
    calls = "".join(
        f"{HELPERS[helper]}\nvalue = program({backend}, x, c, matrix, buffer, write_out)\n"
        f"print('{backend}', value)\n{after}"
        for backend, helper in (("torch.func", "oracle"), ("functrans", "functrans"))
    )
    return f"import torch\nimport functrans\n\n{source}\n\n{inputs}{calls}"


def fails_alike(backend: Any, number: int, backward: bool, kind: str, what: str, source: str) -> bool:
    now, now_what = judge(source, backend, number, backward)
    # the same error, not another one that the smaller program runs into
    return now == kind and (kind == "wrong" or now_what[:60] == what[:60])


@dataclass
class Failure:
    case: int
    kind: str
    what: str
    script: str


def fuzz(
    backend: Any, cases: int, seed: int, shrink_up_to: int = 3, after_each: Callable[[], None] | None = None
) -> tuple[Counter[str], list[Failure]]:
    """Judge ``cases`` programs; the first ``shrink_up_to`` failures are made small."""
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    for case in range(cases):
        number = seed * 1_000_003 + case
        program = Generator(number).program()
        source = "\n".join(render([program]))
        backward = number % 5 == 0
        kind, what = judge(source, backend, number, backward)
        counts[kind] += 1
        if after_each is not None:
            after_each()
        if kind in FAILURES:
            if len(failures) < shrink_up_to:
                program = shrink(program, partial(fails_alike, backend, number, backward, kind, what))
                source = "\n".join(render([program]))
                what = judge(source, backend, number, backward)[1]
            failures.append(Failure(number, kind, what, repro(source, number, backward)))
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description="random programs: functrans against torch.func")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="failures to shrink and print")
    options = parser.parse_args()
    import functrans

    torch.set_num_threads(1)
    counts, failures = fuzz(functrans, options.cases, options.seed, options.show)
    for failure in failures[: options.show]:
        print(f"---- {failure.kind}, program {failure.case}: {failure.what}\n{failure.script}")
    for kind, count in counts.most_common():
        print(f"{count:7}  {kind}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
