"""The optimiser and its learning rates (Sec. 4.2, Training)."""

import math

import torch

from ..config import TrainConfig
from ..model.network import UNEPT


def build_optimizer(model: UNEPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the backbone's own learning rate."""
    backbone = list(model.backbone.parameters())
    ids = {id(p) for p in backbone}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in ids], "lr": config.lr},
        {"params": backbone, "lr": config.backbone_lr},
    ]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rates are multiplied with at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "step":
        return warmup * (0.1 if step >= config.iterations * 2 / 3 else 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.iterations))
