"""Say what to change when the memory of a GPU or of the machine runs out."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .allocator import return_freed_memory
from .config import TrainConfig
from .inference import InferenceConfig


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turn PyTorch's errors about the memory of a GPU or of the machine into a MemoryError that ends in `advice`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise MemoryError(f"out of memory {advice}") from error
        raise


# What a pixel of an image that is seen whole takes at least: 390 bytes with the demo model, the smallest named size.
BYTES_A_PIXEL = 300
MEMINFO = Path("/proc/meminfo")


def require_memory_for_images(shape: Sequence[int], config: InferenceConfig, device: torch.device, advice: str) -> None:
    """Call `require_memory` for the largest view of images (..., H, W), if it is seen whole and by a CPU."""
    if device.type == "cpu" and not config.window:
        scale = config.resize_ratio(shape[-2], shape[-1]) * max(config.scales)
        require_memory(math.prod(shape) * scale**2 * (1 + config.flip), advice)  # mirrored images go along


def require_memory(pixels: float, advice: str, meminfo: Path | None = None) -> None:
    """Raise a MemoryError that ends in `advice` if an image cannot be seen whole by a CPU.

    Linux promises more memory than there is, and kills without a word the process that takes it.
    """
    meminfo = meminfo or MEMINFO
    if pixels * BYTES_A_PIXEL > _available(meminfo):
        return_freed_memory()  # which a training has kept for its steps
        if pixels * BYTES_A_PIXEL > _available(meminfo):
            raise MemoryError(f"out of memory {advice}")


def _available(meminfo: Path) -> float:
    """The bytes that the system says are available; infinity where it does not say."""
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        name, _, number = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(number.split()[0])
    return math.inf


def memory_advice(config: TrainConfig, local_batch: int) -> str:
    """Say how a training step of `local_batch` images per rank takes less memory, as advice for `out_of_memory`."""
    height, width = config.data.crop_size
    at_once = local_batch // config.accumulate
    smaller = (
        f"--accumulate {config.accumulate * 2} keeps the batch and processes it in twice as many parts"
        if at_once % 2 == 0
        else "--batch-size takes fewer images"
    )
    return (
        f"with {at_once} images of {height}x{width} at once (batch_size {config.batch_size}): {smaller}; --crop-size "
        "makes images smaller; --amp bf16 halves most of the rest"
    )
