"""What the oracles of ``oracles.py`` do not judge, one by one, each with its reason.

These are no tolerated errors: either there is no derivative (and PyTorch's choice is followed), or the question is
another one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Convention:
    """Findings that are set aside: those whose fields match all the patterns."""

    reason: str
    check: str = ""
    variant: str = ""
    case: str = ""
    outcome: str = ""
    detail: str = ""

    def matches(self, finding: Any) -> bool:
        """Whether ``finding`` is of this kind."""
        fields = ("check", "variant", "case", "outcome", "detail")
        return all(re.search(getattr(self, f), getattr(finding, f)) for f in fields)


#: (operators, what of them is set aside)
_CONVENTIONS: tuple[tuple[str, Convention], ...] = (
    ("clamp clamp_min clamp_max", Convention(
        "where the bounds and the input meet at one value the function has no derivative; "
        "PyTorch takes that of the input",
        variant="ties|zero|identity", check="differences",
    )),
    ("copysign",
        Convention("at (0, 0) it is linear along every line, and yet has no derivative", variant="zero|identity")),
    ("bfloat16 half chalf",
        Convention("the result is rounded to steps larger than those of the differences; so are cotangents",
            outcome="wrong")),
    ("normal normal.number_mean", Convention(
        "a draw is a constant, as in PyTorch's table: "
        "torch.distributions has rsample for a draw that depends on its parameters",
        check="differences",
    )),
    ("to_sparse",
        Convention("elements that are 0 are not stored, and have no derivative", variant="ties|zero|identity",
            check="differences")),
    ("nn.functional.normalize", Convention(
        "at 0 the slope is 1 / eps = 1e12, on a length that no difference can resolve", variant="zero|identity",
        check="differences"
    )),
    ("nn.functional.cosine_similarity", Convention(
        "at 0 the slope is 1 / eps = 1e8, on a length that no difference can resolve", variant="zero|identity",
        check="differences",
        detail=r"^(?!nan)",
    )),
    ("nn.functional.cosine_embedding_loss",
        Convention("the target is a label that is compared with 1 and -1", case=r"\b2\b|tracked \(2")),
    ("nn.functional.gaussian_nll_loss", Convention(
        "PyTorch clamps the variance under no_grad: "
        "reverse mode keeps the derivative of what was clamped, forward mode follows the clamp",
        variant="zero|identity|ties",
    )),
    ("nn.functional.rrelu", Convention(
        "numbers are drawn for negative elements only, so that a batch draws others than a loop", check="loop"
    )),
    ("masked.logaddexp", Convention(
        "masked elements are -inf in both arguments, whose derivative is NaN", check="grad", detail="^nan"
    )),
    ("float_power", Convention(
        "at base 0 and exponents from 0 to 1 the mixed second derivative is infinite; reverse mode has NaN there",
        variant="ties|zero", check="^grad of .* against differences", detail="^nan",
    )),
    ("grid_sampler_2d grid_sampler_3d", Convention(
        "on the border of cells there is no second derivative; that of the cell behind it is taken, in all modes",
        variant="ties|zero", check=" of .* against differences",
    )),
    ("xlogy", Convention(
        "at (0, 0) the slope by the second argument is 0 / 0, as in PyTorch; the mixed derivative is infinite there",
        variant="zero|identity", check="differences", detail="^nan",
    )),
    ("svd_lowrank pca_lowrank", Convention(
        "at 0 and at repeated singular values the vectors are free to turn, and the values have a kink",
        variant="zero|identity|ties"
    )),
)  # fmt: skip

CONVENTIONS: dict[str, tuple[Convention, ...]] = {}
for _names, _convention in _CONVENTIONS:
    for _name in _names.split():
        CONVENTIONS[_name] = (*CONVENTIONS.get(_name, ()), _convention)

#: Operators whose result is amplified rounding error: the tolerances are multiplied by this.
LOOSE: dict[str, float] = {
    "cov": 100.0,  # weights of both signs are divided by their sum
}
