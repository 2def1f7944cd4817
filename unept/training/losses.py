"""Losses of the steps since the last record: kept on the device, averaged over steps and ranks when they are read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import distributed
from ..config import TrainConfig
from ..data import SegmentationDataset
from ..model.loss import UNEPTLoss
from .class_weights import class_weights

Losses = dict[str, Tensor]
"""Scalar losses of a step by name, without a graph; `loss` is their weighted sum (Eq. 7)."""


def build_loss(config: TrainConfig, dataset: SegmentationDataset) -> UNEPTLoss:
    """Return the loss that the options of a run ask for.

    Raises:
        ValueError, DatasetError: see `class_weights.class_weights` and `unept.model.region_loss`.
    """
    return UNEPTLoss(
        config.loss_weights,
        dataset.ignore_index,
        distributed.run_on_main(lambda: class_weights(config, dataset)),
        pixel_loss=config.recipe.pixel_loss(),
        region_losses=config.recipe.region_losses(),
        num_directions=config.model.num_directions,
        direction_pixels=config.direction_pixels,
        boundary_balance=config.boundary_balance,
    )


def reduce_losses(history: Sequence[Losses], step: int) -> dict[str, float]:
    """Average each loss over the ranks and the steps. The host waits for the result.

    Args:
        history: losses of each step, all with the same names.
        step: the number of the last of these steps, counted from 1.

    Raises:
        FloatingPointError: a loss of one of the steps is NaN or infinite; the message names the step and the losses.
            Only rank 0 raises it; the other ranks end silently (SystemExit 2).
    """
    names = list(history[0])
    values = torch.stack([torch.stack(list(losses.values())) for losses in history])  # (steps, losses)
    values = distributed.mean_over_ranks(values).cpu()
    finite = values.isfinite()
    if not finite.all():
        if not distributed.is_main():
            raise SystemExit(2)
        first = int((~finite.all(dim=1)).nonzero()[0])
        bad_step = step - len(history) + first + 1
        bad = [name for name, ok in zip(names, finite[first], strict=True) if not ok]
        causes = [name for name in bad if name != "loss"] or bad
        raise FloatingPointError(f"the loss is not finite at step {bad_step}: {', '.join(causes)}")
    return dict(zip(names, values.mean(dim=0).tolist(), strict=True))


def average_over_ranks(history: Sequence[Losses]) -> list[Losses]:
    """Average each loss of each step over the ranks, in place."""
    return [{name: distributed.mean_over_ranks(loss) for name, loss in losses.items()} for losses in history]
