"""The batches of a training run, from its options."""

from typing import Any

from .. import distributed
from ..config import TrainConfig
from ..data import SegmentationDataset
from ..data.loader import Transform, training_loader


def build_loader(
    config: TrainConfig, dataset: SegmentationDataset, transform: Transform, batch_size: int, start_sample: int
) -> Any:
    """Return the endless loader of this rank's training batches.

    Args:
        config: options of the run.
        dataset: the training set.
        transform: what makes a training sample of an image and its labels.
        batch_size: number of images per batch of this rank.
        start_sample: number of images that all ranks have drawn before; the loader goes on with the next.
    """
    data = config.data
    return training_loader(
        dataset,
        transform,
        batch_size=batch_size,
        seed=config.seed,
        start_sample=start_sample,
        workers=data.workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        on_bad_sample=data.on_bad_sample,
    )
