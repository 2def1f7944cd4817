"""Whether a training step waits for the GPU: `python -m bench.host_waits`.

Takes training steps of the trainer, eager and compiled, and after a warm-up takes some under
`torch.cuda.set_sync_debug_mode("error")`, where PyTorch raises an error for whatever makes the host wait for the GPU.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from unept.config import Compile, DataConfig, ModelConfig, TrainConfig
from unept.training.freezing import training_mode
from unept.training.trainer import Trainer

from .harness import DEVICE

WARMUP, STEPS = 3, 3
NETWORK = ModelConfig("resnet50", pretrained_backbone=False)


@contextlib.contextmanager
def no_host_waits() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def take_steps(network: ModelConfig, compile: Compile, crop: int = 480, batch: int = 4) -> None:
    """Take training steps on noise, the last of them where waiting is an error.

    Raises:
        RuntimeError: a step waits for the GPU.
    """
    data = DataConfig(dataset="shapes", crop_size=(crop, crop), workers=0)
    config = TrainConfig(network, data, batch_size=batch, compile=compile, ema=0.99)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), torch.device(DEVICE))
    training_mode(trainer.model)
    images = torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8, device=trainer.device)
    labels = torch.randint(0, trainer.model.num_classes, (batch, crop, crop), dtype=torch.uint8, device=trainer.device)
    for _ in range(WARMUP):
        trainer.train_step(images, labels)
    with no_host_waits():
        for _ in range(STEPS):
            trainer.train_step(images, labels)


def main() -> None:
    """Take the steps and say that none waited."""
    if DEVICE != "cuda":
        sys.exit("a step waits for a GPU only where there is one, and PyTorch finds none here")
    options: tuple[Compile, ...] = ("off", "on")
    for option in options:
        take_steps(NETWORK, option)
        print(f"compile {option}: {STEPS} training steps without a wait of the host")


if __name__ == "__main__":
    main()
