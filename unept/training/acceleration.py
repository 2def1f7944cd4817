"""Compile what every training step runs."""

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import distributed
from ..compilation import compiles
from ..config import TrainConfig
from ..kernels import compile_ahead
from ..kernels.backend import runs_on_triton

if TYPE_CHECKING:
    from .trainer import Trainer


def compiled(config: TrainConfig, device: torch.device, *functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions, compiled where the option `compile` says so; `auto` does on CUDA."""
    if compiles(config.compile, device.type):
        return [torch.compile(function) for function in functions]
    return list(functions)


def compile_kernels(trainer: "Trainer", images: Tensor, labels: Tensor) -> None:
    """Compile all Triton kernels of a training step side by side, which a first step would compile one after the other.

    A copy of the network runs a step in which none of them is launched, so that neither the network and its statistics
    nor any random state change. It runs eagerly under torch.compile too, which leaves the operators as they are, with
    inputs of the same dtypes and strides. Its batch normalisation takes the running statistics: no rank waits here for
    another, and one whose GPU has no memory for that, the network's weights and gradients once more beside those of
    an eager step, goes on without.

    Args:
        trainer: before its first step in this process; it is left as it is.
        images: this rank's share of a batch, as `Trainer.train_step` takes it.
        labels: likewise.
    """
    if not runs_on_triton(images):
        return

    def step() -> None:
        rehearsal = copy.copy(trainer)
        network = rehearsal.model = rehearsal.network = rehearsal.forward = copy.deepcopy(trainer.model)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        rehearsal.compute_losses = trainer.loss.losses  # not compiled
        part = len(images) // trainer.config.accumulate
        with torch.no_grad():
            targets = trainer.loss.targets(labels, boundaries=network.refines)
        rehearsal.forward_backward(images[:part], targets.part(0, part), last=True)

    cuda = trainer.device.type == "cuda"
    try:
        with torch.cuda.device(trainer.device if cuda else -1), torch.random.fork_rng([trainer.device] if cuda else []):
            compile_ahead(step, quiet=not distributed.is_main())
    except torch.OutOfMemoryError:
        print("too little memory to compile the kernels ahead: they are compiled as they come", file=sys.stderr)
    if cuda:  # the memory is free for the steps, and the peak that the run reports is theirs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(trainer.device)
