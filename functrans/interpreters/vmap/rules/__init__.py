"""Batching rules, by family of operators."""

import importlib
import pkgutil


def load() -> None:
    """Import every module of this package; each registers its rules. Pointwise operators without one come last."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    importlib.import_module(f"{__name__}.pointwise").load_tagged()
