"""Where a training run goes, and whether it continues one that is there."""

import json
from pathlib import Path
from typing import Any

from .. import distributed
from ..config import TrainConfig

# Options that may differ between a run and its continuation: they don't change the result.
FREE_TO_CHANGE = {"out", "resume", "device", "log_every", "eval_every", "checkpoint_every", "num_samples", "workers"}
FREE_TO_CHANGE |= {"root", "pretrained_backbone", "backbone_weights"}  # data and weights may have moved
FREE_TO_CHANGE |= {"check_data", "on_bad_sample"}  # after a file was found to be bad


def run_folder(config: TrainConfig, preset: str) -> Path:
    """Where the run goes: `config.out`, else runs/PRESET with a number if need be.

    Raises:
        FileExistsError: `config.out` holds a run and `resume` is not `auto`.
    """
    if config.out is not None:
        if (config.out / "config.json").exists() and not continues(config, config.out):
            raise FileExistsError(
                f"{config.out} holds a run already: continue it with --resume auto, or choose another folder with --out"
            )
        return config.out
    number, folder = 1, Path("runs") / preset
    following = folder
    while following.exists():
        folder, number = following, number + 1
        following = Path("runs") / f"{preset}-{number}"
    return folder if continues(config, folder) else following


def continues(config: TrainConfig, folder: Path) -> bool:
    """Whether a run in `folder` is to be continued: if asked for, or if this torchrun started it before a restart."""
    launch = folder / "launch"
    restarted = distributed.was_restarted() and launch.exists() and launch.read_text() == distributed.launch_id()
    return config.resume == "auto" or restarted


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raise ValueError if the run in `folder` was started with other options that matter."""

    def flat(config: TrainConfig) -> dict[str, Any]:
        options = json.loads(config.to_json())
        return {**options.pop("model"), **options.pop("data"), **options}

    before, now = flat(TrainConfig.from_json(folder / "config.json")), flat(config)
    changed = [k for k in now if k not in FREE_TO_CHANGE and before[k] != now[k]]
    if changed:
        listed = ", ".join(f"{k} (was {before[k]}, now {now[k]})" for k in changed)
        raise ValueError(f"the run in {folder} can't be continued with other options: {listed}")
