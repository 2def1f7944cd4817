"""CamVid as its 11-class edition is distributed: 480x360 frames from a car; the smallest of the real benchmarks."""

from pathlib import Path

from .base import IGNORE_INDEX
from .files import FileDataset, find_pairs

CLASSES = (
    ("Sky", (128, 128, 128)),
    ("Building", (128, 0, 0)),
    ("Pole", (192, 192, 128)),
    ("Road", (128, 64, 128)),
    ("Pavement", (60, 40, 222)),
    ("Tree", (128, 128, 0)),
    ("SignSymbol", (192, 128, 128)),
    ("Fence", (64, 64, 128)),
    ("Car", (64, 0, 128)),
    ("Pedestrian", (64, 64, 0)),
    ("Bicyclist", (0, 128, 192)),
)
VOID = 11


class CamVid(FileDataset):
    """CamVid, 11 classes. Label PNGs hold 0..10, and 11 for void, which is ignored.

    Args:
        root: the folder that holds `{train,val,test}/` (images, .png or .jpg) and `{train,val,test}annot/`.
        split: `"train"`, `"val"` or `"test"`.

    Raises:
        DatasetError: see `FileDataset` and `find_pairs`.
    """

    def __init__(self, root: str | Path, split: str = "train"):
        root = Path(root)
        super().__init__(
            pairs=find_pairs(root / split, root / f"{split}annot"),
            classes=tuple(name for name, _ in CLASSES),
            palette=tuple(color for _, color in CLASSES),
            label_ids={i: i for i in range(len(CLASSES))} | {VOID: IGNORE_INDEX, IGNORE_INDEX: IGNORE_INDEX},
        )
