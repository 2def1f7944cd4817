"""How fast a run is, which of the two limits it (the training step, or the loader), and how much memory it takes."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch


def peak_memory(device: torch.device) -> float | None:
    """Peak GiB so far: of the GPU's allocator, or of this process on Linux; None where that can't be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Throughput:
    """Rates since they were last asked for; measuring them never waits for a GPU.

    The clock runs from `start` to `stop`. Stop it during anything that is not training, such as an evaluation.

    Args:
        device: that steps run on. On CUDA, where the host is ahead, they are timed by events.
        workers: processes that prepare batches; 0: the training process does.
        ranks: that train together, all as fast as this one: rates are those of all.
    """

    def __init__(self, device: torch.device, workers: int, ranks: int = 1):
        self.cuda = device.type == "cuda"
        self.workers = max(1, workers)
        self.ranks = ranks
        self.since: float | None = None
        self._clear()

    def start(self) -> None:
        """Let the clock run."""
        self.since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, if it runs."""
        if self.since is not None:
            self.elapsed += time.perf_counter() - self.since
        self.since = None

    @contextlib.contextmanager
    def step(self, images: int, loader_seconds: float) -> Iterator[None]:
        """Around all that happens to a batch.

        Args:
            images: in the batch.
            loader_seconds: that a worker spent on each of them, in the mean (`data.loader.Batch.seconds`).
        """
        begin = self._mark()
        yield
        self.steps.append((begin, self._mark()))
        self.images += images
        self.loading += images * loader_seconds

    def rates(self) -> dict[str, float]:
        """Images per second: of the run, of the steps without what they wait for data, and of the loader alone.

        Starts the next interval. On CUDA, call it when the host has waited for the last step anyway.
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
        event.record()
        return event

    def _clear(self) -> None:
        self.elapsed = self.loading = 0.0
        self.images = 0
        self.steps: list[tuple[Any, Any]] = []  # begin and end: events on CUDA, else seconds


def _between(begin: Any, end: Any) -> float:
    """Seconds."""
    return begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin
