"""Compile what every training step runs."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from .. import distributed
from ..compilation import compiles
from ..config import TrainConfig
from ..kernels import compile_ahead


def compiled(config: TrainConfig, device: torch.device, *functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions, compiled where the option `compile` says so; `auto` does on CUDA."""
    if compiles(config.compile, device.type):
        return [torch.compile(function) for function in functions]
    return list(functions)


def compile_kernels(step: Callable[[], Any], device: torch.device) -> None:
    """Compile all Triton kernels of a training step side by side, which a first step would compile one after the other.

    A rank whose GPU has no memory for the step, such as that of a second copy of the network, goes on without.

    Args:
        step: runs eagerly and leaves nothing behind (`compile_ahead`); random states are restored.
        device: that of the training.
    """
    cuda = device.type == "cuda"
    try:
        with torch.cuda.device(device if cuda else -1), torch.random.fork_rng([device] if cuda else []):
            compile_ahead(step, quiet=not distributed.is_main())
    except torch.OutOfMemoryError:
        print("too little memory to compile the kernels ahead: they are compiled as they come", file=sys.stderr)
    if cuda:  # the memory is free for the steps, and the peak that the run reports is theirs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
