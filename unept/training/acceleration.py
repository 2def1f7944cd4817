"""Compile what every training step runs."""

from collections.abc import Callable
from typing import Any

import torch

from ..config import TrainConfig


def compiled(config: TrainConfig, device: torch.device, *functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions, compiled where the option `compile` says so; `auto` does on CUDA."""
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        return [torch.compile(function) for function in functions]
    return list(functions)
