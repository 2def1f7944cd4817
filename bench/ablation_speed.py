"""Speed of the networks of `bench.ablations`: `python -m bench.ablation_speed --data CAMVID`.

Takes training steps as the ablations do, and predicts images of CamVid's size one at a time, on noise. The networks
take turns, so that what else the machine does slows all of them: the medians can be compared with each other.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from unept.inference import predict_ids
from unept.training.freezing import training_mode

from .ablation_plan import BASELINES, COMPARED, FINAL, Size, plan
from .ablations import Options as Ablations
from .ablations import make_trainer
from .harness import DEVICE, device_name


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


class Timed:
    """A network and the seconds that it took."""

    def __init__(self, trainer: Any, options: Options):
        self.trainer, size = trainer, options.crop_size
        draw = lambda high, *shape: torch.randint(0, high, shape, dtype=torch.uint8, device=DEVICE)
        self.samples = draw(256, options.batch_size, 3, *size), draw(11, options.batch_size, *size)
        self.image = draw(256, 1, 3, 360, 480)
        self.step_seconds: list[float] = []
        self.image_seconds: list[float] = []

    def run(self) -> None:
        """Take a step and predict an image."""
        training_mode(self.trainer.model)
        start = time.perf_counter()
        self.trainer.train_step(*self.samples)["loss"].item()
        self.step_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        predict_ids(self.trainer.model, self.image, self.trainer.inference).sum().item()
        self.image_seconds.append(time.perf_counter() - start)

    def rates(self) -> tuple[float, float]:
        """Images per second of training and of prediction."""
        training = self.trainer.config.batch_size / statistics.median(self.step_seconds[1:])
        return training, 1 / statistics.median(self.image_seconds[1:])


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
        networks = {name: Timed(make_trainer(jobs[name], ablations), options) for name in options.names}
    for _ in range(options.rounds + 1):
        for network in networks.values():
            network.run()
    print(f"{device_name()}, {torch.get_num_threads()} threads of PyTorch\n")
    print("| network | training, images/s | inference, images/s |\n|---|---:|---:|")
    for name, network in networks.items():
        print("| {} | {:.1f} | {:.1f} |".format(name, *network.rates()))


if __name__ == "__main__":
    main()
