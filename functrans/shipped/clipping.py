"""``clipped_grad`` and ``per_example_norms``: what differentially private training needs of single examples' gradients.

The loss of one example is differentiated inside of vmap, and the walk back leaves gradients in factors (NOTE [Gradients
in factors]). The clipped sum is made of these, so there is one walk, and mostly no gradient of a single example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.arguments import Argnums, check_argnums, gradients_by
from functrans.api.batches import Asked, Batch, for_chunks, joined
from functrans.api.checks import check_chunk_size, check_dense, check_randomness
from functrans.api.compiled import TRACED, manner, named_after
from functrans.api.in_dims import check_in_dims, check_inputs
from functrans.api.reverse import differentiating, run_scalar
from functrans.api.structures import path_of
from functrans.boundary.facades import bare
from functrans.boundary.factories import ones_for
from functrans.errors import Call, CallTypeError, CallValueError
from functrans.errors.wording import shown, what
from functrans.pytorch.torch_private import autocast_off
from functrans.shipped.example_gradients import ExampleInterpreter
from functrans.shipped.gradient_parts import Gradient
from functrans.tensors.pytrees import tree_flatten, tree_unflatten


@manner(records=True)
def clipped_grad(
    loss: Callable[..., Any],
    bound: float | Tensor,
    argnums: Argnums = 0,
    in_dims: Any = None,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The sum of the examples' gradients, each clipped to a norm of at most ``bound``: the gradient of DP-SGD.

    It is what ``vmap(grad(loss))``, a multiplication of each example's gradient by min(1, bound / norm) and a sum over
    the examples return, mostly without a gradient for each example being there. The norm is that of an example's whole
    gradient, of all arguments in ``argnums`` together.

    Args:
        loss: of one example: takes the parameters and what belongs to one example, and returns a scalar (with
            ``has_aux``, a pair of that and a pytree of tensors).
        bound: a positive number, or a positive floating-point tensor without dimensions.
        argnums: position, or tuple of positions, of the arguments to differentiate for, which all examples share.
        in_dims: for each positional argument, which dimension counts the examples, as in ``vmap``; None for those of
            ``argnums``. None in place of all: those have None, the others 0. Keyword arguments are the same for every
            example.
        has_aux: ``loss`` returns ``(output, aux)``; aux comes back with the examples in front.
        randomness: what random operators do, as in ``vmap``.
        chunk_size: run at most this many examples at a time. What the sum is made of is kept until the norms are known,
            which may be as much again as the activations; chunks bound that. None: all, or two halves where many rows
            meet matrices so large that it costs little time.

    Returns:
        A function of the arguments. It returns the sum, of the structure, shapes and dtypes of the argument that
        ``argnums`` names (a tuple of them if ``argnums`` is one), or ``(sum, aux)``.

    Raises:
        CallError: an argument is not what is described above, or the loss is no scalar.

    Example:
        >>> import torch
        >>> from functrans import clipped_grad
        >>> loss = lambda w, x: torch.dot(w, x)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
        >>> clipped_grad(loss, 1.0)(torch.zeros(2), x)
        tensor([0.6000, 1.3000])
    """
    call = differentiating("clipped_grad", loss, argnums, has_aux)
    call.arguments = {"bound": bound, **call.arguments}
    bound = checked_bound(call, bound)
    check_batching(call, in_dims, randomness, chunk_size)
    options = {"argnums": argnums, "in_dims": in_dims, "has_aux": has_aux, "randomness": randomness,
               "chunk_size": chunk_size}  # fmt: skip

    @named_after(loss)
    def clipped(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(clipped_grad, loss, options, args, kwargs, {"bound": bound})
        positions = check_argnums(call, argnums, len(args))
        shared = [tree_flatten(args[i]) for i in positions]
        check_shared(call, in_dims, args, positions)
        leaves = [bare(x) for found, _ in shared for x in found]
        sums: list[Any] = [None] * len(leaves)
        auxes: list[Any] = []

        def add(norms: Tensor, gradients: list[Gradient], aux: Any) -> None:
            over = norms > bound
            weights = torch.where(over, bound / torch.where(over, norms, 1), 1)
            for i in reversed(range(len(leaves))):  # each gradient is let go of once it is added up
                found = gradients.pop().weighted_sum(weights, leaves[i])
                if type(sums[i]) is type(found) is Tensor and not found.requires_grad:
                    sums[i] += found  # in place: without a second sum
                else:
                    sums[i] = found if sums[i] is None else sums[i] + found
            auxes.append(aux)

        by_chunk(add, call, loss, argnums, in_dims, has_aux, randomness, chunk_size, args, kwargs)
        rest = iter(sums)
        trees = [tree_unflatten(spec, gradients_by(given, [next(rest) for _ in given])) for given, spec in shared]
        total = trees[0] if isinstance(argnums, int) else tuple(trees)
        return (total, joined(call, auxes, 0)) if has_aux else total

    return clipped


@manner(records=True)
def per_example_norms(
    loss: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The norm of every example's gradient, mostly without the gradient being there.

    Args:
        loss: of one example, as in ``clipped_grad``.
        argnums: position, or tuple of positions, of the arguments to differentiate for. The norm is that of the whole
            gradient, of all of them together.
        in_dims: as in ``clipped_grad``; here those of ``argnums`` may have a dimension that counts the examples, too.
        has_aux: ``loss`` returns ``(output, aux)``; aux comes back with the examples in front.
        randomness: what random operators do, as in ``vmap``.
        chunk_size: as in ``clipped_grad``.

    Returns:
        A function of the arguments, which returns a tensor with a norm for each example, or ``(norms, aux)``. The norms
        of half-precision gradients are float32. The derivative of a norm of zero is zero.

    Raises:
        CallError: an argument is not what is described above, or the loss is no scalar.

    Example:
        >>> import torch
        >>> from functrans import per_example_norms
        >>> loss = lambda w, x: torch.dot(w, x)
        >>> per_example_norms(loss)(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
        tensor([5.0000, 0.5000])
    """
    call = differentiating("per_example_norms", loss, argnums, has_aux)
    check_batching(call, in_dims, randomness, chunk_size)
    options = {"argnums": argnums, "in_dims": in_dims, "has_aux": has_aux, "randomness": randomness,
               "chunk_size": chunk_size}  # fmt: skip

    @named_after(loss)
    def norms_of(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(per_example_norms, loss, options, args, kwargs, None)
        found: list[Any] = []
        take = lambda norms, gradients, aux: found.append((norms, aux))
        by_chunk(take, call, loss, argnums, in_dims, has_aux, randomness, chunk_size, args, kwargs)
        norms, aux = joined(call, found, 0)
        return (norms, aux) if has_aux else norms

    return norms_of


def by_chunk(
    take: Callable[[Tensor, list[Gradient], Any], None],
    call: Call,
    loss: Callable[..., Any],
    argnums: Argnums,
    in_dims: Any,
    has_aux: bool,
    randomness: str,
    chunk_size: int | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Hand over, of each chunk of examples, the norms, the gradients for each tensor, and aux."""

    @functools.wraps(loss, updated=())
    def one_example(*args: Any, **kwargs: Any) -> tuple[list[Gradient], Tensor, Any]:
        level = ExampleInterpreter(loss)
        inputs, value, index, aux = run_scalar(level, call, loss, argnums, has_aux, args, kwargs)
        indices = [i for position in inputs.order for i in inputs.leaf_indices[position]]
        leaves = (wrapper for position in inputs.order for wrapper in inputs.tracked[position][1])
        level.leaves = {w.tape_index: w.dim() for w in leaves if w.tape_index is not None}
        cotangents = {} if index is None else level.pull({index: ones_for(bare(value))}, consume=True)
        inputs.write_back()
        return [level.gradient(cotangents, i) for i in indices], bare(value), aux

    dims, positions = in_dims, check_argnums(call, argnums, len(args))
    if dims is None:
        dims = tuple(None if i in positions else 0 for i in range(len(args)))
    for i in positions:
        for place, leaf in enumerate(tree_flatten(args[i])[0]):
            if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout is not torch.strided):
                path = path_of(f"args[{i}]", args[i], place)
                raise CallTypeError(call, f"{path} of layout {leaf.layout}", "a dense tensor")
    batch = Batch(*check_inputs(call, dims, args), kwargs)
    parameters = [x for i in positions for x in tree_flatten(args[i])[0]]

    def with_norms(out: Any) -> None:
        gradients, values, aux = out
        # in the list that came, so that nothing else holds what is let go of
        gradients[:] = [g.settled(x) for g, x in zip(gradients, parameters, strict=True)]
        # whatever precision the loss is computed in
        with autocast_off():
            squares = [s for s in (g.squared_norms() for g in gradients) if s is not None]
            take(root(sum(squares[1:], squares[0])) if squares else torch.zeros_like(values), gradients, aux)

    asked = Asked(call, one_example, 0, randomness)
    tensors = [x for x in parameters if isinstance(x, Tensor)]
    halves = chunk_size is None and randomness == "error" and worth_halving(tensors, batch)
    for_chunks(with_norms, asked, batch, -(-batch.size // 2) if halves else chunk_size or batch.size)


#: multiplications of a matrix with all rows, beside which a second run of the function costs little
LARGE = 1 << 27


def worth_halving(parameters: list[Tensor], batch: Batch) -> bool:
    """Whether a batch is better run in two halves.

    What is kept until the norms are known, a cotangent for each input of a layer, is as much again as the activations;
    of half of the examples both are as much as the activations of all. So it is where rows of inputs outweigh the
    matrices that they are multiplied by, and where these products take so long that running the function twice is a
    small part of it. Both are read off the shapes, for matrices that are applied once to each row of the batch.
    """
    sizes = [p.numel() for p in parameters if p.dim() == 2]
    if not sizes or batch.size < 2 or any(p.dim() > 2 or p.device.type != "cpu" for p in parameters):
        return False
    rows = max(rows_of(x, d) for x, d in zip(batch.leaves, batch.dims, strict=True) if d is not None)
    kept = rows * sum(sum(p.shape) for p in parameters if p.dim() == 2)
    return kept > sum(sizes) and rows * sum(sizes) > LARGE * len(sizes)


def rows_of(x: Any, dim: int) -> int:
    """How many vectors a batched argument has; an integer stands for one."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        return x.numel() if isinstance(x, Tensor) else 1
    last = x.shape[-2] if dim % x.dim() == x.dim() - 1 else x.shape[-1]
    return x.numel() // max(last, 1)


def root(square: Tensor) -> Tensor:
    """The square root, with a derivative of zero at zero; rounding may make a sum of squares less than that."""
    positive = square > 0
    return torch.where(positive, square, 1).sqrt() * positive


def checked_bound(call: Call, bound: Any) -> float | Tensor:
    expected = "a positive number, or a positive floating-point tensor without dimensions"
    if isinstance(bound, Tensor):
        check_dense(call, "bound", bound, expected, kinds="f")
        if bound.dim() != 0:
            raise CallValueError(call, f"{what(bound)} as bound", expected)
        known = type(bound) in (Tensor, torch.nn.Parameter) and not bound.is_meta and not is_dynamo_compiling()
        if known and not bound > 0:
            raise CallValueError(call, f"bound=tensor({bound.item()})", expected)
        return bound
    if not isinstance(bound, int | float) or isinstance(bound, bool):
        raise CallTypeError(call, f"{what(bound)} as bound", expected)
    if not bound > 0:
        raise CallValueError(call, f"bound={shown(bound)}", expected)
    return float(bound) if bound < 1e300 else float("inf")  # an int may be too large for a float


def check_batching(call: Call, in_dims: Any, randomness: Any, chunk_size: Any) -> None:
    if in_dims is not None:
        check_in_dims(call, in_dims)
    check_randomness(call, randomness)
    check_chunk_size(call, chunk_size)
    for name, value, usual in (("in_dims", in_dims, None), ("randomness", randomness, "error")):
        if value != usual:
            call.arguments[name] = value


def check_shared(call: Call, in_dims: Any, args: tuple[Any, ...], positions: tuple[int, ...]) -> None:
    """All examples share what the gradients are summed for."""
    given = [None] * len(args) if in_dims is None else [in_dims] * len(args) if isinstance(in_dims, int) else in_dims
    for i in positions:
        if i < len(given) and any(d is not None for d in tree_flatten(given[i])[0]):
            got = f"in_dim {shown(given[i])} for args[{i}]"
            expected = "None for an argument to differentiate for, which all examples share"
            raise CallValueError(call, got, expected, "functrans.vmap(functrans.grad(loss)) has a gradient for each.")
