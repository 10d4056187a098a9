"""Seeing a stack of transforms at work: ``functrans.explain`` and what goes with it.

This package and the function ``explain`` have one name: ``functrans.explain`` is the function, and ``from
functrans.explain import ...`` and ``python -m functrans.explain`` find the package.
"""

from functrans.explain.explaining import explain

__all__ = ["explain"]
