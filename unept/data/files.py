"""Datasets that are image and label files: how the files are found, listed, paired and read.

Letters: H, W height and width of an image, K number of classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors

from .base import DatasetError, SegmentationDataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

# What PIL raises for a file that is missing, unreadable, truncated, corrupt or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Pair = tuple[Path, Path | None]


class FileDataset(SegmentationDataset):
    """Pairs of an image file and a label file of the same size; in a split without labels, images alone.

    Images may be gray, palette, RGBA, CMYK or 16 bits deep; they come out as RGB, and upright as their EXIF tag says.
    Labels hold one id per pixel (modes L and P; the colors of a palette are not looked at).

    Args:
        pairs: (image, label) paths; the label is None where there is none.
        classes: the K class names.
        palette: the K colors (r, g, b), 0..255.
        label_ids: the training id (0..K-1 or 255) of every id that label files may hold; every class has one.
    """

    def __init__(
        self,
        pairs: list[Pair],
        classes: tuple[str, ...],
        palette: tuple[tuple[int, int, int], ...],
        label_ids: Mapping[int, int],
    ):
        self.pairs = pairs
        self.classes = classes
        self.palette = palette
        self._allowed: np.ndarray = np.zeros(256, dtype=bool)  # by id in label files: whether it may occur there
        self._training_id: np.ndarray = np.zeros(256, dtype=np.uint8)
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
        ids = read_label_ids(label_path)
        if ids.shape != image.shape[1:]:
            raise DatasetError(_sizes_differ(image_path, tuple(image.shape[1:]), label_path, ids.shape))
        counts = torch.bincount(torch.from_numpy(ids).flatten(), minlength=256).numpy()
        if counts[~self._allowed].any():
            raise DatasetError(self._ids_not_allowed(label_path, counts))
        return image, tv_tensors.Mask(torch.from_numpy(self._training_id.take(ids)))

    def image(self, i: int) -> tv_tensors.Image:
        """The image of sample `i`; its label is not read."""
        return tv_tensors.Image(_read_channels_last(self.pairs[i][0]))

    def name(self, i: int) -> str:
        """The stem of the image's file name."""
        return self.pairs[i][0].stem

    def _ids_not_allowed(self, path: Path, counts: np.ndarray) -> str:
        bad = [f"id {i} in {counts[i]} pixels" for i in range(256) if counts[i] and not self._allowed[i]]
        allowed = ", ".join(_ranges([i for i in range(256) if self._allowed[i]]))
        return (
            f"{path} holds {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}, outside the class list: "
            f"the {len(self.classes)} classes allow {allowed}. Correct the label, or add the class to the list"
        )


# Finding files


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List the image files among `paths`, and those directly in the folders among them, in order and each once.

    Raises:
        FileNotFoundError: if a path does not exist, or a folder holds no images.
        ValueError: if two files share a stem, so that their results would share a name.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            images = _images_in(path)
            if not images:
                raise FileNotFoundError(f"{path} {_no_images()}")
            files += images
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no image or folder {path}: check the path")
    files = list(dict.fromkeys(files))
    if same := _same_stem(files):
        raise ValueError(
            f"{same[0]} and {same[1]} would share one result: run the command for each of them, with different --out"
        )
    return files


def find_pairs(images: Path, labels: Path, image_ending: str = "", label_ending: str = ".png") -> list[Pair]:
    """(image, label) paths of the images in folder `images`, by name; see `list_images` and `pair_with_labels`."""
    return pair_with_labels(list_images(images, image_ending), labels, image_ending, label_ending)


def list_images(folder: Path, ending: str = "") -> list[Path]:
    """List the images directly in `folder` whose stems end in `ending`, by name. Hidden files are not looked at.

    Raises:
        DatasetError: if the folder is missing or holds no such image, or two images share a stem.
    """
    require_folder(folder)
    files = _images_in(folder, ending)
    if not files:
        raise DatasetError(f"{folder} {_no_images(ending)}")
    if same := _same_stem(files):
        raise DatasetError(f"{same[0]} and {same[1].name} would share one label: rename or remove one of them")
    return files


def pair_with_labels(files: list[Path], labels: Path, image_ending: str = "", label_ending: str = ".png") -> list[Pair]:
    """(image, label) paths: the label of `<name><image_ending>.jpg` is `labels/<name><label_ending>`.

    Labels without an image are left out.

    Raises:
        DatasetError: if the folder `labels` is missing, or an image has no label.
    """
    if not labels.is_dir():
        raise DatasetError(
            f"there is no folder {labels} with the labels of the {len(files)} images in {files[0].parent}: training "
            "and evaluation need a label of every image; without labels, segment images with `python -m unept.predict`"
        )
    names = [file.stem.removesuffix(image_ending) + label_ending for file in files]
    existing = {path.name for path in labels.iterdir()}
    missing = [i for i, name in enumerate(names) if name not in existing]
    if missing:
        file = files[missing[0]]
        raise DatasetError(
            f"{len(missing)} of {len(files)} images in {file.parent} have no label, the first being {file.name}: "
            f"add {labels / names[missing[0]]}, or remove the image"
        )
    return [(file, labels / name) for file, name in zip(files, names, strict=True)]


def require_folder(folder: Path) -> None:
    """Raise DatasetError if there is no such folder."""
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: check the dataset's root folder and split")


def find_root(root: str | Path, *names: str) -> Path:
    """The first of the folders `names` that is in `root`, else `root`: archives unpack to a folder of their own."""
    return next((Path(root) / name for name in names if (Path(root) / name).is_dir()), Path(root))


def _images_in(folder: Path, ending: str = "") -> list[Path]:
    """The images directly in a folder whose stems end in `ending`, by name, without hidden files."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.stem.endswith(ending) and not path.name.startswith(".")
    )


def _no_images(ending: str = "") -> str:
    endings = ", ".join(ending + suffix for suffix in IMAGE_SUFFIXES)
    return f"holds no images: put files ending in {endings} directly in it"


def _same_stem(files: Iterable[Path]) -> tuple[Path, Path] | None:
    """The first two files that share a stem, or None."""
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            return other, file
    return None


# Reading files


def read_image(path: Path) -> Tensor:
    """Read an image as uint8 (3, H, W), RGB, upright as its EXIF tag says; transparency is dropped.

    Raises:
        DatasetError: if the file is missing, truncated or corrupt, or holds floating-point pixels.
    """
    return _read_channels_last(path).contiguous()


def _read_channels_last(path: Path) -> Tensor:
    """As `read_image`, but with the channels innermost in memory, as PIL has them: resampling is faster on these."""
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            ImageOps.exif_transpose(image, in_place=True)
    except UNREADABLE as error:
        raise DatasetError(_unreadable(path, error)) from error
    return image_to_tensor(image, path)


def image_to_tensor(image: Image.Image, name: str | Path) -> Tensor:
    """Convert a PIL image of any mode to uint8 (3, H, W), RGB; transparency is dropped.

    Raises:
        DatasetError: if the image holds floating-point pixels; the message calls it `name`.
    """
    if image.mode == "F":
        raise DatasetError(f"{name} holds floating-point pixels: save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would clip at 255 instead of taking the high byte
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_label_ids(path: Path) -> np.ndarray:
    """Read the ids of a label file as stored, uint8 (H, W).

    Raises:
        DatasetError: if the file is missing, truncated or corrupt, or holds colors instead of ids.
    """
    try:
        with Image.open(path) as file:
            mode, ids = file.mode, np.array(file)
    except UNREADABLE as error:
        raise DatasetError(_unreadable(path, error)) from error
    if mode not in ("L", "P"):
        raise DatasetError(
            f"{path} has mode {mode}, but a label must hold one class id per pixel in 8 bits (mode L or P): "
            "if it shows classes as colors, turn every color into its class id first"
        )
    return ids


# Messages


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} can't be read ({error}): the file is damaged or not an image; restore or remove it"


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
