"""Choose the folder of a training run, decide whether the run in it is continued, and prepare the folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..config import TrainConfig
from ..files import write_atomically
from .checkpoint import TrainingState, load_latest

# Options that may differ between a run and its continuation, since they do not change the result.
FREE_TO_CHANGE = {"out", "resume", "device", "log_every", "eval_every", "checkpoint_every", "num_samples", "workers"}
FREE_TO_CHANGE |= {"root", "pretrained_backbone", "backbone_weights"}  # data and weights may have moved
FREE_TO_CHANGE |= {"init_from", "patience", "grad_checkpointing", "tracker"}
FREE_TO_CHANGE |= {"check_data", "on_bad_sample"}  # a file was found to be bad meanwhile


def choose_run_folder(config: TrainConfig, preset: str) -> Path:
    """Return `config.out` if it is set, else runs/PRESET, with a number if that folder exists.

    A run that continues gets the folder with the highest number.

    Raises:
        FileExistsError: `config.out` holds a run, and `resume` is not `auto`.
    """
    if config.out is not None:
        if (config.out / "config.json").exists() and not should_resume(config, config.out):
            raise FileExistsError(
                f"{config.out} holds a run already: continue it with --resume auto, or choose another folder with --out"
            )
        return config.out
    number, folder = 1, Path("runs") / preset
    following = folder
    while following.exists():
        folder, number = following, number + 1
        following = Path("runs") / f"{preset}-{number}"
    return folder if should_resume(config, folder) else following


def should_resume(config: TrainConfig, folder: Path) -> bool:
    """Whether to continue a run in the folder: if `resume` is `auto`, or if this start of torchrun began that run."""
    launch = folder / "launch"
    restarted = distributed.was_restarted() and launch.exists() and launch.read_text() == distributed.launch_id()
    return config.resume == "auto" or restarted


def open_run_folder(config: TrainConfig, folder: Path, classes: Sequence[str], resume: bool) -> TrainingState | None:
    """Create the folder of a run, or read the state from which the run in it continues. Only rank 0 calls it.

    Args:
        config: options of the run.
        folder: its folder.
        classes: class names of the data set.
        resume: whether to continue a run that is in the folder.

    Returns:
        The newest checkpoint, on the CPU; None if the run starts from its first step.

    Raises:
        ValueError: the run in the folder has other options or classes, or none of its checkpoints can be read.
        OSError: the disk is full or not writable.
    """
    state = None
    if resume and (folder / "config.json").exists():
        check_same_run(config, folder)
        if (stored := load_latest(folder / "checkpoints", torch.device("cpu"))) is not None:
            state = TrainingState.from_dict(stored)
            check_same_classes(state, classes, folder)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if (launch := distributed.launch_id()) is not None:
        (folder / "launch").write_text(launch)
    write_atomically(folder / "config.json", config.to_json().encode())
    return state


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raise ValueError if the run in the folder was started with other options that change its result."""

    def flatten(config: TrainConfig) -> dict[str, Any]:
        options = json.loads(config.to_json())
        return {**options.pop("model"), **options.pop("data"), **options.pop("recipe"), **options}

    before, now = flatten(TrainConfig.from_json(folder / "config.json")), flatten(config)
    changed = [name for name in now if name not in FREE_TO_CHANGE and before[name] != now[name]]
    if changed:
        listed = ", ".join(f"{name} (was {before[name]}, now {now[name]})" for name in changed)
        raise ValueError(
            f"the run in {folder} cannot be continued with other options: {listed}. Give the options that it was "
            "started with, or another folder with --out"
        )


def check_same_classes(state: TrainingState, classes: Sequence[str], folder: Path) -> None:
    """Raise ValueError if a checkpoint is of a model with other classes than those of the data set."""
    if state.classes != list(classes):
        raise ValueError(
            f"the checkpoint in {folder} has {len(state.classes)} classes, the data set has {len(classes)}: "
            f"{state.classes} against {list(classes)}. Train in another folder, or give the data set that the run "
            "started with"
        )
