"""Write and read checkpoints and models so that neither a killed run, a full disk nor a torn file loses one."""

import dataclasses
import io
import pickle
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config import TrainConfig
from ..data.registry import find_dataset
from ..files import json_ready, write_atomically
from ..model.output import TrainableModel

# The scores of an evaluation that a saved model keeps.
KEPT_SCORES = ("mIoU", "pixAcc", "boundary_f", "boundary_iou", "boundary_tolerance", "images", "iou")
# Checkpoints of older versions hold a step's losses as one tensor in this order, under the key "pending".
OLD_LOSS_NAMES = ("loss", "segmentation", "refined", "boundary", "direction")


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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; tensors are not copied."""
        return dict(vars(self))

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "TrainingState":
        """Make a state from what `to_dict` returned, in this version of the package or an older one."""
        fields = dict(stored)
        if (pending := fields.pop("pending", None)) is not None:
            fields["loss_history"] = [dict(zip(OLD_LOSS_NAMES, losses.unbind(), strict=False)) for losses in pending]
        fields = {"averaged": None, "stale": 0, **fields}
        return TrainingState(**{field.name: fields[field.name] for field in dataclasses.fields(TrainingState)})


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Save a checkpoint, then delete all but the newest `keep`.

    Args:
        folder: where the checkpoints are; it is created if it does not exist.
        step: optimiser steps completed, which name the file.
        state: tensors and plain Python values.
        keep: number of checkpoints to keep.

    Returns:
        The path of the new checkpoint.

    Raises:
        OSError: the disk is full or not writable; the earlier checkpoints are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step_{step:08d}.pt"
    write_atomically(path, buffer.getvalue())
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_latest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Load the newest readable checkpoint.

    A damaged checkpoint is named in a warning, and the one before it is loaded instead.

    Args:
        folder: where the checkpoints are.
        device: where its tensors go.

    Returns:
        The saved state, or None if there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(f"{path} is damaged ({reason}): trying the checkpoint before it", stacklevel=2)
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} can be read: start again in another folder")
    return None


def save_model(
    model: TrainableModel,
    folder: Path,
    config: TrainConfig | None = None,
    step: int | None = None,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Call `model.save_pretrained` for a folder; each file in it is replaced only by a complete new one.

    Args:
        model: the model, on any device.
        folder: where it goes; it is created if it does not exist.
        config: options of the run; what they fix of inference is added to `model.preprocessing`.
        step: optimiser steps completed.
        scores: result of `unept.evaluation.evaluator.evaluate_model` on the validation set. With `step` it is kept in
            `model.evaluation`, and so appears in the model card.

    Raises:
        OSError: the disk is full or not writable; the model that was there before is intact.
    """
    if config is not None:
        model.preprocessing.update(config.inference().protocol())
    if scores is not None:
        known: dict[str, Any] = {"split": "val", "step": step}
        if config is not None:
            known |= {"dataset": config.data.dataset, "dataset_title": find_dataset(config.data.dataset).title}
        known |= {name: scores.get(name) for name in KEPT_SCORES}
        model.evaluation = {name: value for name, value in json_ready(known).items() if value is not None}
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
    except SafetensorError as error:  # how safetensors reports a full or read-only disk
        raise OSError(
            f"{folder} could not be written ({error}). The model that was there before, if any, is intact: free some "
            "space or make the folder writable, then start again"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(new.iterdir()):
        write_atomically(folder / file.name, file.read_bytes())
    shutil.rmtree(new)
