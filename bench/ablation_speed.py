"""Speed of the networks of `bench.ablations`: `python -m bench.ablation_speed --data CAMVID`.

Takes training steps as the ablations do, and predicts images of CamVid's size one at a time, on noise. The networks
take turns, so that what else the machine does slows all of them: the medians can be compared with each other.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from unept.inference import predict_ids
from unept.train import Trainer
from unept.training.freezing import training_mode

from .ablation_plan import BASELINES, COMPARED, FINAL, Size, plan
from .ablations import Options as Ablations
from .ablations import make_trainer
from .harness import DEVICE, device_name, seconds_in_turn


@dataclass
class Options:
    """Time training steps and predictions of networks side by side."""

    data: Path
    """Folder of CamVid."""
    names: tuple[str, ...] = (FINAL, *BASELINES, *COMPARED)
    """Names of the trainings."""
    size: Size = "tiny"
    """Size of this project's network."""
    batch_size: int = 4
    """Images per training step."""
    crop_size: tuple[int, int] = (192, 256)
    """Height and width of a training sample."""
    rounds: int = 5
    """Steps and predictions of each network; one more, before, is not counted."""
    threads: int | None = None
    """Threads of PyTorch on a CPU. None: its default."""


def timed(trainer: Trainer, options: Options) -> dict[str, Callable[[], Any]]:
    """Return functions that take a training step, and that predict an image."""
    draw = lambda high, *shape: torch.randint(0, high, shape, dtype=torch.uint8, device=DEVICE)
    images, labels = (
        draw(256, options.batch_size, 3, *options.crop_size),
        draw(11, options.batch_size, *options.crop_size),
    )
    image = draw(256, 1, 3, 360, 480)

    def train() -> float:
        training_mode(trainer.model)
        return trainer.train_step(images, labels)["loss"].item()

    return {"training": train, "inference": lambda: predict_ids(trainer.model, image, trainer.inference).sum().item()}


def main() -> None:
    """Print a table in Markdown."""
    options = tyro.cli(Options, prog="python -m bench.ablation_speed")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    jobs = {job.name: job for job in plan({}, size=options.size)}
    with tempfile.TemporaryDirectory() as folder:
        ablations = Ablations(
            options.data, None, Path(folder), 1, options.batch_size, options.crop_size, size=options.size
        )
        functions = {
            (name, task): function
            for name in options.names
            for task, function in timed(make_trainer(jobs[name], ablations), options).items()
        }
    seconds = seconds_in_turn(functions, options.rounds)
    print(f"{device_name()}\n\n| network | training, images/s | inference, images/s |\n|---|---:|---:|")
    for name in options.names:
        training, inference = options.batch_size / seconds[name, "training"], 1 / seconds[name, "inference"]
        print(f"| {name} | {training:.1f} | {inference:.1f} |")


if __name__ == "__main__":
    main()
