"""What every dataset is, and how pairs of image and label files are found and read.

Letters: H, W height and width of an image, K number of classes.
"""

import colorsys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

SPLITS = ("train", "val", "test")
IGNORE_INDEX = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

# What PIL raises for a file that is missing, unreadable, truncated, corrupt or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DatasetError(ValueError):
    """A folder or file of a dataset breaks a rule; the message names it, the rule and the remedy."""


class SegmentationDataset(Dataset):
    """Images with one class id a pixel. `dataset[i]` is `(image, mask)`, without any transform.

    `image` is a `tv_tensors.Image`, uint8 (3, H, W), RGB; `mask` a `tv_tensors.Mask`, uint8 (H, W), that holds training
    ids 0..K-1 and `ignore_index` where a pixel does not count.

    Attributes:
        classes: the K class names, by training id.
        palette: (r, g, b) of each class, 0..255.
        ignore_index: 255.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = IGNORE_INDEX

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The stem for files about sample `i`, different for every sample."""
        raise NotImplementedError

    def check(self, sample: int | None = None) -> None:
        """Read all samples, or `sample` of them spread evenly over the dataset, and raise if any breaks a rule.

        Raises:
            DatasetError: naming the first five bad samples and counting the others.
            ValueError: if `sample` is not positive.
        """
        if sample is not None and sample < 1:
            raise ValueError(f"sample is {sample}; give how many files to check, at least 1, or None for all")
        count = len(self) if sample is None else min(sample, len(self))
        problems = []
        for i in range(count):
            try:
                self[i * len(self) // count]
            except DatasetError as error:
                problems.append(str(error))
        if len(problems) > 5:
            problems[5:] = [f"... and {len(problems) - 5} more of the {count} samples that were checked"]
        if problems:
            raise DatasetError("\n".join(problems))


class FileDataset(SegmentationDataset):
    """Pairs of an image file and a label file of the same size.

    Images may be gray, palette, RGBA, CMYK or 16 bits deep; they come out RGB, and upright as their EXIF tag says.
    Labels hold one id a pixel (modes L and P; the colours of a palette are not looked at).

    Args:
        pairs: (image, label) paths.
        classes: the K names.
        palette: the K colours.
        label_ids: training id (0..K-1 or 255) of every id that label files may hold.
    """

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        classes: tuple[str, ...],
        palette: tuple[tuple[int, int, int], ...],
        label_ids: Mapping[int, int],
    ):
        self.pairs = pairs
        self.classes = classes
        self.palette = palette
        self._known: np.ndarray = np.zeros(256, dtype=bool)  # the ids that labels may hold
        self._training_id: np.ndarray = np.zeros(256, dtype=np.uint8)
        for file_id, training_id in label_ids.items():
            self._known[file_id] = True
            self._training_id[file_id] = training_id

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, label_path = self.pairs[i]
        image = _read_image(image_path)
        ids = read_label_ids(label_path)
        if ids.shape != image.shape[1:]:
            raise DatasetError(_sizes_differ(image_path, tuple(image.shape[1:]), label_path, ids.shape))
        counts = torch.bincount(torch.from_numpy(ids).flatten(), minlength=256).numpy()
        if counts[~self._known].any():
            raise DatasetError(self._unknown_ids(label_path, counts))
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(self._training_id.take(ids)))

    def name(self, i: int) -> str:
        """The stem of the image's file name."""
        return self.pairs[i][0].stem

    def _unknown_ids(self, path: Path, counts: np.ndarray) -> str:
        bad = [f"id {i} in {counts[i]} pixels" for i in range(256) if counts[i] and not self._known[i]]
        allowed = ", ".join(_ranges([i for i in range(256) if self._known[i]]))
        return (
            f"{path} holds {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}, outside the class list: "
            f"the {len(self.classes)} classes allow {allowed}. Correct the label, or add the class to the list"
        )


def find_pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """(image, label) paths of every image in folder `images`, by name; the label is `labels/<stem>.png`.

    Labels without an image are left out. Hidden files are not looked at.

    Raises:
        DatasetError: if a folder is missing or holds no image, two images share a stem, or an image has no label.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise DatasetError(f"there is no folder {folder}: check the dataset's root folder and split")
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DatasetError(f"{images} holds no images: put files ending in {', '.join(IMAGE_SUFFIXES)} directly in it")
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            raise DatasetError(f"{other} and {file.name} would share one label: rename or remove one of them")
    label_names = {p.name for p in labels.iterdir()}
    missing = [file for file in files if f"{file.stem}.png" not in label_names]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(files)} images in {images} have no label, the first being {missing[0].name}: "
            f"add {labels / missing[0].stem}.png, or remove the image"
        )
    return [(file, labels / f"{file.stem}.png") for file in files]


def read_image(path: Path) -> Tensor:
    """The image as uint8 (3, H, W), RGB, upright as its EXIF tag says; transparency is dropped.

    Raises:
        DatasetError: if the file is missing, truncated, corrupt or of floating point.
    """
    return _read_image(path).contiguous()


def _read_image(path: Path) -> Tensor:
    """As `read_image`, but with the channels innermost in memory, as PIL has them: resampling is faster so."""
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            ImageOps.exif_transpose(image, in_place=True)
    except UNREADABLE as error:
        raise DatasetError(_unreadable(path, error)) from error
    if image.mode == "F":
        raise DatasetError(f"{path} holds floating-point pixels: save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would clip at 255 instead of taking the high byte
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_label_ids(path: Path) -> np.ndarray:
    """The ids as stored, uint8 (H, W).

    Raises:
        DatasetError: if the file is missing, truncated or corrupt, or holds colours instead of ids.
    """
    try:
        with Image.open(path) as file:
            mode, ids = file.mode, np.array(file)
    except UNREADABLE as error:
        raise DatasetError(_unreadable(path, error)) from error
    if mode not in ("L", "P"):
        raise DatasetError(
            f"{path} has mode {mode}, but a label must hold one class id a pixel in 8 bits (mode L or P): "
            "if it shows classes as colours, turn every colour into its class id first"
        )
    return ids


def default_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """`num_classes` (r, g, b) colours, neighbours far apart: hues step by the golden ratio, brightness varies."""
    colours = []
    for k in range(num_classes):
        red, green, blue = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, (1.0, 0.7, 0.85)[k % 3])
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colours)


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} can't be read ({error}): the file is damaged or no image; restore or remove it"


def _sizes_differ(image: Path, image_size: tuple[int, ...], label: Path, label_size: tuple[int, ...]) -> str:
    """Sizes are (H, W)."""
    message = (
        f"{label} is {label_size[1]}x{label_size[0]} pixels, but its image {image} is {image_size[1]}x{image_size[0]}: "
        "both must have one size; redo the label, or resize it by nearest neighbour"
    )
    if label_size == image_size[::-1]:
        message += ". If the image carries an EXIF rotation, the label must be drawn on the rotated image"
    return message


def _ranges(ids: list[int]) -> list[str]:
    """[0, 1, 2, 255] -> ["0-2", "255"]."""
    starts = [i for i in ids if i - 1 not in ids]
    ends = [i for i in ids if i + 1 not in ids]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
