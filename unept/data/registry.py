"""The datasets by name: one row each, from which `unept.config`, the command line and the model card read."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .ade20k import ADE20K
from .base import SPLITS, SegmentationDataset
from .camvid import CamVid
from .cityscapes import Cityscapes
from .folder import ImageFolder
from .pascal_context import PascalContext
from .shapes import Shapes


@dataclass(frozen=True)
class DatasetEntry:
    """What the other parts of the package know of a dataset."""

    create: Callable[..., SegmentationDataset]
    """Its class; called with `root`, `split` and its own options."""
    title: str
    """Its name in model cards."""
    options: tuple[str, ...] = ()
    """The arguments of `create` that are options of a run; `unept.config.DataConfig` has a field for each."""
    in_memory: bool = False
    """Whether it is generated, so that there is no root folder."""


DATASETS: dict[str, DatasetEntry] = {
    "shapes": DatasetEntry(Shapes, "shapes (made in memory by unept)", in_memory=True),
    "camvid": DatasetEntry(CamVid, "CamVid"),
    "folder": DatasetEntry(
        ImageFolder,
        "a folder of images",
        options=("images", "labels", "classes_file", "label_suffix", "label_ids", "ignore_id", "label_format"),
    ),
    "ade20k": DatasetEntry(ADE20K, "ADE20K"),
    "cityscapes": DatasetEntry(Cityscapes, "Cityscapes"),
    "pascal_context": DatasetEntry(PascalContext, "PASCAL-Context", options=("background",)),
}

# What other packages may declare in the metadata of their distributions: a dataset class for each name.
ENTRY_POINTS = "unept.datasets"
Class = TypeVar("Class", bound=Callable[..., SegmentationDataset])


def register_dataset(
    name: str, *, title: str | None = None, options: tuple[str, ...] = (), in_memory: bool = False
) -> Callable[[Class], Class]:
    """Return a decorator that adds a dataset class by name, which the commands then know.

    Args:
        name: what `--dataset` calls it. The commands find it if its module is imported (`--import my_module`), or if a
            distribution has it as an entry point of the group `unept.datasets`.
        title: its name in model cards; None means `name`.
        options: arguments of the class beside `root` and `split` that are fields of `unept.config.DataConfig`.
        in_memory: whether it is generated, so that there is no root folder.

    Raises:
        ValueError: another class has the name.

    Example:
        >>> @register_dataset("mine")
        ... class Mine(SegmentationDataset): ...
    """

    def register(create: Class) -> Class:
        known = DATASETS.get(name)
        if known is not None and _origin(known.create) != _origin(create):
            raise ValueError(
                f"there is a dataset {name!r} already, {known.create!r}: register yours under another name"
            )
        DATASETS[name] = DatasetEntry(create, title or name, options, in_memory)
        return create

    return register


def _origin(create: Any) -> tuple[str, str]:
    """What is the same for a class after its module was imported anew."""
    return create.__module__, create.__qualname__


def _find_entry_point(name: str) -> None:
    """Register the dataset of that name which an installed distribution declares, if any."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        create = entry.load()
        if name not in DATASETS:  # else loading its module has registered it
            register_dataset(name)(create)


def find_dataset(name: str) -> DatasetEntry:
    """The row of a dataset.

    Raises:
        ValueError: if there is no dataset of that name; the message lists the names.
    """
    if name not in DATASETS:
        _find_entry_point(name)
    if name not in DATASETS:
        raise ValueError(
            f"there is no dataset {name!r}; the datasets are {', '.join(DATASETS)}, and those that modules register "
            "(--import MODULE)"
        )
    return DATASETS[name]


def build_dataset(
    name: str, root: str | Path | None = None, split: str = "train", **options: Any
) -> SegmentationDataset:
    """Create a dataset by name.

    Args:
        name: a key of `DATASETS`.
        root: the folder with the files; None for `shapes`, which has none.
        split: `"train"`, `"val"` or `"test"`.
        options: further arguments of the dataset's class.

    Raises:
        ValueError: if there is no such dataset or split, or the dataset needs a root and none is given.
        DatasetError: if its files break a rule.
    """
    entry = find_dataset(name)
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
    if root is None and not entry.in_memory:
        raise ValueError(f"the dataset {name!r} reads files: give root (--root), the folder that holds them")
    return entry.create(root=root, split=split, **options)
