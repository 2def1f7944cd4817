"""Record a run in Weights & Biases or MLflow as well; each is an optional package."""

import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config import TrainConfig
from ..files import write_atomically

PROJECT = "unept"


class Tracker(Protocol):
    """What `Recorder` passes its records on to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a step."""

    def close(self) -> None:
        """Finish the record of the run."""


class WandbTracker:
    """A run of Weights & Biases, named like the run folder; its project is WANDB_PROJECT, else `unept`.

    Its other settings come from the environment too: WANDB_MODE=offline records below the run folder alone.
    """

    def __init__(self, folder: Path, options: dict[str, Any]):
        wandb = _require("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=_run_id(folder, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(folder),
            config=options,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self.run.finish()


class MlflowTracker:
    """A run of MLflow, named like the run folder, in the experiment MLFLOW_EXPERIMENT_NAME, else `unept`.

    MLFLOW_TRACKING_URI says where; without it the run folder gets an `mlflow.db`.
    """

    def __init__(self, folder: Path, options: dict[str, Any]):
        mlflow = _require("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        self.client = mlflow.MlflowClient(uri)
        self.run_id = _run_id(folder, "mlflow", lambda: self._create(folder.name, options))

    def _create(self, name: str, options: dict[str, Any]) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(experiment)
        number = self.client.create_experiment(experiment) if known is None else known.experiment_id
        run_id = self.client.create_run(number, run_name=name).info.run_id
        for option, value in options.items():
            self.client.log_param(run_id, option, str(value)[:500])
        return run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def check_tracker(config: TrainConfig) -> None:
    """Raise ValueError if the package of the tracker that the option of that name asks for is not installed."""
    if config.recipe.tracker != "none":
        _require(config.recipe.tracker)


def start_tracker(config: TrainConfig, folder: Path) -> Tracker | None:
    """Start the tracker that the option of that name asks for, or continue its record; None for none.

    Args:
        config: the options of the run, which it records.
        folder: the run folder, which keeps the run's id in `tracker.json`.

    Raises:
        ValueError: its package is not installed.
    """
    if config.recipe.tracker == "none":
        return None
    options = json.loads(config.to_json())
    flat = {name: value for part in ("model", "data", "recipe") for name, value in options.pop(part).items()}
    return TRACKERS[config.recipe.tracker](folder, {**flat, **options})


def _require(package: str) -> Any:
    """Import an optional package, with a message that says how to get it."""
    try:
        __import__(package)
    except ImportError as error:
        raise ValueError(
            f'tracker is {package}, which is not installed: pip install "unept[{package}]", or omit --tracker'
        ) from error
    return sys.modules[package]


def _run_id(folder: Path, tracker: str, create: Any) -> str:
    """The id of the run in a tracker, which a continued run finds again in its folder."""
    path = folder / "tracker.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if tracker not in known:
        known[tracker] = create()
        write_atomically(path, json.dumps(known).encode())
    return known[tracker]
