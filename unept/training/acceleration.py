"""Compile what every training step runs."""

from collections.abc import Callable
from typing import Any

import torch

from ..compilation import compiles
from ..config import TrainConfig


def compiled(config: TrainConfig, device: torch.device, *functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions, compiled where the option `compile` says so; `auto` does on CUDA."""
    if compiles(config.compile, device.type):
        return [torch.compile(function) for function in functions]
    return list(functions)
