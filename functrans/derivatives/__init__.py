"""The derivative table, by family of operators. Importing ``load`` and calling it registers every family."""

import importlib
import pkgutil


def load() -> None:
    """Import every module of this package; each registers its entries."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
