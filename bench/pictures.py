"""Figures 1 and 3: predictions and errors of trained networks side by side, CCNet and OCRNet among them.

`python -m bench.pictures --data CAMVID` draws images of the validation set with the networks that `bench.ablations` has
trained into OUT/runs, as `python -m unept.visualize --compare` does with this project's network alone.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
import tyro

from unept.config import TrainConfig
from unept.inference import InferenceOptions, resolve
from unept.model.output import SegmentationModel
from unept.pictures.figures import draw_predictions
from unept.pretrained import load_run

from .ablation_plan import Job, Size, plan
from .harness import DEVICE


@dataclass
class Options:
    """Draw what networks of bench.ablations predict."""

    data: Path
    """Folder of CamVid."""
    out: Path = Path("bench/results/ablations")
    """Folder of the ablations, with runs/."""
    names: tuple[str, ...] = ("CCNet", "OCRNet", "unept")
    """Names of the trainings, in the order of the columns."""
    samples: int = 4
    """Number of images, spread evenly over the validation set."""
    pictures: Path = Path("bench/results")
    """Folder for the pictures."""


def load(job: Job, out: Path) -> SegmentationModel:
    """Load the best model of a training in evaluation mode."""
    run = out / "runs" / job.name
    if job.baseline is None:
        return load_run(run, torch.device(DEVICE))[1]
    config = TrainConfig.from_json(run / "config.json")
    dataset = config.data.build("val")
    model = job.build(dataset.classes, dataset.palette, replace(config.model, backbone_weights=None))
    model.load_state_dict(torch.load(run / "model" / "model.pt", map_location=DEVICE, weights_only=True))
    return model.to(DEVICE).eval()


def load_trained(names: Sequence[str], out: Path) -> dict[str, SegmentationModel]:
    """Load the best models of some trainings by name, of the plan of any size: a run keeps the size of its network.

    Raises:
        ValueError: there is no such training, or `bench.ablations` has not made it yet.
    """
    plans = [job for size in get_args(Size) for job in plan({}, seeds=10, size=size)]
    jobs = {job.name: job for job in plans if job.part != "memory"}
    if unknown := [name for name in names if name not in jobs]:
        raise ValueError(f"there is no training {unknown[0]!r}; there are {', '.join(jobs)}")
    if missing := [name for name in names if not (out / "runs" / name / "model").is_dir()]:
        command = f"python -m bench.ablations --only {shlex.join(missing)}"
        raise ValueError(f"{missing[0]} is not trained in {out}: train it first by {command} ...")
    return {name: load(jobs[name], out) for name in names}


def main() -> int:
    """Draw the pictures, and print where they are."""
    options = tyro.cli(Options, prog="python -m bench.pictures")
    try:
        models = load_trained(options.names, options.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    predictors = {name: (model, resolve(InferenceOptions(), model)) for name, model in models.items()}
    first = TrainConfig.from_json(options.out / "runs" / options.names[0] / "config.json")
    dataset = first.data.build("val", options.data)
    options.pictures.mkdir(parents=True, exist_ok=True)
    for i in (n * len(dataset) // options.samples for n in range(min(options.samples, len(dataset)))):
        image, labels = (tensor.as_subclass(torch.Tensor) for tensor in dataset[i])
        path = options.pictures / f"{dataset.name(i)}_comparison.png"
        draw_predictions(predictors, image.to(DEVICE), labels, dataset.name(i), path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
