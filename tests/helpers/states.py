"""The state of a training run, in miniature."""

from typing import Any

import torch

from unept.training.state import TrainingState


def training_state(step: int, **changes: Any) -> TrainingState:
    """A state after `step` steps, whose weights are the number of the step, with some fields changed."""
    fields = {
        "step": step,
        "classes": ["a", "b"],
        "model": {"weight": torch.full((1000,), float(step)), "count": torch.tensor(step)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1000)}}, "param_groups": []},
        "scheduler": {"last_epoch": step},
        "loss_history": [{"loss": torch.tensor(0.5)}],
        "best": 0.5,
        "skipped": 1,
    }
    return TrainingState(**{**fields, **changes})
