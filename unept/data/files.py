"""Datasets that are pairs of image and label files.

`finding` says how files are found and paired, `reading` how they are read.

Letters: H, W height and width of an image, K number of classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torchvision import tv_tensors

from .base import IGNORE_INDEX, DatasetError, SegmentationDataset
from .finding import Pair
from .finding import find_images as find_images
from .finding import find_pairs as find_pairs
from .finding import find_root as find_root
from .finding import list_images as list_images
from .finding import pair_with_labels as pair_with_labels
from .finding import require_folder as require_folder
from .reading import MAX_LABEL_ID, read_channels_last, read_label
from .reading import image_to_tensor as image_to_tensor
from .reading import read_image as read_image

Color = tuple[int, int, int]
LabelFormat = Literal["auto", "ids", "colors"]


class FileDataset(SegmentationDataset):
    """Pairs of an image file and a label file of the same size; in a split without labels, images alone.

    Images may be gray, palette, RGBA, CMYK or 16 bits deep; they come out as RGB, and upright as their EXIF tag says.
    Labels hold one id per pixel, in a gray or palette file or in an RGB file with three equal channels, or the colors
    of the classes in an RGB file (`unept.data.reading.read_label`).

    Args:
        pairs: (image, label) paths; the label is None where there is none.
        classes: the K class names.
        palette: the K colors (r, g, b), 0..255.
        label_ids: the training id (0..K-1 or 255) of every id, 0..65535, that label files may hold; every class has
            one.
        label_colors: the training id of every color that label files may hold; None if they hold none.
        label_format: what RGB labels hold. `"auto"`: colors where all of them are classes', ids where the channels are
            equal. `"colors"` also reads palette files by their colors.
    """

    def __init__(
        self,
        pairs: list[Pair],
        classes: tuple[str, ...],
        palette: tuple[Color, ...],
        label_ids: Mapping[int, int],
        label_colors: Mapping[Color, int] | None = None,
        label_format: LabelFormat = "auto",
    ):
        self.pairs = pairs
        self.classes = classes
        self.palette = palette
        self.label_format = label_format
        self.label_colors = {_pack(*color): training_id for color, training_id in (label_colors or {}).items()}
        self._allowed: np.ndarray = np.zeros(MAX_LABEL_ID + 1, dtype=bool)  # by id in label files: may it occur there
        self._training_id: np.ndarray = np.full(MAX_LABEL_ID + 1, IGNORE_INDEX, dtype=np.uint8)
        for file_id, training_id in label_ids.items():
            self._allowed[file_id] = True
            self._training_id[file_id] = training_id

    @property
    def file_ids(self) -> tuple[int, ...]:
        """The id that each of the K classes has in label files: the inverse of `label_ids`."""
        return tuple(int(np.flatnonzero(self._allowed & (self._training_id == k))[0]) for k in range(len(self.classes)))

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return all(label is not None for _, label in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, label_path = self.pairs[i]
        if label_path is None:
            raise DatasetError(
                f"{image_path} has no label: this split can be predicted (unept.submission), "
                "but not trained or evaluated on; take the split val"
            )
        image = self.image(i)
        ids = self._read_training_ids(label_path)
        if ids.shape != image.shape[1:]:
            raise DatasetError(_sizes_differ(image_path, tuple(image.shape[1:]), label_path, ids.shape))
        return image, tv_tensors.Mask(torch.from_numpy(ids))

    def image(self, i: int) -> tv_tensors.Image:
        """The image of sample `i`; its label is not read."""
        return tv_tensors.Image(read_channels_last(self.pairs[i][0]))

    def name(self, i: int) -> str:
        """The stem of the image's file name."""
        return self.pairs[i][0].stem

    def _read_training_ids(self, path: Path) -> np.ndarray:
        """The label as training ids, uint8 (H, W)."""
        stored = read_label(path, colors=self.label_format == "colors")
        if stored.ndim == 2:
            return self._from_ids(stored, path)
        gray = bool((stored == stored[..., :1]).all())
        from_colors, unknown = self._from_colors(stored)
        if self.label_format == "ids" or (unknown and self.label_format == "auto" and gray):
            if not gray:
                raise DatasetError(f"{path} shows colors, but label_format is 'ids': choose 'auto' or 'colors'")
            return self._from_ids(stored[..., 0], path)
        if unknown:
            raise DatasetError(self._colors_not_allowed(path, unknown))
        if self.label_format == "auto" and gray and self._differs_as_ids(stored[..., 0], from_colors):
            raise DatasetError(
                f"{path} can be read in two ways: as class ids, and as colors of the class list. Say which with "
                "--label-format ids or --label-format colors"
            )
        return from_colors

    def _differs_as_ids(self, ids: np.ndarray, training_ids: np.ndarray) -> bool:
        """Whether ids may occur in labels and stand for others than these training ids."""
        return bool(self._allowed[ids].all() and (self._training_id[ids] != training_ids).any())

    def _from_ids(self, ids: np.ndarray, path: Path) -> np.ndarray:
        countable = torch.from_numpy(ids if ids.dtype == np.uint8 else ids.astype(np.int32))
        counts = torch.bincount(countable.flatten(), minlength=256).numpy()
        if counts[~self._allowed[: len(counts)]].any():
            raise DatasetError(self._ids_not_allowed(path, counts))
        return self._training_id.take(ids)

    def _from_colors(self, colors: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """Training ids (H, W) of colors (H, W, 3), and the number of pixels of each color that is no class's."""
        packed, inverse, counts = np.unique(
            _pack(*np.moveaxis(colors.astype(np.int32), -1, 0)), return_inverse=True, return_counts=True
        )
        ids = np.array([self.label_colors.get(int(color), IGNORE_INDEX) for color in packed], dtype=np.uint8)
        unknown = {int(c): int(n) for c, n in zip(packed, counts, strict=True) if int(c) not in self.label_colors}
        return ids[inverse].reshape(colors.shape[:2]), unknown

    def _ids_not_allowed(self, path: Path, counts: np.ndarray) -> str:
        found = np.flatnonzero(counts).tolist()
        bad = [f"id {i} in {counts[i]} pixels" for i in found if not self._allowed[i]]
        allowed = ", ".join(_ranges(np.flatnonzero(self._allowed).tolist()))
        message = (
            f"{path} holds {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}, outside the class list: "
            f"the {len(self.classes)} classes allow {allowed}. Correct the label, or add the class to the list"
        )
        if 0 not in found and max(set(found) - {IGNORE_INDEX}, default=0) == len(self.classes):
            message += ". If ids count from 1, map them: --label-ids 1=0 2=1 and so on"
        elif len(found) <= len(self.classes):  # such as 0, 128 and 255 of three classes
            pairs = " ".join(f"{i}={k}" for k, i in enumerate(found))
            message += f". If these are its classes in order, the dataset folder maps them: --label-ids {pairs}"
        return message

    def _colors_not_allowed(self, path: Path, unknown: Mapping[int, int]) -> str:
        most = sorted(unknown, key=lambda color: -unknown[color])
        listed = ", ".join(f"{_unpack(color)} in {unknown[color]} pixels" for color in most[:5])
        if not self.label_colors:
            return (
                f"{path} shows colors ({listed}{', ...' if len(most) > 5 else ''}) instead of a class id per pixel: "
                "give the color of every class in the class list, as `name r g b`, or turn the colors into ids first"
            )
        return (
            f"{path} shows {listed}{', ...' if len(most) > 5 else ''}, which the class list does not have: add the "
            "classes of these colors to it, or correct the label. Smoothed edges or JPEG have colors of no class"
        )


def _pack(red, green, blue):
    """(r, g, b), numbers or arrays, as one integer."""
    return red << 16 | green << 8 | blue


def _unpack(color: int) -> Color:
    return color >> 16, color >> 8 & 255, color & 255


# Messages


def _sizes_differ(image: Path, image_size: tuple[int, ...], label: Path, label_size: tuple[int, ...]) -> str:
    """The message for sizes (H, W) that differ."""
    message = (
        f"{label} is {label_size[1]}x{label_size[0]} pixels, but its image {image} is {image_size[1]}x{image_size[0]}: "
        "both must have the same size; redo the label, or resize it by nearest neighbour"
    )
    if label_size == image_size[::-1]:
        message += ". If the image carries an EXIF rotation, the label must be drawn on the rotated image"
    return message


def _ranges(ids: list[int]) -> list[str]:
    """Write ids as ranges: [0, 1, 2, 255] -> ["0-2", "255"]."""
    starts = [i for i in ids if i - 1 not in ids]
    ends = [i for i in ids if i + 1 not in ids]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
