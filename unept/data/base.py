"""What every dataset is, and how pairs of image and label files are found and read.

Letters: H, W height and width of an image, K number of classes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from ..colors import default_palette as default_palette

SPLITS = ("train", "val", "test")
IGNORE_INDEX = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

# What PIL raises for a file that is missing, unreadable, truncated, corrupt or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


Pair = tuple[Path, Path | None]


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
        has_server: whether predictions can be sent to a server of the benchmark.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = IGNORE_INDEX
    has_server: bool = False

    @property
    def description(self) -> str:
        """What results say that they are of: the dataset and its classes."""
        return f"{type(self).__name__}, {len(self.classes)} classes"

    @property
    def file_ids(self) -> tuple[int, ...]:
        """The id of each of the K classes in label files, and in predictions that others are to read."""
        return tuple(range(len(self.classes)))

    @property
    def labelled(self) -> bool:
        """Whether there are labels; without them only `image`, `name` and `check` are to be had."""
        return True

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        raise NotImplementedError

    def image(self, i: int) -> tv_tensors.Image:
        """The image of sample `i` alone."""
        return self[i][0]

    def name(self, i: int) -> str:
        """The stem for files about sample `i`, different for every sample."""
        raise NotImplementedError

    def check(self, sample: int | None = None, workers: int = 0, progress: str | None = None) -> None:
        """Read all samples, or `sample` of them spread evenly over the dataset, and raise if any breaks a rule.

        Args:
            sample: how many; None: all.
            workers: processes that read; 0: this one.
            progress: what to call a progress bar; None: no bar.

        Raises:
            DatasetError: naming the first five bad samples and counting the others.
            ValueError: if `sample` is not positive.
        """
        if sample is not None and sample < 1:
            raise ValueError(f"sample is {sample}; give how many files to check, at least 1, or None for all")
        count = len(self) if sample is None else min(sample, len(self))
        reader = _Problems(self, [i * len(self) // count for i in range(count)])
        # With a generator of its own, it leaves the global random state as it was.
        loader = DataLoader(reader, batch_size=None, num_workers=workers, generator=torch.Generator())
        bar = tqdm(loader, desc=progress, unit="image", disable=progress is None, leave=False)
        problems = [problem for problem in bar if problem]
        if len(problems) > 5:
            problems[5:] = [f"... and {len(problems) - 5} more of the {count} samples that were checked"]
        if problems:
            raise DatasetError("\n".join(problems))


class _Problems(Dataset):
    """What is wrong with each of the samples `indices`: a message, or an empty one."""

    def __init__(self, dataset: SegmentationDataset, indices: list[int]):
        self.read = dataset.__getitem__ if dataset.labelled else dataset.image
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> str:
        try:
            self.read(self.indices[i])
        except DatasetError as error:
            return str(error)
        return ""


class FileDataset(SegmentationDataset):
    """Pairs of an image file and a label file of the same size; in a split without labels, images alone.

    Images may be gray, palette, RGBA, CMYK or 16 bits deep; they come out RGB, and upright as their EXIF tag says.
    Labels hold one id a pixel (modes L and P; the colours of a palette are not looked at).

    Args:
        pairs: (image, label) paths; a label is None where there is none.
        classes: the K names.
        palette: the K colours.
        label_ids: training id (0..K-1 or 255) of every id that label files may hold; every class has one.
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
        self._known: np.ndarray = np.zeros(256, dtype=bool)  # the ids that labels may hold
        self._training_id: np.ndarray = np.zeros(256, dtype=np.uint8)
        for file_id, training_id in label_ids.items():
            self._known[file_id] = True
            self._training_id[file_id] = training_id

    @property
    def file_ids(self) -> tuple[int, ...]:
        """The id of each of the K classes in label files: the inverse of `label_ids`."""
        return tuple(int(np.flatnonzero(self._known & (self._training_id == k))[0]) for k in range(len(self.classes)))

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
                f"{image_path} has no label: this split is there to be predicted (unept.submission), "
                "not to train or evaluate on; take the split val"
            )
        image = self.image(i)
        ids = read_label_ids(label_path)
        if ids.shape != image.shape[1:]:
            raise DatasetError(_sizes_differ(image_path, tuple(image.shape[1:]), label_path, ids.shape))
        counts = torch.bincount(torch.from_numpy(ids).flatten(), minlength=256).numpy()
        if counts[~self._known].any():
            raise DatasetError(self._unknown_ids(label_path, counts))
        return image, tv_tensors.Mask(torch.from_numpy(self._training_id.take(ids)))

    def image(self, i: int) -> tv_tensors.Image:
        """The image of sample `i`; its label is not read."""
        return tv_tensors.Image(_read_image(self.pairs[i][0]))

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


def find_pairs(images: Path, labels: Path, image_ending: str = "", label_ending: str = ".png") -> list[Pair]:
    """(image, label) paths of the images in folder `images`, by name; see `list_images` and `with_labels`."""
    return with_labels(list_images(images, image_ending), labels, image_ending, label_ending)


def list_images(folder: Path, ending: str = "") -> list[Path]:
    """The images directly in `folder` whose stems end in `ending`, by name. Hidden files are not looked at.

    Raises:
        DatasetError: if the folder is missing or holds no such image, or two images share a stem.
    """
    require_folder(folder)
    files = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_SUFFIXES and p.stem.endswith(ending) and not p.name.startswith(".")
    )
    if not files:
        endings = ", ".join(ending + suffix for suffix in IMAGE_SUFFIXES)
        raise DatasetError(f"{folder} holds no images: put files ending in {endings} directly in it")
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            raise DatasetError(f"{other} and {file.name} would share one label: rename or remove one of them")
    return files


def with_labels(files: list[Path], labels: Path, image_ending: str = "", label_ending: str = ".png") -> list[Pair]:
    """(image, label) paths: the label of `<name><image_ending>.jpg` is `labels/<name><label_ending>`.

    Labels without an image are left out.

    Raises:
        DatasetError: if the folder is missing, or an image has no label.
    """
    require_folder(labels)
    names = [file.stem.removesuffix(image_ending) + label_ending for file in files]
    there = {p.name for p in labels.iterdir()}
    missing = [i for i, name in enumerate(names) if name not in there]
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


def unpacked(root: str | Path, *names: str) -> Path:
    """The first of the folders `names` in `root`, else `root`: archives unpack to a folder of their own."""
    return next((Path(root) / name for name in names if (Path(root) / name).is_dir()), Path(root))


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
    return image_to_tensor(image, path)


def image_to_tensor(image: Image.Image, name: str | Path) -> Tensor:
    """A PIL image of any mode as uint8 (3, H, W), RGB; transparency is dropped.

    Raises:
        DatasetError: it is of floating point; the message calls it `name`.
    """
    if image.mode == "F":
        raise DatasetError(f"{name} holds floating-point pixels: save it with 8 or 16 bits a channel")
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
