"""A transform that has ended leaves nothing to the garbage collector: what it held is freed at once."""

from __future__ import annotations

import ast
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import functrans as ft

X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)


def scalar(x: Any) -> Any:
    return (x.sin() * x.exp()).sum()


def vector(x: Any) -> Any:
    y = torch.cat([x.softmax(-1), x[..., :1]], -1)
    return y.cumsum(-1) * y


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda x: ft.vmap(vector)(x),
    "vmap, last dimension": lambda x: ft.vmap(vector, 1, 1)(x),
    "vmap in chunks": lambda x: ft.vmap(vector, chunk_size=3)(x),
    "vmap with randomness": lambda x: ft.vmap(lambda r: r + torch.rand_like(r), randomness="different")(x),
    "named axis": lambda x: ft.vmap(lambda r: r - ft.psum(r, "i"), axis_name="i")(x),
    "grad": lambda x: ft.grad(scalar)(x),
    "grad_and_value": lambda x: ft.grad_and_value(scalar)(x),
    "grad of grad": lambda x: ft.grad(lambda y: scalar(ft.grad(scalar)(y)))(x),
    "per-example gradients": lambda x: ft.vmap(ft.grad(scalar))(x),
    "clipped_grad": lambda x: ft.clipped_grad(lambda p, r: scalar(p @ r), 1.0)(x[:3], x),
    "per_example_norms": lambda x: ft.per_example_norms(lambda p, r: scalar(p @ r))(x[:3], x),
    "vjp": lambda x: ft.vjp(vector, x)[1](torch.ones(4, 4, dtype=x.dtype)),
    "jvp": lambda x: ft.jvp(vector, (x,), (x,)),
    "jvp of grad": lambda x: ft.jvp(ft.grad(scalar), (x,), (x,)),
    "grad of jvp": lambda x: ft.grad(lambda y: scalar(ft.jvp(vector, (y,), (y,))[1]))(x),
    "jacrev": lambda x: ft.jacrev(vector)(x),
    "jacfwd": lambda x: ft.jacfwd(vector)(x),
    "hessian": lambda x: ft.hessian(scalar)(x),
    "linearize": lambda x: ft.linearize(vector, x)[1](x),
    "functionalize": lambda x: ft.functionalize(lambda y: y.clone().mul_(2))(x),
    "laplacian": lambda x: ft.vmap(ft.laplacian(scalar))(x),
    "sparsity": lambda x: ft.sparsity(vector)(x),
    "bounds": lambda x: ft.bounds(torch.sin)(x, x + 1),
    "linear bounds": lambda x: ft.bounds(vector, method="linear")(x, x + 1),
    "lowp": lambda x: ft.lowp(scalar, torch.bfloat16)(x),
    "sanitize": lambda x: ft.sanitize(ft.grad(scalar))(x),
    "count": lambda x: ft.count(scalar)(x),
    "written argument": lambda x: ft.vmap(lambda r: r.mul_(2))(x.clone()),
    "view written inside": lambda x: ft.grad(lambda y: scalar(y.clone().select(0, 1).mul_(y[0])))(x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_left_to_the_collector(name: str) -> None:
    """Cycles would hold inputs and closures until the collector comes, which knows nothing of the size of tensors."""
    program = PROGRAMS[name]
    program(X)  # what is kept for good is made the first time
    program(X)
    while gc.collect():  # what others have left, some of which is freed in turns
        pass
    gc.disable()
    try:
        for _ in range(5):
            program(X)
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("transform", [ft.vmap, lambda f: ft.grad(lambda x: f(x).sum()), ft.jacrev, ft.jacfwd])
def test_what_a_function_closes_over_is_freed_with_it(transform: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        captured = torch.ones(3, dtype=X.dtype)
        alive = weakref.ref(captured)

        def run(w: Any) -> None:
            transform(lambda x: vector(x * w))(X)

        run(captured)
        del captured
        assert alive() is None
    finally:
        gc.enable()


def test_the_check_sees_a_cycle() -> None:
    gc.collect()
    gc.disable()
    try:
        interpreter = ft.interpreters.vmap.interpreter.VmapInterpreter(2, "error")
        interpreter.kept = interpreter
        del interpreter
        assert gc.collect() > 0
    finally:
        gc.enable()


def self_references(tree: ast.AST, inside: bool = False) -> Iterator[ast.FunctionDef]:
    """The functions within functions that name themselves: each such closure is a cycle, which holds what it reads."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef)
        if is_function and inside:
            names = (n for line in node.body for n in ast.walk(line) if isinstance(n, ast.Name))
            if any(n.id == node.name and isinstance(n.ctx, ast.Load) for n in names):
                yield node
        yield from self_references(node, not isinstance(node, ast.ClassDef) and (inside or is_function))


def test_no_closure_names_itself() -> None:
    files = sorted(Path(ft.__file__).parent.rglob("*.py"))
    found = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in files
        for node in self_references(ast.parse(path.read_text()))
    ]
    assert len(files) > 200 and found == []
    (seen,) = self_references(
        ast.parse("def f():\n    def g(x):\n        return g(x)\n    def h():\n        return g\n")
    )
    assert seen.name == "g"
