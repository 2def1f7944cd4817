"""Training runs of a tiny network on images of the shapes data set, and what is read from their records."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from unept import train
from unept.config import TrainConfig

# A network of 10 layers on crops of 64x64: a step takes a tenth of a second.
NETWORK = [
    *("--backbone", "resnet10t", "--no-pretrained-backbone", "--output-stride", "32", "--d-model", "32"),
    *("--amp", "off"),  # the same numbers in a process of its own, on any CPU
    *("--num-heads", "2", "--num-points", "2", "--ffn-dim", "32", "--crop-size", "64", "64", "--short-side", "None"),
]
# 12 steps with records at 3, 6, 9 and 12, evaluations at 6 and 12, checkpoints at 4, 8 and 12.
SCHEDULE = ["--iterations", "12", "--log-every", "3", "--eval-every", "6", "--checkpoint-every", "4"]
LOSSES = ("loss", "segmentation", "refined", "boundary", "direction")


def arguments(root: Path, *options: str) -> list[str]:
    """The command line of a run on the data in a folder (`layouts.shapes`)."""
    return ["folder", "--root", str(root), *NETWORK, *SCHEDULE, *options]


def configuration(command_line: list[str], **changes: Any) -> TrainConfig:
    """The configuration that a command line asks for, with some options changed."""
    return dataclasses.replace(train.parse(command_line)[1], **changes)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loss_curve(folder: Path) -> list[list[float]]:
    """Step and losses of each record of the losses, without what depends on the clock."""
    return [[line["step"], *(line[name] for name in LOSSES)] for line in read_records(folder) if "loss" in line]
