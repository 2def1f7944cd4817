"""PASCAL-Context: photos of PASCAL VOC 2010 with every pixel labelled; 59 classes and the background.

The benchmark comes with 459 classes, of which the 59 most frequent count. Files in the layout below are made from it by
a converter that numbers the 59 in the order of their 459 ids, which is alphabetical; the benchmark's own list,
59_labels.txt, has another order (VOC's 20 classes first). Labels numbered like that list load without an error and
score the same mIoU, but under wrong names.
"""

from pathlib import Path

from .base import IGNORE_INDEX, DatasetError
from .files import FileDataset, Pair, find_root, pair_with_labels, require_folder

CLASSES = (
    *("background", "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle"),
    *("building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain"),
    *("dog", "door", "fence", "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light", "motorbike"),
    *("mountain", "mouse", "person", "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves"),
    *("sidewalk", "sign", "sky", "snow", "sofa", "table", "track", "train", "tree", "truck", "tvmonitor", "wall"),
    *("water", "window", "wood"),
)


class PascalContext(FileDataset):
    """PASCAL-Context, 60 classes with background or 59 without. Label PNGs hold 0..59, 0 for the background.

    Args:
        root: the folder that holds `JPEGImages/*.jpg`, `SegmentationClassContext/*.png` and
            `ImageSets/SegmentationContext/{train,val,test}.txt`, one name per line; it is called VOC2010, and its
            parent folder or VOCdevkit's works as well.
        split: `"train"`, `"val"` or `"test"`; `test` has no labels.
        background: count the background as a class, as the paper does. Otherwise it is ignored, which gives different
            scores; `description` says which of the two holds.

    Raises:
        DatasetError: if a list is missing or empty or names an image that does not exist; see also `FileDataset`
            and `pair_with_labels`.
    """

    def __init__(self, root: str | Path, split: str = "train", background: bool = True):
        self.background = background
        folder = find_root(root, "VOCdevkit/VOC2010", "VOC2010")
        first = 0 if background else 1
        super().__init__(
            pairs=_find_pairs(folder, split),
            classes=CLASSES[first:],
            palette=tuple(voc_color(i) for i in range(first, len(CLASSES))),
            label_ids={i: i - first if i >= first else IGNORE_INDEX for i in range(len(CLASSES))},
        )

    @property
    def description(self) -> str:
        """The dataset, its number of classes, and whether the background is one of them."""
        return f"PASCAL-Context, {len(self.classes)} classes {'with' if self.background else 'without'} background"


def voc_color(label: int) -> tuple[int, int, int]:
    """(r, g, b) of a label in PASCAL VOC's color map: the label's bits go to the channels in turn, highest first."""
    red, green, blue = (
        sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)
    )
    return red, green, blue


def _find_pairs(folder: Path, split: str) -> list[Pair]:
    """(image, label) paths of the images that the split's list names, in its order."""
    images, labels = folder / "JPEGImages", folder / "SegmentationClassContext"
    require_folder(images)
    listing = folder / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    try:
        names = dict.fromkeys(listing.read_text().split())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"the list of images {listing} can't be read ({error}): write the images' names without .jpg, one per line"
        ) from error
    if not names:
        raise DatasetError(f"{listing} names no image: write the images' names without .jpg, one per line")
    existing = {file.name for file in images.iterdir()}
    missing = [name for name in names if f"{name}.jpg" not in existing]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(names)} images that {listing} names are not in {images}, the first being "
            f"{missing[0]}.jpg: restore them, or take them off the list"
        )
    files = [images / f"{name}.jpg" for name in names]
    return [(file, None) for file in files] if split == "test" else pair_with_labels(files, labels)
