"""Every name and option of torch.func and of JAX's transforms, and what functrans has for it: docs/torch_func.md.

    python tests/checkers/torch_func_table.py

writes the page. A row's answer is "yes", "no" or "differs", with the reason; what shows it is a line of Python that is
true (tests/test_torch_func_table.py runs each), or a test. The names and options themselves are those of the installed
PyTorch, and of JAX where it is installed: the test fails where one has no row.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "torch_func.md"


class Row(NamedTuple):
    name: str  #: ``grad``, or ``grad(argnums)`` for an option
    answer: str  #: yes, no or differs
    reason: str  #: why not, or how
    shown: str  #: a line of Python that is true, or the id of a test


def row(name: str, answer: str, shown: str, reason: str = "") -> Row:
    return Row(name, answer, reason, shown)


#: Names in the lines: ``x`` is [1, 2, 3], ``y`` [4, 5, 6], ``m`` a 3 × 2 matrix, ``z`` a complex number; ``equal``
#: compares trees, ``refused`` is whether a call raises a FunctransError; all of functrans is there by name.
TORCH_FUNC = [
    row("grad", "yes", "equal(grad(lambda x: x.sin().sum())(x), x.cos())"),
    row("grad(argnums)", "yes", "equal(grad(torch.dot, argnums=(0, 1))(x, y), (y, x))"),
    row("grad(has_aux)", "yes", "equal(grad(lambda x: (x @ x, x + 1), has_aux=True)(x), (2 * x, x + 1))"),
    row("grad_and_value", "yes", "equal(grad_and_value(torch.sum)(x), (torch.ones(3), torch.tensor(6.0)))"),
    row("grad_and_value(argnums)", "yes", "equal(grad_and_value(torch.dot, argnums=1)(x, y)[0], x)"),
    row(
        "grad_and_value(has_aux)",
        "yes",
        "equal(grad_and_value(lambda x: (x @ x, x), has_aux=True)(x), (2 * x, (x @ x, x)))",
    ),
    row("vmap", "yes", "equal(vmap(torch.dot)(m, m), (m * m).sum(1))", "also `torch.vmap`"),
    row("vmap(in_dims)", "yes", "equal(vmap(torch.dot, in_dims=(1, None))(m, x), m.T @ x)"),
    row("vmap(out_dims)", "yes", "equal(vmap(lambda r: (r, r.sum()), out_dims=(1, 0))(m), (m.T, m.sum(1)))"),
    row(
        "vmap(randomness)",
        "yes",
        "equal(*vmap(lambda r: torch.rand(2), randomness='same')(m)[:2])",
        "“different”, “same” and “error”",
    ),
    row("vmap(chunk_size)", "yes", "equal(vmap(torch.sin, chunk_size=2)(m), m.sin())"),
    row("jacrev", "yes", "equal(jacrev(torch.sin)(x), x.cos().diag())"),
    row("jacrev(argnums)", "yes", "equal(jacrev(torch.mul, argnums=(0, 1))(x, y), (y.diag(), x.diag()))"),
    row("jacrev(has_aux)", "yes", "equal(jacrev(lambda x: (x * x, x), has_aux=True)(x), ((2 * x).diag(), x))"),
    row("jacrev(chunk_size)", "yes", "equal(jacrev(torch.sin, chunk_size=2)(x), x.cos().diag())"),
    row(
        "jacrev(_preallocate_and_copy)",
        "differs",
        "equal(jacrev(torch.sin, chunk_size=2, _preallocate_and_copy=True)(x), x.cos().diag())",
        "taken, and without effect: it is about where torch.func puts its chunks",
    ),
    row("jacfwd", "yes", "equal(jacfwd(torch.sin)(x), x.cos().diag())"),
    row("jacfwd(argnums)", "yes", "equal(jacfwd(torch.mul, argnums=1)(x, y), x.diag())"),
    row("jacfwd(has_aux)", "yes", "equal(jacfwd(lambda x: (x * x, x), has_aux=True)(x), ((2 * x).diag(), x))"),
    row(
        "jacfwd(randomness)",
        "yes",
        "torch.equal(torch.eye(3) != 0, jacfwd(lambda x: x * torch.rand(3), randomness='same')(x) > 0)",
    ),
    row("hessian", "yes", "equal(hessian(lambda x: x.sin().sum())(x), -x.sin().diag())"),
    row("hessian(argnums)", "yes", "equal(hessian(lambda a, b: (a * b * b).sum(), argnums=1)(x, y), (2 * x).diag())"),
    row("jvp", "yes", "equal(jvp(torch.sin, (x,), (y,)), (x.sin(), x.cos() * y))"),
    row(
        "jvp(strict)",
        "yes",
        "refused(jvp, lambda x: y, (x,), (x,), strict=True)",
        "an output that does not depend on the [primals](glossary.md#primal) is an error",
    ),
    row("jvp(has_aux)", "yes", "equal(jvp(lambda x: (x.sin(), x), (x,), (y,), has_aux=True)[2], x)"),
    row("vjp", "yes", "equal(vjp(torch.mul, x, y)[1](torch.ones(3)), (y, x))"),
    row("vjp(has_aux)", "yes", "equal(vjp(lambda x: (x.sin(), x), x, has_aux=True)[2], x)"),
    row(
        "vjp: retain_graph, create_graph of the function that it returns",
        "differs",
        "(lambda p: equal(p(y, retain_graph=False), p(y, create_graph=False)))(vjp(torch.sin, x)[1])",
        "taken, and without effect: a [pullback](glossary.md#pullback) can be called again, and can be differentiated",
    ),
    row("linearize", "yes", "equal(linearize(torch.sin, x)[1](y), x.cos() * y)"),
    row(
        "functionalize",
        "differs",
        "equal(functionalize(lambda x: x.clone().add_(1))(x), x + 1)",
        "`remove=\"mutations_and_views\"` refuses what asks for a view's place in memory: "
        "[differences.md](differences.md#stricter)",
    ),
    row(
        "functionalize(remove)",
        "yes",
        "equal(functionalize(lambda m: m.T[0].add_(1), remove='mutations_and_views')(m.clone()), m[:, 0] + 1)",
    ),
    row(
        "functional_call",
        "yes",
        "equal(functional_call(nn.Linear(3, 1), {'weight': x[None], 'bias': x[:1]}, (y,)), (x @ y + 1)[None])",
    ),
    row(
        "functional_call(args, kwargs)",
        "yes",
        "equal(functional_call(nn.ReLU(), {}, kwargs={'input': -x}), 0 * x)",
    ),
    row(
        "functional_call(tie_weights)",
        "differs",
        "tests/test_copies_and_modules.py::test_two_values_for_one_place_are_refused",
        "two values for one place are an error; torch.func takes the last",
    ),
    row("functional_call(strict)", "yes", "refused(functional_call, nn.Linear(3, 1), {}, (x,), strict=True)"),
    row(
        "stack_module_state",
        "yes",
        "stack_module_state([nn.Linear(3, 2)] * 4)[0]['weight'].shape == (4, 2, 3)",
        "also inside of transforms",
    ),
    row(
        "replace_all_batch_norm_modules_",
        "yes",
        "replace_all_batch_norm_modules_(nn.BatchNorm1d(3)).running_mean is None",
    ),
    row("rearrange", "yes", "equal(rearrange(m, 'a b -> b a'), m.T)", "from PyTorch 2.13 on; here on all versions"),
    row("debug_unwrap", "yes", "tests/test_rearrange.py::test_debug_unwrap"),
    row("debug_unwrap(recurse)", "yes", "tests/test_rearrange.py::test_debug_unwrap"),
]

NAMED_AXES = "JAX has given it up; a gradient inside of a vmap with a name is that of the sum of all examples"
COMPILING = "a compiler's business: `torch.compile` takes functrans' transforms ([compile.md](compile.md))"
ONE_DEVICE = "functrans runs on the device of its tensors, and leaves sharding to PyTorch"
INTEGERS = "an integer has no gradient: pass it as an argument that `argnums` does not name"

JAX = [
    row("grad", "yes", "equal(grad(lambda x: x.sin().sum())(x), x.cos())"),
    row("grad(argnums)", "yes", "equal(grad(torch.dot, argnums=(0, 1))(x, y), (y, x))", "a tuple, not a list"),
    row(
        "grad(has_aux)",
        "yes",
        "equal(grad(lambda x: (x @ x, x + 1), has_aux=True)(x), (2 * x, x + 1))",
    ),
    row("grad(holomorphic)", "yes", "equal(grad(lambda z: z**3, holomorphic=True)(z), 3 * z**2)"),
    row("grad(allow_int)", "no", "refused(grad(torch.sum), torch.arange(3))", INTEGERS),
    row("grad(reduce_axes)", "no", "'reduce_axes' not in parameters(grad)", NAMED_AXES),
    row("value_and_grad", "yes", "equal(value_and_grad(torch.sum)(x), (torch.tensor(6.0), torch.ones(3)))"),
    row("value_and_grad(argnums)", "yes", "equal(value_and_grad(torch.dot, argnums=1)(x, y)[1], x)"),
    row(
        "value_and_grad(has_aux)",
        "yes",
        "equal(value_and_grad(lambda x: (x @ x, x), has_aux=True)(x), ((x @ x, x), 2 * x))",
    ),
    row("value_and_grad(holomorphic)", "yes", "equal(value_and_grad(torch.sin, holomorphic=True)(z)[1], z.cos())"),
    row("value_and_grad(allow_int)", "no", "refused(value_and_grad(torch.sum), torch.arange(3))", INTEGERS),
    row("value_and_grad(reduce_axes)", "no", "'reduce_axes' not in parameters(value_and_grad)", NAMED_AXES),
    row("jacfwd", "yes", "equal(jacfwd(torch.sin)(x), x.cos().diag())"),
    row("jacfwd(argnums)", "yes", "equal(jacfwd(torch.mul, argnums=1)(x, y), x.diag())"),
    row("jacfwd(has_aux)", "yes", "equal(jacfwd(lambda x: (x * x, x), has_aux=True)(x), ((2 * x).diag(), x))"),
    row("jacfwd(holomorphic)", "yes", "equal(jacfwd(lambda z: z**3, holomorphic=True)(z), 3 * z**2)"),
    row("jacrev", "yes", "equal(jacrev(torch.sin)(x), x.cos().diag())"),
    row("jacrev(argnums)", "yes", "equal(jacrev(torch.mul, argnums=1)(x, y), x.diag())"),
    row("jacrev(has_aux)", "yes", "equal(jacrev(lambda x: (x * x, x), has_aux=True)(x), ((2 * x).diag(), x))"),
    row("jacrev(holomorphic)", "yes", "equal(jacrev(lambda z: z**3, holomorphic=True)(z), 3 * z**2)"),
    row("jacrev(allow_int)", "no", "refused(jacrev(torch.sum), torch.arange(3))", INTEGERS),
    row("hessian", "yes", "equal(hessian(lambda x: x.sin().sum())(x), -x.sin().diag())"),
    row("hessian(argnums)", "yes", "equal(hessian(lambda a, b: (a * b * b).sum(), argnums=1)(x, y), (2 * x).diag())"),
    row("hessian(has_aux)", "yes", "equal(hessian(lambda x: (x @ x, x), has_aux=True)(x), (2 * torch.eye(3), x))"),
    row("hessian(holomorphic)", "yes", "equal(hessian(lambda z: z**3, holomorphic=True)(z), 6 * z)"),
    row("jvp", "yes", "equal(jvp(torch.sin, (x,), (y,)), (x.sin(), x.cos() * y))"),
    row("jvp(has_aux)", "yes", "equal(jvp(lambda x: (x.sin(), x), (x,), (y,), has_aux=True)[2], x)"),
    row("vjp", "yes", "equal(vjp(torch.mul, x, y)[1](torch.ones(3)), (y, x))"),
    row("vjp(has_aux)", "yes", "equal(vjp(lambda x: (x.sin(), x), x, has_aux=True)[2], x)"),
    row("vjp(reduce_axes)", "no", "'reduce_axes' not in parameters(vjp)", NAMED_AXES),
    row(
        "vjp: complex cotangents",
        "differs",
        "equal(vjp(lambda z: z**2, z)[1](torch.ones_like(z))[0], (2 * z).conj())",
        "PyTorch's convention: the gradient is conjugated, and the direction of steepest ascent; "
        "`linear_transpose`, and `holomorphic=True`, have no conjugates, as in JAX",
    ),
    row("linearize", "yes", "equal(linearize(torch.sin, x)[1](y), x.cos() * y)"),
    row("linearize(has_aux)", "yes", "equal(linearize(lambda x: (x.sin(), x), x, has_aux=True)[2], x)"),
    row("linear_transpose", "yes", "equal(linear_transpose(lambda x: m.T @ x, x)(torch.ones(2)), (m.sum(1),))"),
    row("linear_transpose(reduce_axes)", "no", "'reduce_axes' not in parameters(linear_transpose)", NAMED_AXES),
    row("vmap", "yes", "equal(vmap(torch.dot)(m, m), (m * m).sum(1))"),
    row("vmap(in_axes)", "yes", "equal(vmap(torch.dot, in_dims=(1, None))(m, x), m.T @ x)", "`in_dims`, no list"),
    row(
        "vmap: in_axes of keyword arguments",
        "differs",
        "equal(vmap(lambda r, k: r + k)(m, k=m[0]), m + m[0])",
        "keyword arguments are the same for every example, as in torch.func; JAX maps them along axis 0",
    ),
    row("vmap(out_axes)", "yes", "equal(vmap(lambda r: r, out_dims=1)(m), m.T)", "`out_dims`"),
    row("vmap(axis_name)", "yes", "equal(vmap(lambda r: r - pmean(r, 'i'), axis_name='i')(m), m - m.mean(0))"),
    row("vmap(axis_size)", "yes", "vmap(lambda: axis_index('i'), axis_name='i', axis_size=2)().tolist() == [0, 1]"),
    row("vmap(spmd_axis_name)", "no", "'spmd_axis_name' not in parameters(vmap)", ONE_DEVICE),
    row("vmap(sum_match)", "no", "'sum_match' not in parameters(vmap)", "write `.sum(0)` of the result"),
    row(
        "checkpoint, remat",
        "differs",
        "equal(grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False).sum())(x), x.cos())",
        "`torch.utils.checkpoint`, with `use_reentrant=False`",
    ),
    row(
        "checkpoint(policy)",
        "differs",
        "tests/test_user_programs_language.py::test_checkpoints_inside",
        "`context_fn` of `torch.utils.checkpoint`, for what autograd saves around transforms",
    ),
    row("checkpoint(prevent_cse)", "no", "'prevent_cse' not in parameters(checkpoint)", "nothing is merged anyway"),
    row("checkpoint(concrete)", "no", "'concrete' not in parameters(checkpoint)", "JAX has given it up"),
    row("checkpoint(static_argnums)", "no", "'static_argnums' not in parameters(checkpoint)", "numbers stay numbers"),
    row("checkpoint(static_argnames)", "no", "'static_argnames' not in parameters(checkpoint)", "numbers stay numbers"),
    row("custom_jvp", "yes", "tests/test_custom_rules.py::test_every_nesting_of_reverse_mode"),
    row("custom_jvp(nondiff_argnums)", "yes", "tests/test_custom_rules.py::test_nondiff_argnums"),
    row("custom_jvp(nondiff_argnames)", "no", "'nondiff_argnames' not in parameters(custom_jvp)", "by position"),
    row("custom_vjp", "yes", "tests/test_custom_rules.py::test_every_nesting_of_reverse_mode"),
    row("custom_vjp(nondiff_argnums)", "yes", "tests/test_custom_rules.py::test_nondiff_argnums"),
    row("custom_vjp(nondiff_argnames)", "no", "'nondiff_argnames' not in parameters(custom_vjp)", "by position"),
    row(
        "custom_gradient",
        "differs",
        "tests/test_custom_functions.py::test_combined_forward",
        "`torch.autograd.Function` in the style `forward(ctx, ...)`",
    ),
    row(
        "custom_batching.custom_vmap",
        "yes",
        "tests/test_custom_rules.py::test_custom_vmap",
        "for an [operator](glossary.md#operator) `functrans.batching_rule`",
    ),
    row(
        "custom_batching.sequential_vmap",
        "differs",
        "equal(vmap(torch.sin, chunk_size=1)(x), x.sin())",
        "`chunk_size=1`, for the whole function",
    ),
    row("experimental.jet.jet", "yes", "tests/test_jet.py::test_every_kind_of_operator", "[taylor.md](taylor.md)"),
    row(
        "closure_convert",
        "no",
        "equal(grad(lambda a: grad(lambda b: (a * b).sum())(x) @ y)(x), y)",
        "it needs no such thing: what a function captures is seen, and can be differentiated from outside",
    ),
    row(
        "fwd_and_bwd",
        "differs",
        "all(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(vjp(torch.sin, x)[1]))",
        "`vjp`: its pullback is a pytree of the residuals",
    ),
    row(
        "Hessian-vector products: jvp of grad",
        "yes",
        "equal(jvp(grad(lambda x: (x**3).sum()), (x,), (y,))[1], hvp(lambda x: (x**3).sum(), (x,), (y,))[1][0])",
        "as in JAX, and `hvp` by name",
    ),
    row("lax.stop_gradient", "differs", "equal(grad(lambda x: (x.detach() * x).sum())(x), x)", "`x.detach()`"),
    row(
        "pure_callback",
        "differs",
        "equal(grad(lambda x: (x * float(x.detach().sum())).sum())(x), 6 * torch.ones(3))",
        "Python runs anyway; under vmap there is no number to hand it",
    ),
    row("debug.print", "differs", "tests/test_debug_print.py::test_a_line_for_each_example", "`debug_print`"),
    row(
        "debug.callback",
        "differs",
        "tests/test_reading_numbers.py::test_texts",
        "Python runs anyway; `debug_unwrap` is the whole batch",
    ),
    row("jit", "differs", "tests/test_compile.py::test_programs_go_into_one_graph", COMPILING),
    row(
        "make_jaxpr",
        "differs",
        "tests/test_make_trace.py::test_the_source",
        "`make_trace`, as Python; `make_fx` and `torch.export` work too",
    ),
    row("eval_shape", "differs", "grad(torch.sum)(torch.ones(3, device='meta')).shape == (3,)", "`device=\"meta\"`"),
    row("named_call", "no", "not hasattr(functrans, 'named_call')", "profilers see Python's names"),
    row("pmap, shard_map", "no", "not hasattr(functrans, 'shard_map')", ONE_DEVICE),
    row(
        "lax.psum, pmean, pmax, pmin, all_gather, axis_index",
        "yes",
        "tests/test_collectives.py::test_values",
        "under vmaps of that name ([named_axes.md](named_axes.md))",
    ),
    row("lax.ppermute, all_to_all, psum_scatter", "no", "not hasattr(functrans, 'ppermute')", "`all_gather`"),
    row(
        "lax.cond, lax.scan, lax.while_loop, lax.map, lax.associative_scan",
        "yes",
        "tests/test_control_flow.py::test_against_python",
        "`torch.cond` and its kind under every transform ([control_flow.md](control_flow.md)), or Python's own `if`",
    ),
]

#: Parameters that are what a transform is given, and no options.
GIVEN = {"func", "fun", "primals", "tangents", "module", "parameter_and_buffer_dicts", "models", "root", "tensor"} | {
    "pattern", "axes_lengths", "example_args",
}  # fmt: skip
#: Names of JAX whose options are asked for, by the module that has them.
JAX_NAMES = {
    "jax": ["grad", "value_and_grad", "jacfwd", "jacrev", "hessian", "jvp", "vjp", "linearize", "linear_transpose"]
    + ["vmap", "checkpoint", "custom_jvp", "custom_vjp", "custom_gradient", "closure_convert"],
}


def names_of_torch_func() -> Iterator[str]:
    """Every name of the installed torch.func, and its options, as rows call them."""
    import torch

    for name in torch.func.__all__:
        yield from names_of(name, getattr(torch.func, name))


def names_of_jax() -> Iterator[str]:
    """The names and options of the installed JAX's transforms."""
    for module, names in JAX_NAMES.items():
        for name in names:
            yield from names_of(name, getattr(importlib.import_module(module), name))


def names_of(name: str, function: Any) -> Iterator[str]:
    yield name
    for option in inspect.signature(function).parameters:
        if option not in GIVEN:
            yield f"{name}({option})"


def named(rows: list[Row]) -> set[str]:
    """The names that rows are about: ``f(a, b)`` is two options, ``f, g`` two names."""
    found = set()
    for name in (r.name for r in rows):
        function, _, options = name.partition("(")
        if options:
            found.update(f"{function}({option.strip()})" for option in options.rstrip(")").split(","))
        else:
            found.update(part.strip() for part in name.split(","))
    return found


HEAD = """\
# Name by name: torch.func and JAX

Every name and option of `torch.func` (PyTorch 2.11 to 2.15) and of JAX's [transforms](glossary.md#transform) (0.10),
and whether functrans has it. What shows it is a line that is true, or a test; `tests/test_torch_func_table.py` runs the
lines, and compares the names with those of what is installed. The page is written by
`python tests/checkers/torch_func_table.py`.

In the lines `x` is [1, 2, 3], `y` [4, 5, 6], `m` a matrix of 3 × 2 and `z` a complex number; `equal` compares trees of
tensors, `refused(f, ...)` says whether `f(...)` is an error of functrans, `parameters(f)` are the names of its
parameters. How errors, corner cases and what PyTorch gets wrong differ is in [differences.md](differences.md), the
words are in [glossary.md](glossary.md), and [compat.md](compat.md) puts functrans in the place of torch.func for a
whole program.

"""
COLUMNS = "| name | here | how, or why not | shown by |\n|---|---|---|---|\n"


def line(r: Row) -> str:
    file, is_test, test = r.shown.partition("::")
    shown = f"[{test}](../{file})" if is_test else f"`{r.shown}`"
    return f"| `{r.name}` | {r.answer} | {r.reason} | {shown} |\n"


def page() -> str:
    """docs/torch_func.md."""
    more = sorted(set(options_of_ours()) - named(TORCH_FUNC))
    return "".join(
        [
            HEAD,
            "## torch.func\n\n",
            COLUMNS,
            *map(line, TORCH_FUNC),
            "\nOn top of it: ",
            ", ".join(f"`{name}`" for name in more),
            ".\n\n## JAX\n\n",
            COLUMNS,
            *map(line, JAX),
        ]
    )


def options_of_ours() -> Iterator[str]:
    """The public functions of functrans and their options, as rows call them; what registers rules is no transform."""
    import functrans

    for name in functrans.__all__:
        function = getattr(functrans, name)
        if inspect.isfunction(function) and name not in ("derivative", "batching_rule"):
            yield from names_of(name, function)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
