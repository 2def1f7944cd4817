"""The batches of a training run, from its options."""

from collections.abc import Sequence
from typing import Any

from .. import distributed
from ..config import TrainConfig
from ..data import SegmentationDataset
from ..data.loader import training_loader
from ..data.transforms import train_transform


def build_loader(
    config: TrainConfig, dataset: SegmentationDataset, mean: Sequence[float], batch_size: int, start_step: int
) -> Any:
    """Return the endless loader of this rank's training batches.

    Args:
        config: options of the run.
        dataset: the training set.
        mean: mean of RGB in [0, 1], which fills what a crop has beyond its image.
        batch_size: number of images per batch of this rank.
        start_step: number of steps that the run has taken; the loader goes on with the next.
    """
    data = config.data
    transform = train_transform(
        data.crop_size,
        short_side=data.short_side,
        scale=data.scale,
        cat_max_ratio=data.cat_max_ratio,
        flip=data.flip,
        photometric=data.photometric,
        fill=tuple(round(255 * value) for value in mean),
    )
    return training_loader(
        dataset,
        transform,
        batch_size=batch_size,
        seed=config.seed,
        start_step=start_step,
        workers=data.workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        on_bad_sample=data.on_bad_sample,
    )
