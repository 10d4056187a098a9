"""Something to do once a module has been imported, which is left to whoever needs it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any


class WhenImported(MetaPathFinder):
    """Calls ``then`` when the module ``awaited`` has been imported."""

    def __init__(self, awaited: str, then: Callable[[], None]) -> None:
        self.awaited, self.then = awaited, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: Any) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call ``then`` once the module ``name`` has been imported: at once, if it has."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, WhenImported(name, then))
