"""Cityscapes with fine annotations, as distributed: 2048x1024 street scenes, 19 classes."""

from pathlib import Path

from torchvision.datasets import Cityscapes as Torchvision

from .base import IGNORE_INDEX, DatasetError
from .files import FileDataset, Pair, find_pairs, list_images, require_folder

LABELS = Torchvision.classes  # the benchmark's own table: name, id, train_id, color and more of every label
CLASSES = sorted((label for label in LABELS if 0 <= label.train_id < IGNORE_INDEX), key=lambda label: label.train_id)
IMAGE_ENDING, LABEL_ENDING = "_leftImg8bit", "_gtFine_labelIds.png"


class Cityscapes(FileDataset):
    """Cityscapes, 19 classes. Label PNGs hold the benchmark's ids 0..33; those that it does not score are ignored.

    So is 255, which is the license plate's id of -1 in 8 bits. The labels of `test` are withheld: its files in gtFine/
    are dummies, which are not looked at.

    Args:
        root: the folder that holds `leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png` and
            `gtFine/{train,val}/CITY/*_gtFine_labelIds.png`.
        split: `"train"`, `"val"` or `"test"`.

    Raises:
        DatasetError: see `FileDataset`, `list_images` and `pair_with_labels`.
    """

    has_test_server = True

    def __init__(self, root: str | Path, split: str = "train"):
        super().__init__(
            pairs=_find_pairs(Path(root), split),
            classes=tuple(label.name for label in CLASSES),
            palette=tuple(label.color for label in CLASSES),
            label_ids={label.id % 256: label.train_id if label in CLASSES else IGNORE_INDEX for label in LABELS},
        )

    def name(self, i: int) -> str:
        """`CITY_SEQUENCE_FRAME`: the server accepts files whose names start with it."""
        return super().name(i).removesuffix(IMAGE_ENDING)


def _find_pairs(root: Path, split: str) -> list[Pair]:
    """(image, label) paths of all cities."""
    images, labels = (root / part / split for part in ("leftImg8bit", "gtFine"))
    require_folder(images)
    cities = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    if not cities:
        raise DatasetError(f"{images} holds no folders: it must have one per city, as in leftImg8bit_trainvaltest")
    pairs: list[Pair] = []
    for city in cities:
        if split == "test":
            pairs += [(file, None) for file in list_images(images / city, IMAGE_ENDING)]
        else:
            pairs += find_pairs(images / city, labels / city, IMAGE_ENDING, LABEL_ENDING)
    return pairs
