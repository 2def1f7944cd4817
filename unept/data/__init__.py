"""Datasets, training transforms and loaders (Sec. 4.1, 4.2)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .ade20k import ADE20K
from .base import SPLITS, DatasetError, FileDataset, SegmentationDataset
from .camvid import CamVid
from .check import check_splits
from .cityscapes import Cityscapes
from .folder import ImageFolder
from .loader import TrainingSampler, TransformedDataset, evaluation_loader, image_loader, training_loader
from .pascal_context import PascalContext
from .shapes import Shapes
from .transforms import eval_transform, train_transform

__all__ = [
    "ADE20K",
    "DATASETS",
    "SPLITS",
    "CamVid",
    "Cityscapes",
    "DatasetError",
    "FileDataset",
    "ImageFolder",
    "PascalContext",
    "SegmentationDataset",
    "Shapes",
    "TrainingSampler",
    "TransformedDataset",
    "build_dataset",
    "check_splits",
    "eval_transform",
    "evaluation_loader",
    "image_loader",
    "train_transform",
    "training_loader",
]

DATASETS: dict[str, Callable[..., SegmentationDataset]] = {
    "shapes": Shapes,
    "camvid": CamVid,
    "folder": ImageFolder,
    "ade20k": ADE20K,
    "cityscapes": Cityscapes,
    "pascal_context": PascalContext,
}


def build_dataset(
    name: str, root: str | Path | None = None, split: str = "train", **options: Any
) -> SegmentationDataset:
    """A dataset by name.

    Args:
        name: a key of `DATASETS`.
        root: the folder with the files; None for `shapes`, which has none.
        split: `"train"`, `"val"` or `"test"`.
        options: of that dataset's class.

    Raises:
        ValueError: if there is no such dataset or split, or the dataset needs a root and none is given.
        DatasetError: if its files break a rule.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no dataset {name!r}; the datasets are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
    if root is None and name != "shapes":
        raise ValueError(f"the dataset {name!r} reads files: give root (--root), the folder that holds them")
    return DATASETS[name](root=root, split=split, **options)
