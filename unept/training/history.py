"""Which options a run may be continued with, and history.jsonl, which keeps each start, change and stop of a run."""

import datetime
import json
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..files import read_json_lines, write_json_lines

# Options that may differ between a run and its continuation, since they do not change the result.
FREE_TO_CHANGE = {"out", "resume", "device", "log_every", "eval_every", "checkpoint_every", "num_samples", "workers"}
FREE_TO_CHANGE |= {"root", "pretrained_backbone", "backbone_weights"}  # data and weights may have moved
FREE_TO_CHANGE |= {"init_from", "patience", "grad_checkpointing", "tracker"}
FREE_TO_CHANGE |= {"check_data", "on_bad_sample"}  # a file was found to be bad meanwhile
# Options that change the result from there on. They are the way out that a message names: of too little memory, of a
# loss that is not finite, of a number of processes that does not divide the batch, of a run that has ended too early.
# Those of the refinement act in evaluations alone, and a preset of another version may have others.
ADVISED_TO_CHANGE = {
    "accumulate",
    "batch_size",
    "crop_size",
    "amp",
    "matmul_precision",
    "compile",
    "window",
    "window_stride",
    "refine_scale",
    "refine_steps",
    "refine_direction",
}
ADVISED_TO_CHANGE |= {"lr", "backbone_lr", "warmup", "iterations", "clip_grad"}

Changes = dict[str, tuple[Any, Any]]
"""Options that changed: their values before and now, by name."""


def changed_options(config: TrainConfig, folder: Path) -> Changes:
    """Return what is different from the options that the run in a folder was last started with.

    Raises:
        ValueError: an option differs that neither `FREE_TO_CHANGE` nor `ADVISED_TO_CHANGE` names.
    """

    def flatten(config: TrainConfig) -> dict[str, Any]:
        options = json.loads(config.to_json())
        return {**options.pop("model"), **options.pop("data"), **options.pop("recipe"), **options}

    before, now = flatten(TrainConfig.from_json(folder / "config.json")), flatten(config)
    changed = {name: (before[name], now[name]) for name in now if before[name] != now[name]}
    refused = {name: values for name, values in changed.items() if name not in FREE_TO_CHANGE | ADVISED_TO_CHANGE}
    if refused:
        listed = ", ".join(f"{name} (was {was}, now {is_now})" for name, (was, is_now) in refused.items())
        allowed = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(ADVISED_TO_CHANGE))
        raise ValueError(
            f"the run in {folder} cannot be continued with other options: {listed}. Give the options that it was "
            f"started with, or another folder with --out; a run may continue with another {allowed}"
        )
    return changed


def check_steps(config: TrainConfig, step: int, folder: Path) -> None:
    """Raise ValueError if a run is to be continued to fewer steps than it has taken."""
    if config.iterations < step:
        raise ValueError(
            f"iterations is {config.iterations}, but the run in {folder} has taken {step} steps already: give at "
            f"least {step}, or another folder with --out"
        )


def add_to_history(folder: Path, event: str, step: int, **details: Any) -> None:
    """Add a line to history.jsonl: the time, what happened, and the number of steps that the run had taken.

    Args:
        folder: the run folder.
        event: `"start"`, `"continue"` or `"stop"`.
        step: optimiser steps completed.
        details: more of the event, such as the `changed` options.
    """
    path = folder / "history.jsonl"
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json_lines(path, [*read_json_lines(path), {"time": now, "event": event, "step": step, **details}])


def describe_changes(changed: Changes) -> str:
    """Return the changes of the result in a line, such as "lr 0.0001 -> 1e-05"; empty if there are none."""
    advised = {name: values for name, values in changed.items() if name in ADVISED_TO_CHANGE}
    return ", ".join(f"{name} {was} -> {now}" for name, (was, now) in advised.items())
