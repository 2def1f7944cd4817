"""The optimiser, its learning rates (Sec. 4.2, Training) and the average of the weights."""

import math
from functools import partial
from typing import Any

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


def restore_optimizer(optimizer: torch.optim.Optimizer, scheduler: LambdaLR, state: dict[str, Any], steps: int) -> None:
    """Continue with the moments of a stored optimiser, but with the options that this one was built with.

    Args:
        optimizer: the optimiser, as `build_optimizer` returned it.
        scheduler: its scheduler, as `build_scheduler` returned it.
        state: state dict of the stored optimiser.
        steps: number of steps after which it was stored.
    """
    options = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    scheduler.last_epoch = steps
    for group, own, rate, factor in zip(
        optimizer.param_groups, options, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group.update(own)
        group["lr"] = rate * factor(steps)


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Return the factor of the learning rates at a step, which counts from 0."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "step":
        return warmup * (0.1 if step >= config.iterations * 2 / 3 else 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.iterations))


def describe_schedule(config: TrainConfig, step: int) -> str:
    """Say in a sentence what the learning rate is at a step, which counts from 0, and how it goes on."""
    rate = config.lr * learning_rate_factor(config, step)
    if config.schedule == "step":
        drop = math.ceil(config.iterations * 2 / 3)
        rest = f"falls to {0.1 * config.lr:.1e} at step {drop}" if step < drop else "stays there"
    else:
        rest = "falls along a cosine to 0"
    return f"the learning rate is {rate:.1e} at step {step} of {config.iterations} and {rest}"


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
