"""Your own images: a folder of images, a folder of labels and a list of class names.

my_data/
  classes.txt             one class per line: `name`, or `name r g b` with its color (`unept.data.class_list`)
  images/train/street1.jpg
  images/val/street2.jpg
  labels/train/street1.png   each pixel holds the place (from 0) of its class in the list, or its color; 255 is ignored
  labels/val/street2.png
"""

from collections.abc import Sequence
from pathlib import Path

from .base import IGNORE_INDEX, DatasetError
from .class_list import read_class_list
from .files import FileDataset, LabelFormat
from .finding import find_pairs, left_out
from .reading import MAX_LABEL_ID


class ImageFolder(FileDataset):
    """Any pair of image and label folders with a class list, laid out as at the top of this file or as the options say.

    Args:
        root: the folder that holds everything.
        split: `"train"`, `"val"` or `"test"`.
        images: the folder of images under `root`; `{split}` stands for the split.
        labels: the folder of labels, likewise; each label has its image's stem and a suffix of a format without loss.
        classes_file: the class list under `root`.
        label_suffix: what follows the image's stem in the label's name, such as `_mask` or `_mask.png`.
        label_ids: `ID=CLASS` for each id in label files, where CLASS is a name of the class list or its place in it,
            from 0. Empty: the ids are these places.
        ignore_id: ids in label files that do not count, besides 255 (unless `label_ids` maps it).
        label_format: what RGB labels hold; see `FileDataset`.

    Raises:
        DatasetError: for a bad class list; see `FileDataset` and `find_pairs` for the other cases.
        ValueError: for a bad map of ids.

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
        label_suffix: str = "",
        label_ids: Sequence[str] = (),
        ignore_id: Sequence[int] = (),
        label_format: LabelFormat = "auto",
    ):
        root = Path(root)
        if not root.is_dir():
            raise DatasetError(f"there is no folder {root}: give the root folder of the dataset")
        classes = read_class_list(root / classes_file)
        self.folders = root / images.replace("{split}", split), root / labels.replace("{split}", split)
        # Of labels of all splits in one folder, most belong to the images of others.
        self.label_ending = label_suffix if "{split}" in labels else None
        super().__init__(
            pairs=find_pairs(*self.folders, label_ending=label_suffix),
            classes=classes.names,
            palette=classes.palette,
            label_ids=training_ids(classes.names, label_ids, ignore_id),
            label_colors=classes.colors,
            label_format=label_format,
        )

    def warnings(self) -> list[str]:
        """Which subfolders and labels have been left out."""
        return left_out(self.pairs, *self.folders, self.label_ending)


def training_ids(classes: Sequence[str], label_ids: Sequence[str], ignore_id: Sequence[int]) -> dict[int, int]:
    """The training id of every id that label files may hold, as the options of `ImageFolder` say.

    Raises:
        ValueError: if an entry is not `ID=CLASS`, an id is given twice or is not in 0..65535, or a class has no id.
    """
    ids = {i: i for i in range(len(classes)) if i not in ignore_id}
    if label_ids:
        ids = _parse_label_ids(label_ids, classes)
    ignored = {IGNORE_INDEX, *ignore_id}
    if label_ids and (both := sorted(set(ids) & set(ignore_id))):
        raise ValueError(f"id {both[0]} is in label_ids and in ignore_id: remove it from one of them")
    if bad := [i for i in (*ids, *ignored) if not 0 <= i <= MAX_LABEL_ID]:
        raise ValueError(f"{bad[0]} can't be an id of a label: ids go from 0 to {MAX_LABEL_ID}")
    if missing := [name for k, name in enumerate(classes) if k not in ids.values()]:
        raise ValueError(
            f"class {missing[0]!r} has no id: give it one in label_ids, or remove the class from the class list"
        )
    return {**dict.fromkeys(ignored, IGNORE_INDEX), **ids}


def _parse_label_ids(label_ids: Sequence[str], classes: Sequence[str]) -> dict[int, int]:
    ids: dict[int, int] = {}
    for entry in label_ids:
        file_id, separator, name = entry.partition("=")
        if name in classes:
            training_id = list(classes).index(name)
        else:
            training_id = int(name) if name.isdecimal() else -1
        if not separator or not file_id.isdecimal() or not 0 <= training_id < len(classes):
            raise ValueError(
                f"label_ids has {entry!r}; write ID=CLASS, where ID is a number in label files and CLASS a name of the "
                f"class list or its place in it, 0 to {len(classes) - 1}, such as 0=0 255=1"
            )
        if int(file_id) in ids:
            raise ValueError(f"label_ids maps id {file_id} twice: remove one of the entries")
        ids[int(file_id)] = training_id
    return ids
