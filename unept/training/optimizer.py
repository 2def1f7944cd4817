"""The optimiser, its learning rates (Sec. 4.2, Training) and the average of the weights."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from ..config import TrainConfig
from ..model.output import TrainableModel


def build_optimizer(model: TrainableModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with a learning rate of its own for the backbone; the backbone is the second parameter group."""
    backbone = list(model.backbone.parameters())
    ids = {id(p) for p in backbone}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in ids], "lr": config.lr},
        {"params": backbone, "lr": config.backbone_lr},
    ]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> LambdaLR:
    """Return the scheduler that multiplies all learning rates by `learning_rate_factor`, to be called every step."""
    return LambdaLR(optimizer, partial(learning_rate_factor, config))


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Return the factor of the learning rates at a step, which counts from 0."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "step":
        return warmup * (0.1 if step >= config.iterations * config.lr_drop else 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.iterations))


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a model's weights and of its batch-normalisation statistics.

    The first update copies the weights; then the decay rises to `decay`, so that the random weights of the start are
    soon forgotten. Integers, such as the number of batches seen, are copied.
    """

    def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return current
        return torch.lerp(averaged, current, 1 - min(decay, (1 + int(updates)) / (10 + int(updates))))

    return AveragedModel(model, avg_fn=average, use_buffers=True)
