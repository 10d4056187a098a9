"""vmap against a loop for every operator of OpInfo: a slice by default, the exhaustive run marked slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vmap_against_loop as oracle
from vmap_against_loop import ANSWERED, REFUSED, WRONG, Finding

import functrans
from functrans.pytorch.versions import INSTALLED

OPERATORS = oracle.operators()


def unexpected(findings: list[Finding]) -> list[str]:
    return [str(f) for f in findings if (f.op, f.kind) not in oracle.CONVENTIONS]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    findings, _ = oracle.check(OPERATORS[name], limit=1, spoils=2, dtypes=(torch.float64,))
    assert not unexpected(findings), "\n".join(unexpected(findings))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_exhaustively(name: str) -> None:
    findings, _compared = oracle.check(OPERATORS[name], limit=12, spoils=None)
    assert not unexpected(findings), "\n".join(unexpected(findings))
    stale = [kind for op, kind in oracle.CONVENTIONS if op == name and kind not in {f.kind for f in findings}]
    assert not stale, f"{name}: {stale} no longer happens: delete it from CONVENTIONS"


def test_conventions_name_what_exists() -> None:
    for name, kind in oracle.CONVENTIONS:
        later = INSTALLED < (2, 13) and name == "nn.functional.linear_cross_entropy"
        assert (name in OPERATORS or later) and kind in (WRONG, ANSWERED, REFUSED)


def swapped(f: Any, in_dims: Any, **options: Any) -> Any:
    return lambda *args: [x.roll(1, 0) for x in VMAP(f, in_dims, **options)(*args)]


def widened(f: Any, in_dims: Any, **options: Any) -> Any:
    return lambda *args: [x.unsqueeze(-1) for x in VMAP(f, in_dims, **options)(*args)]


def retyped(f: Any, in_dims: Any, **options: Any) -> Any:
    return lambda *args: [x.float() for x in VMAP(f, in_dims, **options)(*args)]


def refusing(f: Any, in_dims: Any, **options: Any) -> Any:
    return lambda *args: functrans.nothing  # type: ignore[attr-defined]


def answering(f: Any, in_dims: Any, **options: Any) -> Any:
    def run(*args: Any) -> Any:
        try:
            return VMAP(f, in_dims, **options)(*args)
        except (RuntimeError, IndexError):
            return [torch.zeros(3)]

    return run


VMAP = functrans.vmap


@pytest.mark.parametrize(
    ("planted", "kind"),
    [(swapped, WRONG), (widened, WRONG), (retyped, WRONG), (refusing, REFUSED), (answering, ANSWERED)],
)
@pytest.mark.parametrize("name", ["linalg.det", "mm", "cumsum"])
def test_planted_bugs_are_found(planted: Any, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functrans, "vmap", planted)
    findings, _ = oracle.check(OPERATORS[name], limit=2, spoils=8, dtypes=(torch.float64,))
    assert kind in {f.kind for f in findings}


MATRICES = {
    "det": torch.linalg.det, "slogdet": torch.linalg.slogdet, "eig": torch.linalg.eig, "eigvals": torch.linalg.eigvals,
    "eigh": torch.linalg.eigh,
    "eigvalsh": torch.linalg.eigvalsh, "inv": torch.linalg.inv, "inv_ex": torch.linalg.inv_ex,
    "cholesky": torch.linalg.cholesky,
    "cholesky_ex": torch.linalg.cholesky_ex, "lu": torch.linalg.lu, "lu_factor": torch.linalg.lu_factor,
    "ldl_factor": torch.linalg.ldl_factor,
    "pinv": torch.linalg.pinv, "qr": torch.linalg.qr, "svd": torch.linalg.svd, "svdvals": torch.linalg.svdvals,
    "matrix_exp": torch.linalg.matrix_exp,
    "matrix_rank": torch.linalg.matrix_rank, "matrix_power": lambda a: torch.linalg.matrix_power(a, 3),
    "logdet": torch.logdet, "trace": torch.trace,
    "lstsq": lambda a: torch.linalg.lstsq(a, a).solution, "solve": lambda a: torch.linalg.solve(a, a),
    "tril": torch.tril, "triu": torch.triu,
    "solve_triangular": lambda a: torch.linalg.solve_triangular(a, a, upper=True),
    "cholesky_inverse": torch.cholesky_inverse, "mT": lambda a: a.mT,
    "cholesky_solve": lambda a: torch.cholesky_solve(a, a),
    "triangular_solve": lambda a: torch.triangular_solve(a, a)[0], "cdist": lambda a: torch.cdist(a, a),
    "tensorinv": lambda a: torch.linalg.tensorinv(a, 1), "norm": lambda a: torch.linalg.matrix_norm(a),
    "cond": torch.linalg.cond, "mm": lambda a: a.mm(a),
    "diagonal": torch.diagonal, "geqrf": torch.geqrf, "vander": lambda a: torch.linalg.multi_dot([a, a, a]),
    "pdist": torch.nn.functional.pdist,
}  # fmt: skip
#: Of tensors of a rank less than they take: they would take the batch for a dimension.
LAYERS = {
    "bmm": (lambda x: torch.bmm(x, x), 2), "baddbmm": (lambda x: torch.baddbmm(x, x, x), 2),
    "conv1d": (lambda x: torch.conv1d(x, x), 1),
    "conv2d": (lambda x: torch.conv2d(x[None, None], x), 2), "max_pool1d": (lambda x: torch.max_pool1d(x, 2), 1),
    "max_pool2d": (lambda x: torch.max_pool2d(x, 2), 2), "max_pool3d": (lambda x: torch.max_pool3d(x, 2), 3),
    "avg_pool2d": (lambda x: torch.nn.functional.avg_pool2d(x, 2), 2),
    "adaptive_avg_pool2d": (lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2), 2),
    "interpolate": (lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0), 2),
    "fold": (lambda x: torch.nn.functional.fold(x, (3, 3), (1, 1)), 1),
    "unfold": (lambda x: torch.nn.functional.unfold(x, 2), 2),
    "grid_sample": (lambda x: torch.nn.functional.grid_sample(x, x), 3),
    "batch_norm": (lambda x: torch.nn.functional.batch_norm(x, None, None, training=True), 1),
    "group_norm": (lambda x: torch.nn.functional.group_norm(x, 1), 1),
    "pixel_shuffle": (lambda x: torch.pixel_shuffle(x, 1), 2),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 1), 2), "cross": (lambda x: torch.linalg.cross(x, x), 0),
    "dot": (lambda x: torch.dot(x, x), 0),
    "mv": (lambda x: torch.mv(x, x), 1), "ger": (lambda x: torch.outer(x, x), 0),
    "einsum": (lambda x: torch.einsum("ij,jk", x, x), 1),
    "reflection_pad2d": (lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), 1),
    "glu": (torch.nn.functional.glu, 0),
    "select": (lambda x: x.select(0, 0), 0), "unbind": (torch.unbind, 0), "flip": (lambda x: x.flip(1), 1),
    "unflatten": (lambda x: x.unflatten(1, (1, -1)), 1),
    "bilinear": (lambda x: torch.nn.functional.bilinear(x, x, x), 1), "fft2": (torch.fft.fft2, 1),
    "multinomial": (lambda x: torch.multinomial(x.abs(), 1), 0),
    "rot90": (torch.rot90, 1), "fliplr": (torch.fliplr, 1), "narrow": (lambda x: x.narrow(1, 0, 1), 1),
    "transpose": (lambda x: x.transpose(0, 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MATRICES, *LAYERS])
@pytest.mark.parametrize("batch", ("first", "last", "nested", "inside grad"))
def test_examples_of_too_low_a_rank(name: str, batch: str) -> None:
    """A loop raises, so must vmap; with a dimension more it may answer, and a first answer does not open the door."""
    f, rank = LAYERS.get(name) or (MATRICES[name], 1)
    sides = 3
    x = (
        torch.randn([sides] * (rank + 1), dtype=torch.float64)
        + torch.eye(sides, dtype=torch.float64)[(None,) * max(rank - 1, 0)]
        if rank
        else torch.randn(sides, dtype=torch.float64)
    )
    with pytest.raises((RuntimeError, IndexError)):
        f(x[(0,)])
    for _ in range(2):
        with pytest.raises((RuntimeError, IndexError)):
            if batch == "nested":
                functrans.vmap(functrans.vmap(f, randomness="different"), randomness="different")(x.expand(3, *x.shape))
            elif batch == "inside grad":
                functrans.grad(lambda x: functrans.vmap(f, randomness="different")(x).sum())(x)
            else:
                functrans.vmap(f, in_dims=0 if batch == "first" else -1, randomness="different")(x)


@pytest.mark.parametrize("op", [
    lambda x, d: x.sum(d), lambda x, d: torch.cumsum(x, d), lambda x, d: torch.softmax(x, d),
    lambda x, d: x.unsqueeze(d), lambda x, d: x.squeeze(d),
    lambda x, d: x.transpose(0, d), lambda x, d: torch.cat([x, x], d), lambda x, d: torch.stack([x, x], d),
    lambda x, d: x.flip(d), lambda x, d: x.roll(1, d),
    lambda x, d: x.amax(d), lambda x, d: x.argmax(d), lambda x, d: x.sort(d)[0],
    lambda x, d: x.gather(d, torch.zeros(2, 3, dtype=torch.long)[(0,) * (2 - x.dim())]),
    lambda x, d: x.index_select(d, torch.tensor([0])), lambda x, d: x.select(d, 0), lambda x, d: x.narrow(d, 0, 1),
    lambda x, d: x.unbind(d)[0],
    lambda x, d: x.chunk(2, d)[0], lambda x, d: torch.logsumexp(x, d), lambda x, d: x.norm(dim=d),
    lambda x, d: torch.diff(x, dim=d), lambda x, d: x.var(d),
    lambda x, d: torch.fft.fft(x, dim=d), lambda x, d: x.median(d)[0], lambda x, d: x.unfold(d, 1, 1),
    lambda x, d: x.movedim(0, d), lambda x, d: x.topk(1, d)[0],
])  # fmt: skip
@pytest.mark.parametrize("rank", (0, 1, 2))
def test_dimensions_out_of_range(op: Any, rank: int) -> None:
    x = torch.arange(18.0).reshape(3, 2, 3)[(slice(None), *[0] * (2 - rank))]
    for dim in range(-rank - 3, rank + 3):
        looped, error = oracle.attempt(lambda d=dim: torch.stack([op(e, d) for e in x]))
        for place in {0, rank}:
            got, refusal = oracle.attempt(
                lambda d=dim, p=place: functrans.vmap(lambda e: op(e, d), in_dims=p)(x.movedim(0, p))
            )
            assert (error is None) == (refusal is None), (dim, place, error, refusal)
            if error is None:
                torch.testing.assert_close(got, looped, equal_nan=True)
            elif isinstance(error, IndexError):
                assert isinstance(refusal, IndexError)


@pytest.mark.parametrize("write", [
    lambda x: x.to(torch.complex64).abs_(), lambda x: x.cumsum_(0, dtype=torch.float32),
    lambda x: x.cumprod_(0, dtype=torch.float32),
    lambda x: x.to(torch.complex64).float_power_(2), lambda x: x.long().add_(1.5), lambda x: x.long().sqrt_(),
    lambda x: x.mul_(1j),
    lambda x: x.eq_(0), lambda x: x.float().add_(x), lambda x: x.logical_and_(x), lambda x: x.bool().add_(1),
    lambda x: x.float().copy_(x),
    lambda x: torch.add(x, x, out=x.clone().long()), lambda x: torch.add(x, x, out=x.float()),
])  # fmt: skip
def test_dtypes_of_writes(write: Any) -> None:
    """What PyTorch does not convert in place is not converted here, under any transform."""
    xs = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    looped, error = oracle.attempt(lambda: torch.stack([write(x.clone()) for x in xs]))
    for run in (
        lambda f: functrans.vmap(f)(xs),
        lambda f: functrans.jvp(f, (xs,), (xs,))[0],
        lambda f: functrans.vjp(f, xs)[0],
    ):
        got, refusal = oracle.attempt(lambda r=run: r(lambda x: write(x.clone())))
        if error is not None:
            assert refusal is not None, error
        elif refusal is None:
            assert got.dtype is looped.dtype
        else:
            assert not looped.dtype.is_floating_point and "dtype" in str(refusal)  # vjp wants floating-point outputs
