"""Checkpoints that a killed run, a full disk or a torn file can't lose: written beside, synced, then renamed."""

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..config import TrainConfig
from ..evaluate import json_ready
from ..model.network import UNEPT

# Of what an evaluation finds, what a model keeps of it.
KEPT_SCORES = ("mIoU", "pixAcc", "boundary_f", "boundary_tolerance", "images", "iou")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; what was there before stays until the new one is safely on disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = f"; the one before is intact: {path.parent}" if any(path.parent.glob(f"*{path.suffix}")) else ""
        raise OSError(error.errno, f"{error.strerror} while writing {path}{kept}") from error
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in it last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Save `state` (tensors and plain Python values) as the checkpoint of `step`, then delete all but the last `keep`.

    Raises:
        OSError: the disk is full or not writable; the checkpoints before are intact.
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
    """The newest readable checkpoint, or None. A damaged one is named in a warning and the one before it is taken.

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
    model: UNEPT,
    folder: Path,
    config: TrainConfig | None = None,
    step: int | None = None,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """`save_pretrained` into `folder`; each file there is replaced only by a complete one.

    Args:
        model: of whatever device.
        folder: is made.
        config: of the run; its protocol goes into `model.preprocessing`.
        step, scores: of the validation, as `unept.evaluate.evaluate_model` gives them; what there is goes into
            `model.evaluation`, and with it into the model card.

    Raises:
        OSError: the disk is full or not writable; the model before is intact.
    """
    if config is not None:
        model.preprocessing.update(config.inference().protocol())
    if scores is not None:
        known = {"dataset": config and config.data.dataset, "split": "val", "step": step}
        known |= {name: scores.get(name) for name in KEPT_SCORES}
        model.evaluation = {name: value for name, value in json_ready(known).items() if value is not None}
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
    except SafetensorError as error:  # how safetensors reports the disk
        raise OSError(f"{folder} could not be written ({error}); the model before, if any, is intact") from error
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(new.iterdir()):
        write_atomically(folder / file.name, file.read_bytes())
    shutil.rmtree(new)
