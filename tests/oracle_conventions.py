"""What the oracles of ``oracles.py`` do not judge, one by one, each with its reason."""

from __future__ import annotations

CONVENTIONS: dict[str, tuple] = {}
LOOSE: dict[str, float] = {}
