"""Second and higher derivatives of operators that an equation defines, as products of lower ones.

NOTE [Remainders]
What is solved for is differentiated in the equation and not in the formula of its tangent. Of A·Y = B the k-th Taylor
coefficients along a curve are

    A₀·Yₖ = Bₖ - Aₖ·Y₀ - Σ Aⱼ·Yₖ₋ⱼ        0 < j < k

which is the tangent of Y along (Aₖ, Bₖ - Σ Aⱼ·Yₖ₋ⱼ): one more solution with the same A₀, where the derivatives of the
tangent's formula, which has a solution and the result in it, would be twice as many with each order. So an entry here
is a list of products; each is added to the tangent of an argument or to a result. Of an operator that is linear as long
as the same elements are chosen (a maximum, a sort) the list is empty. The second derivative along one direction is
twice the second coefficient: ``laplacian`` sums it up over all directions before the tangent is taken.

(Griewank and Walther, Evaluating Derivatives, 2008, chapter 13; for QR and eigenvectors, what keeps the columns
orthonormal, Qᴴ·Q = 1, is an equation of the same kind.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.api.transforms import jvp
from functrans.derivatives.helpers import reduced_dims
from functrans.derivatives.linalg import adjoint, is_vectors, triangle
from functrans.extension.without_rule import is_smooth
from functrans.operators.factors import SEEN
from functrans.operators.info import op_info
from functrans.programs.fusible import by_our_rules
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


class Bound(NamedTuple):
    """One call of an operator: its arguments by name, and its results."""

    args: Mapping[str, Any]
    results: Sequence[Any]


class Product(NamedTuple):
    """``of(call, a, b)`` is bilinear in a and b, coefficients of what ``one`` and ``other`` name: an argument by its
    name, a result by its number. It is added to the tangent of the argument, or to the result, that ``into`` names."""

    into: str | int
    one: str | int
    other: str | int
    of: Callable[[Bound, Tensor, Tensor], Tensor]


Products = list[Product] | Callable[[Bound], list[Product] | None]
#: by operator: the products, or a function of the call that returns them, None: of this call they are not known
REMAINDERS: dict[OpOverload, Products] = {}
#: those that are known of second derivatives alone
OF_SECOND: dict[OpOverload, Products] = {}


def has_remainder(op: OpOverload, order: int) -> bool:
    return op in REMAINDERS or (order == 2 and op in OF_SECOND)


def remainder(
    op: OpOverload, values: Sequence[Any], kwargs: Mapping[str, Any], out: Any, order: int
) -> tuple[Bound, list[Product]] | None:
    """The call and its products, if they are known and the operator's derivative is that of the library."""
    products = OF_SECOND.get(op) if order == 2 and op in OF_SECOND else REMAINDERS.get(op)
    if products is None or not by_our_rules(op):
        return None
    known = op_info(op)
    args = {**dict(zip(known.arguments, [*values, *known.defaults[len(values) :]], strict=True)), **kwargs}
    call = Bound(args, list(out) if isinstance(out, tuple | list) else [out])
    found = products(call) if callable(products) else products
    return None if found is None else (call, found)


def tangent_of(op: OpOverload) -> Callable[..., Any]:
    """The tangent of an operator that the derivative table does not have, called as those of the table."""

    def tangent(values: Sequence[Any], kwargs: dict[str, Any], tangents: dict[int, Any], out: Any) -> Any:
        places = [(i, j) for i, t in tangents.items() for j in (range(len(t)) if type(t) is list else [None])]
        places = [(i, j) for i, j in places if j is None or tangents[i][j] is not None]

        def f(*xs: Tensor) -> list[Tensor]:
            given = [list(v) if isinstance(v, tuple | list) else v for v in values]
            for (i, j), x in zip(places, xs, strict=True):
                if j is None:
                    given[i] = x
                else:
                    given[i][j] = x
            outs = op(*given, **kwargs)
            return [o for o in (outs if isinstance(outs, tuple | list) else [outs]) if is_smooth(o)]

        at = tuple(values[i] if j is None else values[i][j] for i, j in places)
        along = tuple(tangents[i] if j is None else tangents[i][j] for i, j in places)
        rest = iter(jvp(f, at, along)[1])
        if not isinstance(out, tuple | list):
            return next(rest)
        return [next(rest) if is_smooth(o) else None for o in out]

    return tangent


# --- linear, as long as the same elements are chosen ------------------------------------------------------------------

for _op in (
    aten.max.default, aten.min.default, aten.amax.default, aten.amin.default, aten.aminmax.default,
    aten.median.default, aten.nanmedian.default, aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim,
    aten.mode.default, aten.kthvalue.default, aten.sort.default, aten.sort.stable, aten.topk.default,
    aten.cummax.default, aten.cummin.default,
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default,
    aten.nll_loss_forward.default, aten.nll_loss2d_forward.default, aten.multilabel_margin_loss_forward.default,
    aten.block_diag.default, aten.lu_unpack.default, aten.complex.default,
    aten._unsafe_masked_index.default, aten._unsafe_masked_index_put_accumulate.default,
):  # fmt: skip
    REMAINDERS[_op] = []


def by_reduction(call: Bound) -> list[Product] | None:
    """Means and extrema, but not products."""
    return None if call.args["reduce"] == "prod" else []


REMAINDERS[aten.index_reduce.default] = REMAINDERS[aten.scatter_reduce.two] = by_reduction
REMAINDERS[aten.multi_margin_loss.default] = lambda call: [] if call.args["p"] == 1 else None


# --- products ---------------------------------------------------------------------------------------------------------

REMAINDERS[aten.linalg_cross.default] = [
    Product(0, "self", "other", lambda call, a, b: torch.linalg.cross(a, b, dim=call.args["dim"]))
]


def bags(call: Bound, weight: Tensor, of_samples: Tensor) -> Tensor:
    given = {**call.args, "weight": weight, "per_sample_weights": of_samples}
    return aten._embedding_bag(*given.values())[0]


REMAINDERS[aten._embedding_bag.default] = [Product(0, "weight", "per_sample_weights", bags)]

# --- A·Y = B ----------------------------------------------------------------------------------------------------------


def applied(call: Bound, a: Tensor, y: Tensor) -> Tensor:
    if is_vectors(call.args["A"], call.args["B"]):
        return -(a @ y.unsqueeze(-1)).squeeze(-1)
    return -(a @ y) if call.args["left"] else -(y @ a)


def applied_triangle(call: Bound, a: Tensor, y: Tensor) -> Tensor:
    a = triangle(a, call.args["upper"], call.args["unitriangular"])
    return -(a @ y) if call.args["left"] else -(y @ a)


REMAINDERS[aten._linalg_solve_ex.default] = lambda call: None if SEEN.factors else [Product("B", "A", 0, applied)]
REMAINDERS[aten.linalg_solve_triangular.default] = [Product("B", "self", 0, applied_triangle)]
REMAINDERS[aten.linalg_inv_ex.default] = [Product(0, "A", 0, lambda call, a, y: -(call.results[0] @ (a @ y)))]

# --- factors ----------------------------------------------------------------------------------------------------------


def factor_by_factor(call: Bound, a: Tensor, b: Tensor) -> Tensor:
    return -(adjoint(a) @ b) if call.args["upper"] else -(a @ adjoint(b))


REMAINDERS[aten.linalg_cholesky_ex.default] = [Product("self", 0, 0, factor_by_factor)]


def of_lu(call: Bound) -> list[Product] | None:
    if not call.args["pivot"]:
        return None
    return [Product("A", 1, 2, lambda call, lower, upper: -(call.results[0] @ (lower @ upper)))]


def packed(call: Bound, a: Tensor, b: Tensor) -> Tensor:
    size = min(a.shape[-2:])
    permutation = aten.lu_unpack(call.results[0].detach(), call.results[1], False, True)[0]
    return -(permutation @ (a.tril(-1)[..., :size] @ b.triu()[..., :size, :]))


REMAINDERS[aten.linalg_lu.default] = of_lu
REMAINDERS[aten.linalg_lu_factor_ex.default] = lambda call: [Product("A", 0, 0, packed)] if call.args["pivot"] else None


def of_qr(call: Bound) -> list[Product] | None:
    """Qₖ is what the tangent says, and -Q₀·C/2 with C = Σ Qⱼᴴ·Qₖ₋ⱼ, which keeps Qᴴ·Q = 1."""
    q, r = call.results
    if not q.numel() or q.shape[-1] != r.shape[-1] or call.args["mode"] == "r":
        return None
    half = lambda call, a, b: call.results[0] @ (adjoint(a) @ b) / 2
    return [
        Product("A", 0, 1, lambda call, q, r: -(q @ r)),
        Product("A", 0, 0, lambda call, a, b: half(call, a, b) @ call.results[1]),
        Product(0, 0, 0, lambda call, a, b: -half(call, a, b)),
    ]


REMAINDERS[aten.linalg_qr.default] = of_qr


def of_eigenvectors(call: Bound) -> list[Product] | None:
    """A·V = V·Λ, with Vᴴ·V = 1 as for QR. Of complex vectors the phases are no matter of this equation."""
    values, vectors = call.results
    if vectors.is_complex() or not vectors.numel():
        return None

    def hermitian(a: Tensor) -> Tensor:
        return (a + adjoint(a)) / 2

    def unequal(call: Bound, a: Tensor, b: Tensor) -> Tensor:
        c = adjoint(a) @ b
        return -(vectors @ (values.unsqueeze(-1) * c - c * values.unsqueeze(-2)) @ adjoint(vectors)) / 2

    return [
        Product("A", "A", 1, lambda call, a, v: hermitian(a) @ v @ adjoint(vectors)),
        Product("A", 0, 1, lambda call, l, v: -(v * l.unsqueeze(-2)) @ adjoint(vectors)),
        Product("A", 1, 1, unequal),
        Product(1, 1, 1, lambda call, a, b: -(vectors @ (adjoint(a) @ b)) / 2),
    ]


REMAINDERS[aten._linalg_eigh.default] = of_eigenvectors


def of_singular_vectors(call: Bound) -> list[Product] | None:
    """A·V = U·S and Aᴴ·U = V·S, with Uᴴ·U = Vᴴ·V = 1."""
    if not call.args["compute_uv"] or call.args["full_matrices"] or call.args["A"].is_complex():
        return None
    u, s, vh = call.results
    outside = lambda x: x - u @ (u.mT @ x)  # of the span of U

    return [
        Product("A", "A", 2, lambda call, a, b: outside(a @ b.mT) @ vh),
        Product("A", 0, 1, lambda call, a, b: -outside(a * b.unsqueeze(-2)) @ vh),
        Product("A", "A", 0, lambda call, a, b: u @ (b.mT @ a)),
        Product("A", 2, 1, lambda call, a, b: -(u @ (a * b.unsqueeze(-1)))),
        Product("A", 0, 0, lambda call, a, b: u @ ((a.mT @ b) * s.unsqueeze(-2)) @ vh / -2),
        Product("A", 2, 2, lambda call, a, b: u @ (s.unsqueeze(-1) * (a @ b.mT)) @ vh / 2),
        Product(0, 0, 0, lambda call, a, b: u @ (a.mT @ b) / -2),
        Product(2, 2, 2, lambda call, a, b: (a @ b.mT) @ vh / -2),
    ]


REMAINDERS[aten._linalg_svd.default] = of_singular_vectors

# --- determinants -----------------------------------------------------------------------------------------------------


def of_determinant(call: Bound) -> list[Product] | None:
    """tr(A⁻¹·A₂) - tr(A⁻¹·A₁·A⁻¹·A₁) / 2."""
    if call.args["A"].is_complex() or SEEN.factors:
        return None
    solved = lambda a: torch.linalg.solve(call.args["A"], a)
    return [Product(1, "A", "A", lambda call, a, b: (solved(a) * solved(b).mT).sum((-2, -1)) / -2)]


OF_SECOND[aten._linalg_slogdet.default] = of_determinant


# --- roots ------------------------------------------------------------------------------------------------------------


def halved(x: Tensor, root: Tensor) -> Tensor:
    """Of y² = x: what is added to y for what is added to x; 0 where y is 0."""
    return x / (2 * root).masked_fill(root == 0, torch.inf)


def squares(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.conj()).real if a.is_complex() else a * b


MINUS_SQUARE = Product(0, 0, 0, lambda call, a, b: -halved(a * b, call.results[0]))


def of_norm(name: str) -> Callable[[Bound], list[Product] | None]:
    """y² = Σ |x|², or the first or an infinite power of real numbers."""

    def products(call: Bound) -> list[Product] | None:
        power = call.args[name]
        power = 2 if power is None else power
        if power != 2:
            return [] if power in (1, torch.inf, -torch.inf) and not call.args["self"].is_complex() else None
        dim, keepdim = call.args.get("dim"), call.args.get("keepdim", False)

        def summed(call: Bound, a: Tensor, b: Tensor) -> Tensor:
            found = squares(a, b).sum(reduced_dims(dim, a.dim()), keepdim=keepdim)
            return halved(found.to(call.results[0].dtype), call.results[0])

        return [Product(0, "self", "self", summed), MINUS_SQUARE]

    return products


REMAINDERS[aten.linalg_vector_norm.default] = of_norm("ord")
REMAINDERS[aten.norm.Scalar] = REMAINDERS[aten.norm.ScalarOpt_dim] = of_norm("p")


def covariance(call: Bound, a: Tensor, b: Tensor) -> Tensor:
    dims = reduced_dims(call.args["dim"], a.dim())
    count = torch.Size([a.shape[d] for d in dims]).numel()
    correction = 1 if call.args["correction"] is None else call.args["correction"]
    product = squares(a - a.mean(dims, keepdim=True), b - b.mean(dims, keepdim=True))
    return product.sum(dims, keepdim=call.args["keepdim"]) / max(count - correction, 0)


SPREAD = [
    Product(0, "self", "self", lambda call, a, b: halved(covariance(call, a, b), call.results[0])), MINUS_SQUARE
]  # fmt: skip
REMAINDERS[aten.var.correction] = REMAINDERS[aten.var_mean.correction] = [Product(0, "self", "self", covariance)]
REMAINDERS[aten.std.correction] = REMAINDERS[aten.std_mean.correction] = SPREAD
