"""``functrans tour``: what the transforms are for, on real data, each compared with plain PyTorch on the spot.

The data are the handwritten digits that come with scikit-learn: 1,797 images of 8x8 pixels. A small convolutional
network is trained on them with differentially private SGD, which needs the gradient of *every example on its own*;
then its curvature is looked at, and an ensemble of such networks is trained as one.

Everything is computed in float64, so that agreement with plain PyTorch is a matter of rounding and nothing else.
"""

from __future__ import annotations

import sys
import time

import torch

from functrans.tour.data import load_digits
from functrans.tour.report import Report, duration
from functrans.tour.stations import Settings, Tour

__all__ = ["Settings", "run"]


def run(settings: Settings) -> int:
    """Go on the tour; 0 if every comparison with plain PyTorch held, 1 if one did not, 2 if a package is missing."""
    try:
        import sklearn
        import tqdm  # noqa: F401
    except ImportError as error:
        print(
            f"functrans tour needs {error.name}, which is not installed. The tour's extra brings it:\n"
            "    pip install 'functrans[tour]'",
            file=sys.stderr,
        )
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operations are so small that threads would only wait for each other
    try:
        return _go(settings, sklearn.__version__)
    finally:
        torch.set_num_threads(threads)


def _go(settings: Settings, sklearn_version: str) -> int:
    start = time.perf_counter()
    report = Report()
    digits = load_digits(settings.seed)
    print("A tour of functrans: function transforms at work, and checked against plain PyTorch")
    report.line(f"torch {torch.__version__}, one thread, float64")
    report.line(
        f"scikit-learn {sklearn_version}'s handwritten digits: {len(digits.train_images):,} to train on, "
        f"{len(digits.test_images)} to test"
    )
    tour = Tour(settings, digits, report)
    tour.train_privately()
    tour.hessian_vector_product()
    tour.logit_hessians()
    tour.ensemble()
    print(f"\n{duration(time.perf_counter() - start)} in all.")
    if report.failed:
        print("These differ from plain PyTorch: " + "; ".join(report.failed) + ".", file=sys.stderr)
        return 1
    print("Every result agrees with plain PyTorch.")
    return 0
