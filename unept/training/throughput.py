"""Measure how fast a run is, whether the training step or the loader limits it, and how much memory it takes."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory so far in GiB, of the GPU's allocator or of this process; None if the system has no count.

    Only Linux counts the memory of a process in a unit that is known here.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Throughput:
    """Measure rates over intervals, each from one call of `rates` to the next; measuring never waits for a GPU.

    The clock runs from `start` to `stop`. Stop it during anything that is not training, such as an evaluation.

    Args:
        device: the device of the steps. On CUDA, where the host runs ahead, they are timed by events.
        workers: the number of processes that prepare batches; 0 if the training process does.
        ranks: the number of ranks that train together, all as fast as this one; rates are those of all together.
    """

    def __init__(self, device: torch.device, workers: int, ranks: int = 1):
        self.device, self.cuda = device, device.type == "cuda"
        self.workers = max(1, workers)
        self.ranks = ranks
        self.since: float | None = None
        self._clear()

    def start(self) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, if it runs."""
        if self.since is not None:
            self.elapsed += time.perf_counter() - self.since
        self.since = None

    @contextlib.contextmanager
    def step(self, images: int, loader_seconds: float) -> Iterator[None]:
        """Time a training step: a context manager around everything that happens to a batch.

        Args:
            images: the number of images in the batch.
            loader_seconds: the mean time that a worker spent on each of them (`data.loader.Batch.seconds`).
        """
        begin = self._mark()
        yield
        self.steps.append((begin, self._mark()))
        self.images += images
        self.loading += images * loader_seconds

    def rates(self) -> dict[str, float]:
        """Return the rates of the interval in images per second, and start the next interval.

        On CUDA, call it when the host has waited for the last step anyway.

        Returns:
            `images_per_s`, of the run; `step_images_per_s`, of the steps without the time that they wait for data;
            `loader_images_per_s`, of the loader alone.
        """
        running = self.since is not None
        self.stop()
        busy = sum(_between(*step) for step in self.steps)
        images = self.images * self.ranks
        rates = {
            "images_per_s": images / max(self.elapsed, 1e-9),
            "step_images_per_s": images / max(busy, 1e-9),
            "loader_images_per_s": images * self.workers / max(self.loading, 1e-9),
        }
        self._clear()
        if running:
            self.start()
        return rates

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # whichever device is the current one
        return event

    def _clear(self) -> None:
        self.elapsed = self.loading = 0.0
        self.images = 0
        self.steps: list[tuple[Any, Any]] = []  # begin and end: events on CUDA, else seconds


def _between(begin: Any, end: Any) -> float:
    """Return the seconds between two marks."""
    return begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin
