"""Write and read checkpoints and models so that neither a killed run, a full disk nor a damaged file loses one."""

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..config import TrainConfig
from ..data.registry import find_dataset
from ..files import json_ready, write_atomically, write_folder
from ..memory import out_of_memory
from ..model.output import TrainableModel
from .state import TrainingState

# The scores of an evaluation that a saved model keeps.
KEPT_SCORES = ("mIoU", "pixAcc", "boundary_f", "boundary_iou", "boundary_tolerance", "images", "iou")
_NAME = re.compile(r"step_(\d+)\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first; what is named like one but is not a file is left out."""
    return [path for path in _entries(folder) if path.is_file()]


def _entries(folder: Path) -> list[Path]:
    """Everything that is named like a checkpoint, by step."""
    return sorted((path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, which its name holds."""
    return int(path.stem.removeprefix("step_"))


def save_checkpoint(folder: Path, state: TrainingState, keep: int = 2) -> Path:
    """Save a checkpoint, then delete all older ones but the newest `keep`, this one included.

    Args:
        folder: where the checkpoints are; it is created if it does not exist.
        state: the state of the run, whose step names the file.
        keep: number of checkpoints to keep.

    Returns:
        The path of the new checkpoint.

    Raises:
        FloatingPointError: the weights are not finite (`TrainingState.check_finite`).
        OSError: the disk is full or not writable. In both cases the earlier checkpoints are intact.
    """
    state.check_finite()
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state.to_dict(), buffer)
    path = folder / f"step_{state.step:08d}.pt"
    write_atomically(path, buffer.getbuffer())
    for old in [other for other in checkpoints(folder) if step_of(other) <= state.step][:-keep]:
        old.unlink()
    return path


def load_latest(folder: Path, device: torch.device) -> TrainingState | None:
    """Load the newest checkpoint that is whole and finite.

    Whatever else is named like a checkpoint is named in a warning, and the one before it is tried.

    Args:
        folder: where the checkpoints are.
        device: where their tensors go.

    Returns:
        The saved state, or None if there is nothing that is named like a checkpoint.

    Raises:
        ValueError: there are checkpoints, but none can be read.
        MemoryError: the memory of the machine is used up.
    """
    found = _entries(folder)
    for path in reversed(found):
        try:
            return read_checkpoint(path, device)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise anything, and must not hide the good one before it
            reason = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(f"{path} is damaged ({reason}): trying the checkpoint before it", stacklevel=2)
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} can be read: start again in another folder")
    return None


def read_checkpoint(path: Path, device: torch.device) -> TrainingState:
    """Read a checkpoint, after comparing its content with its checksums, which PyTorch does not do.

    Raises:
        ValueError, FloatingPointError: the file is damaged, or was saved with weights that are not finite.
        MemoryError: the memory of the machine is used up.
        Exception: a damaged file can make the libraries that read it raise anything.
    """
    if not path.is_file():
        raise ValueError("it is not a file")
    with zipfile.ZipFile(path) as archive:
        if (record := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {record} is wrong")
    with out_of_memory(f"while reading {path}: free some memory, then start again"):
        state = TrainingState.from_dict(torch.load(path, map_location=device, weights_only=True))
    state.check_finite()
    return state


def set_aside(folder: Path, step: int) -> None:
    """Rename all that is named like a checkpoint of a later step to `NAME.damaged`.

    Otherwise it would be taken for the newest checkpoint of the run that continues from `step`.
    """
    for path in _entries(folder):
        if step_of(path) > step:
            path.rename(path.with_name(path.name + ".damaged"))


def describe_saved(out: Path) -> str:
    """Say what of a run is on the disk, and how the run continues, for messages about its end."""
    saved = checkpoints(out / "checkpoints")
    kept = [f"the checkpoint of step {step_of(saved[-1])}"] if saved else []
    if (out / "model" / "config.json").is_file():
        kept.append("the best model so far")
    if not kept:
        return f"Nothing has been saved in {out} yet; --resume auto starts there at the first step"
    start = "continues from that checkpoint" if saved else "starts again at the first step"
    return f"{' and '.join(kept).capitalize()} {'are' if len(kept) > 1 else 'is'} in {out}; --resume auto {start}"


def divergence_advice(out: Path) -> str:
    """Say what of a run is on the disk, and what to change where a loss or a weight is not finite."""
    return (
        f"{describe_saved(out)}. Change something with it: a lower learning rate (--lr, --backbone-lr), a --warmup "
        "that ends later, or --amp off"
    )


def save_model(
    model: TrainableModel,
    folder: Path,
    config: TrainConfig | None = None,
    step: int | None = None,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Call `model.save_pretrained` for a folder, in which the files are then all old or all new (`write_folder`).

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

    def write(new: Path) -> None:
        try:
            model.save_pretrained(new)
        except SafetensorError as error:  # how safetensors reports a full or read-only disk
            raise OSError(str(error)) from error

    write_folder(folder, write)
