"""Weights of the classes in the segmentation losses, for data sets with thin or rare classes."""

import torch
from torch import Tensor

from ..config import TrainConfig
from ..data import SegmentationDataset
from ..data.base import OnBadSample
from ..data.loader import read_sample


def class_weights(config: TrainConfig, dataset: SegmentationDataset) -> Tensor | None:
    """Return the weights (K,) float32 that `config.class_weights` asks for; None for none.

    Raises:
        ValueError: there is not one number per class.
        DatasetError: a label cannot be read.
    """
    chosen = config.class_weights
    if chosen == "none":
        return None
    if chosen == "auto":
        return balanced_class_weights(dataset, on_bad_sample=config.data.on_bad_sample)
    if len(chosen) != len(dataset.classes):
        raise ValueError(
            f"class_weights has {len(chosen)} numbers, but the data set has {len(dataset.classes)} classes: give one "
            f"for each of {', '.join(dataset.classes)}, or auto"
        )
    return torch.tensor(chosen, dtype=torch.float32)


def balanced_class_weights(
    dataset: SegmentationDataset, sample: int = 1000, on_bad_sample: OnBadSample = "error"
) -> Tensor:
    """Return the inverse square root of each class's share of the pixels that are not ignored, (K,) float32.

    The weights are scaled so that their mean over the pixels is 1. A class that does not occur has the weight of the
    rarest one that does.

    Args:
        dataset: the images and their labels.
        sample: how many labels are read, spread evenly over the data set.
        on_bad_sample: `"skip"` reads the next one in place of a sample that cannot be read.

    Raises:
        DatasetError: a label cannot be read.
        ValueError: all pixels that were read are ignored.
    """
    num_classes, count = len(dataset.classes), min(sample, len(dataset))
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    for i in range(count):
        _, (_, mask), _ = read_sample(dataset, i * len(dataset) // count, on_bad_sample)
        labels = mask.as_subclass(Tensor)
        pixels += labels[labels != dataset.ignore_index].bincount(minlength=num_classes)
    if not pixels.any():
        raise ValueError(f"all pixels of {count} labels are ignored: class weights need labelled pixels")
    share = pixels / pixels.sum()
    weights = share.clamp(min=share[share > 0].min()).rsqrt()
    return (weights / (weights * share).sum()).float()
