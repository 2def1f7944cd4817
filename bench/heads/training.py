"""Training of the compared networks by this project's recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unept import distributed
from unept.config import ModelConfig, TrainConfig
from unept.model.output import TrainableModel
from unept.train import Trainer
from unept.training.class_weights import class_weights

from ..compared import ComparedNetwork
from .loss import HeadLoss

Build = Callable[[Sequence[str], Sequence[Any], ModelConfig], ComparedNetwork]
"""Names of the classes, palette and options of the model, of which those of the backbone count, to a network."""


class ComparedTrainer(Trainer):
    """Train a compared network.

    Args:
        build: makes it.
        config: options of the run.
        out: the run folder.
    """

    def __init__(self, build: Build, config: TrainConfig, out: Path):
        self.build = build
        super().__init__(config, out)

    def build_model(self) -> TrainableModel:
        """Return the network with the pretrained weights of its backbone."""
        return self.build(self.train_set.classes, self.train_set.palette, self.config.model)

    def build_loss(self) -> HeadLoss:
        """Return the loss with its auxiliary terms, and the region losses that this network's own recipe asks for."""
        weights = distributed.run_on_main(lambda: class_weights(self.config, self.train_set))
        return HeadLoss(self.train_set.ignore_index, weights, self.config.recipe.region_losses())
