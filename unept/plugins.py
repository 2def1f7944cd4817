"""Find code outside this package that an option names: modules that register things, and objects in them."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any


def import_modules(names: Iterable[str]) -> None:
    """Import modules, such as those that register a dataset; the working folder is searched too.

    Raises:
        ValueError: there is no such module.
    """
    for name in names:
        _import(name, "imports")


def load_object(name: str, option: str) -> Any:
    """Return the object that an option names as `module:object`.

    Raises:
        ValueError: the name has another form, or there is no such module or object in it.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(f"{option} is {name!r}; give module:object, such as my_module:augment")
    found = _import(module, option)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option} is {name!r}, but {module} has no {attribute}: check the name")
        found = getattr(found, part)
    return found


def _import(name: str, option: str) -> Any:
    with contextlib.ExitStack() as stack:
        if (folder := os.getcwd()) not in sys.path:  # as `python -m` has it, but not the commands that pip installs
            sys.path.append(folder)
            stack.callback(sys.path.remove, folder)
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, but not what it imports
            raise ValueError(
                f"{option} names the module {name}, which is not found: start the command in its folder, or add that "
                "to PYTHONPATH"
            ) from error
        if (getattr(module, "__file__", None) or "").startswith(os.path.join(folder, "")):
            stack.pop_all()  # the processes of loaders that are not forked look for the module there too
        return module
