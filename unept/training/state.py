"""What a run needs to continue: how it is taken from a trainer, checked, and given back to one."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ..model.output import TrainableModel
from .optimizer import restore_optimizer

# Checkpoints of older versions hold a step's losses as one tensor in this order, under the key "pending".
OLD_LOSS_NAMES = ("loss", "segmentation", "refined", "boundary", "direction")


class Resumable(Protocol):
    """What a trainer has that its state is taken from and given back to."""

    out: Path
    device: torch.device
    model: TrainableModel
    averaged: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    step: int
    samples: int
    best: float
    stale: int
    evaluated: bool
    skipped_before: int
    loss_history: list[dict[str, Tensor]]


class RunningStatistics:
    """What batch normalisation knew before a step that fails: its forward has changed it, not the weights.

    Args:
        model: the network that is trained; it stays on its device.
    """

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._now = [buffer for norm in norms for buffer in norm.buffers()]
        self._before = [buffer.clone() for buffer in self._now]

    def keep(self) -> None:
        """Copy the statistics."""
        if self._now:
            torch._foreach_copy_(self._before, self._now)

    def restore(self) -> None:
        """Put the copies back."""
        if self._now:
            torch._foreach_copy_(self._now, self._before)


@dataclass
class TrainingState:
    """What a run needs to continue exactly. Random states are not among it: they follow from the seed and the step."""

    step: int
    """Optimiser steps completed."""
    classes: list[str]
    """Class names of the model."""
    model: dict[str, Tensor]
    """State dict of the model."""
    optimizer: dict[str, Any]
    """State dict of the optimiser."""
    scheduler: dict[str, int]
    """`last_epoch` of the learning rate scheduler."""
    loss_history: list[dict[str, Tensor]]
    """Losses by name, float32 scalars averaged over the ranks, of each step since the last record."""
    best: float
    """Highest validation mIoU so far, -1 before the first evaluation."""
    skipped: int
    """How often another sample has replaced one that cannot be read, over all ranks."""
    averaged: dict[str, Tensor] | None = None
    """State dict of the average of the weights; None if the run keeps none."""
    stale: int = 0
    """Number of evaluations since the best one."""
    samples: int | None = None
    """Images drawn for these steps, on all ranks; None in a checkpoint of an older version."""
    evaluated: bool = True
    """False if an evaluation is due at this step and has not been completed."""

    @staticmethod
    def of(trainer: Resumable, skipped: int) -> "TrainingState":
        """Take the state of a trainer; tensors are not copied. `skipped` is as the field of that name."""
        return TrainingState(
            step=trainer.step,
            samples=trainer.samples,
            classes=list(trainer.model.classes),
            model=trainer.model.state_dict(),
            optimizer=trainer.optimizer.state_dict(),
            scheduler={"last_epoch": trainer.scheduler.last_epoch},
            loss_history=trainer.loss_history,
            best=trainer.best,
            stale=trainer.stale,
            skipped=skipped,
            averaged=None if trainer.averaged is None else trainer.averaged.state_dict(),
            evaluated=trainer.evaluated,
        )

    def restore(self, trainer: Resumable) -> None:
        """Give the state to a trainer; where options of the optimiser differ, those of the trainer hold.

        Raises:
            ValueError: the state is of another network.
        """
        try:
            trainer.model.load_state_dict(self.model)
            if trainer.averaged is not None and self.averaged is not None:
                trainer.averaged.load_state_dict(self.averaged)
            restore_optimizer(trainer.optimizer, trainer.scheduler, self.optimizer, self.scheduler["last_epoch"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint of step {self.step} in {trainer.out} does not fit the network that this version of "
                f"unept builds: continue with the version that wrote it, or train in another folder. {error}"
            ) from error
        trainer.step, trainer.best, trainer.stale = self.step, self.best, self.stale
        trainer.samples = self.samples or 0
        trainer.skipped_before = self.skipped
        trainer.evaluated = self.evaluated
        trainer.loss_history = [
            {name: loss.to(trainer.device) for name, loss in losses.items()} for losses in self.loss_history
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; tensors are not copied."""
        return dict(vars(self))

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "TrainingState":
        """Make a state from what `to_dict` returned, in this version of the package or an older one.

        Raises:
            KeyError: a field is missing.
        """
        fields = dict(stored)
        if (pending := fields.pop("pending", None)) is not None:
            fields["loss_history"] = [dict(zip(OLD_LOSS_NAMES, losses.unbind(), strict=False)) for losses in pending]
        fields = {"averaged": None, "stale": 0, "samples": None, "evaluated": True, **fields}
        return TrainingState(**{field.name: fields[field.name] for field in dataclasses.fields(TrainingState)})

    def check_finite(self) -> None:
        """Raise FloatingPointError if the weights, their average or the optimiser hold NaN or infinity.

        The losses of a step are those before its update, so finite losses do not mean that its weights are finite.
        """
        tensors = dict(self._floats())
        finite = [tensor.isfinite().all() for tensor in tensors.values()]
        if not finite or torch.stack(finite).all():  # the host waits once
            return
        bad = [name for name, ok in zip(tensors, finite, strict=True) if not ok]
        raise FloatingPointError(
            f"the weights are not finite after step {self.step}: {len(bad)} of {len(tensors)} tensors, such as {bad[0]}"
        )

    def _floats(self) -> Iterator[tuple[str, Tensor]]:
        """The floating-point tensors by name, the weights first."""
        moments = {
            f"{name} of the optimiser's parameter {index}": value
            for index, values in self.optimizer.get("state", {}).items()
            for name, value in values.items()
            if name != "step"  # which PyTorch may keep on another device
        }
        averaged = {f"the average of {name}": value for name, value in (self.averaged or {}).items()}
        for name, value in {**self.model, **averaged, **moments}.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield name, value
