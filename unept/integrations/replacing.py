"""Functions of other packages, replaced wherever loaded modules hold them, and put back."""

import sys
from types import ModuleType
from typing import Any


class Replacements:
    """What has been replaced where. Nothing happens twice: what is replaced is not found again."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any]] = []

    def __len__(self) -> int:
        return len(self._done)

    def attribute(self, owner: Any, name: str, ours: Any) -> None:
        """Replace an attribute of a module, which it need not have yet."""
        self._done.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, ours)

    def everywhere(self, original: Any, ours: Any) -> None:
        """Replace an object in all modules that are loaded and hold it under any name."""
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType):
                for name in [name for name, value in vars(module).items() if value is original]:
                    self.attribute(module, name, ours)

    def module(self, name: str, ours: ModuleType) -> None:
        """Let `import name` find another module."""
        self._done.append((sys.modules, name, sys.modules.get(name)))
        sys.modules[name] = ours

    def undo(self) -> int:
        """Put everything back.

        Returns:
            The number of places.
        """
        count = len(self._done)
        while self._done:
            owner, name, original = self._done.pop()
            if owner is sys.modules and original is None:
                del sys.modules[name]
            elif owner is sys.modules:
                sys.modules[name] = original
            elif original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        return count
