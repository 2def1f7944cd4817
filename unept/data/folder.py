"""Your own images: a folder of images, a folder of labels and a list of class names.

my_data/
  classes.txt             one class per line: `name`, or `name r g b` with the color to draw it in
  images/train/street1.jpg
  images/val/street2.jpg
  labels/train/street1.png   8-bit, mode L or P: each pixel holds the line (from 0) of its class; 255 is ignored
  labels/val/street2.png
"""

from pathlib import Path

from ..colors import default_palette
from .base import IGNORE_INDEX, DatasetError
from .files import FileDataset, find_pairs


class ImageFolder(FileDataset):
    """Any pair of image and label folders with a class list, laid out as at the top of this file or as the options say.

    Args:
        root: the folder that holds everything.
        split: `"train"`, `"val"` or `"test"`.
        images: the folder of images under `root`; `{split}` stands for the split.
        labels: the folder of labels, likewise; each label has its image's stem and the suffix .png.
        classes_file: the class list under `root`.

    Raises:
        DatasetError: for a bad class list; see `FileDataset` and `find_pairs` for the other cases.

    Example:
        >>> ImageFolder("camvid", "val", images="{split}", labels="{split}annot")
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        images: str = "images/{split}",
        labels: str = "labels/{split}",
        classes_file: str = "classes.txt",
    ):
        root = Path(root)
        if not root.is_dir():
            raise DatasetError(f"there is no folder {root}: give the root folder of the dataset")
        classes, palette = read_classes(root / classes_file)
        super().__init__(
            pairs=find_pairs(root / images.replace("{split}", split), root / labels.replace("{split}", split)),
            classes=classes,
            palette=palette,
            label_ids={i: i for i in range(len(classes))} | {IGNORE_INDEX: IGNORE_INDEX},
        )


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Read names and colors from a class list; classes without a color get one of `default_palette`.

    Raises:
        DatasetError: if the file is missing or not UTF-8 text, or holds no class, an empty line, a name twice, a color
            outside 0..255 or more than 255 classes.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"the class list {path} can't be read ({error}): write one class per line, `name` or `name r g b`"
        ) from error
    if not 0 < len(lines) <= IGNORE_INDEX:
        raise DatasetError(f"{path} lists {len(lines)} classes: write 1 to {IGNORE_INDEX}, one per line")
    names: list[str] = []
    palette = list(default_palette(len(lines)))
    for i, line in enumerate(lines):
        words = line.split()
        if len(words) >= 3 and all(word.isdecimal() for word in words[-3:]):
            red, green, blue = map(int, words[-3:])
            palette[i] = (red, green, blue)
            words = words[:-3]
        names.append(" ".join(words))
        if not names[i]:
            raise DatasetError(
                f"line {i + 1} of {path} names no class: a class's id is its line, so no line may be empty"
            )
        if names[i] in names[:i]:
            raise DatasetError(f"{path} lists {names[i]!r} twice, in lines {names.index(names[i]) + 1} and {i + 1}")
        if max(palette[i]) > 255:
            raise DatasetError(f"line {i + 1} of {path} gives the color {palette[i]}: r, g and b go from 0 to 255")
    return tuple(names), tuple(palette)
