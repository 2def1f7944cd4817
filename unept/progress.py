"""Show progress: a bar on a terminal, and whole lines where the output goes to a file."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """What a loop reports to."""

    def update(self) -> object:
        """Count one more step."""

    def set_postfix(self, values: Mapping[str, str]) -> object:
        """Show values by name."""


class ProgressLines:
    """Prints a line on stderr for every call of `set_postfix`.

    Args:
        total: the number of steps.
        step: the number of steps completed.
    """

    def __init__(self, total: int, step: int):
        self.total, self.step = total, step

    def update(self) -> None:
        """Count one more step."""
        self.step += 1

    def set_postfix(self, values: Mapping[str, str]) -> None:
        """Print the step and values by name."""
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        print(f"step {self.step} of {self.total}: {shown}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step_progress(total: int, step: int, enabled: bool) -> Iterator[Progress]:
    """Show the steps of a training run.

    Args:
        total: the number of steps.
        step: the number of steps completed.
        enabled: False shows nothing.

    Yields:
        What to report to.
    """
    if enabled and not sys.stderr.isatty():
        yield ProgressLines(total, step)
        return
    with tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=not enabled) as bar:
        yield bar
