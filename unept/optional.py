"""Packages that only some functions need: imported when they are needed, with one clear line where they are absent."""

import importlib
from typing import Any


def require(module: str, purpose: str, package: str | None = None) -> Any:
    """Import a module of an optional package.

    Args:
        module: name of the module.
        purpose: what needs it, the subject of a sentence, such as "a video".
        package: the name to install it by; None is the module's.

    Raises:
        ValueError: the package is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise ValueError(f"{purpose} needs the package {package} ({error}): pip install {package}") from error
