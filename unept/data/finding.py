"""Find the image and label files of datasets, and the images that a command is given."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .base import DatasetError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".webp")
"""Suffixes of formats without loss, for labels. A TIFF or WebP file that was compressed with loss is refused."""
LOSSY = (".jpg", ".jpeg")

Pair = tuple[Path, Path | None]


class FoundImage(NamedTuple):
    """An image file that `find_images` found."""

    path: Path
    name: Path
    """What its results are called: the stem of the file, after the subfolder of the folder that was named, if any."""


class FoundImages(NamedTuple):
    """What `find_images` found."""

    images: list[FoundImage]
    problems: list[str]
    """A message for each path that is missing and each folder without images."""
    left_out: list[str]
    """A message for each folder with subfolders that hold images and are left out."""


def find_images(paths: Sequence[Path], recursive: bool = False) -> FoundImages:
    """List the image files among `paths`, and those in the folders among them, in order and each once.

    Args:
        paths: files and folders.
        recursive: list the images in subfolders too. Otherwise a folder's subfolders are left out, with a message.

    Raises:
        FileNotFoundError: if there is no image at all.
        ValueError: if two results would share a name.
    """
    found: dict[str, FoundImage] = {}  # by absolute path, since a file may be named in several ways
    problems: list[str] = []
    left_out: list[str] = []
    for path in paths:
        if path.is_dir():
            images = _images_below(path) if recursive else _images_in(path)
            for file in images:
                found.setdefault(os.path.abspath(file), FoundImage(file, file.relative_to(path).with_suffix("")))
            subfolders = [] if recursive else [folder for folder in _folders_in(path) if _images_below(folder)]
            advice = f"{len(subfolders)} subfolders of {path} hold images: --recursive takes them" if subfolders else ""
            if not images:
                problems.append(advice or f"{path} {_no_images()}")
            elif advice:
                left_out.append(f"{advice}; they are left out")
        elif path.is_file():
            found.setdefault(os.path.abspath(path), FoundImage(path, Path(path.stem)))
        else:
            problems.append(f"there is no image or folder {path}: check the path")
    if not found:
        raise FileNotFoundError("; ".join(problems))
    by_name: dict[Path, Path] = {}
    for image in found.values():
        other = by_name.setdefault(image.name, image.path)
        if other != image.path:
            raise ValueError(
                f"{other} and {image.path} would share one result: run the command for each of them, with different "
                "--out"
            )
    return FoundImages(list(found.values()), problems, left_out)


def find_pairs(images: Path, labels: Path, image_ending: str = "", label_ending: str = "") -> list[Pair]:
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


def pair_with_labels(files: list[Path], labels: Path, image_ending: str = "", label_ending: str = "") -> list[Pair]:
    """(image, label) paths: the label of `<name><image_ending>.jpg` is `labels/<name><label_ending>`.

    If `label_ending` does not end in one of `LABEL_SUFFIXES`, any of them may follow, in upper or lower case. Labels
    without an image are left out.

    Raises:
        DatasetError: if the folder `labels` is missing, or an image has no label or several.
    """
    if not labels.is_dir():
        raise DatasetError(
            f"there is no folder {labels}: check the dataset's root folder and split. Training and evaluation need a "
            f"label of each of the {len(files)} images; without labels, segment images with `python -m unept.predict`"
        )
    exact = label_ending.lower().endswith(LABEL_SUFFIXES)
    existing: dict[str, list[Path]] = {}
    for path in sorted(labels.iterdir()):
        if _is_label(path):
            existing.setdefault(path.name if exact else path.stem, []).append(path)
    pairs: list[Pair] = []
    missing: list[tuple[Path, str]] = []
    for file in files:
        name = file.stem.removesuffix(image_ending) + label_ending
        found = existing.get(name, [])
        if len(found) > 1:
            raise DatasetError(f"{found[0]} and {found[1].name} are labels of one image, {file}: remove one of them")
        if found:
            pairs.append((file, found[0]))
        else:
            missing.append((file, name))
    if missing:
        raise DatasetError(_no_label(missing, len(files), labels, exact))
    return pairs


def left_out(pairs: list[Pair], images: Path, labels: Path, label_ending: str | None = "") -> list[str]:
    """Messages about what `find_pairs` has left out: subfolders that hold images, and labels without an image.

    Labels are not looked at where `label_ending` is None, nor are the folders that hold them.
    """
    messages = []
    with_labels = {labels.resolve(), *labels.resolve().parents}
    subfolders = [folder for folder in _folders_in(images) if folder.resolve() not in with_labels]
    if found := [folder for folder in subfolders if _has_images(folder)]:
        messages.append(f"{len(found)} subfolders of {images} hold images, {found[0].name} the first of them")
    paired = {path for pair in pairs for path in pair}
    ending = label_ending or ""
    exact = ending.lower().endswith(LABEL_SUFFIXES)
    alone = [
        path
        for path in (sorted(labels.iterdir()) if label_ending is not None else ())
        if _is_label(path) and path not in paired and (path.name if exact else path.stem).endswith(ending)
    ]
    if alone:
        messages.append(f"{len(alone)} labels in {labels} have no image, {alone[0].name} the first of them")
    return [f"{message}: they are left out" for message in messages]


def _is_label(path: Path) -> bool:
    """Whether a file may be a label, by its name."""
    return path.suffix.lower() in LABEL_SUFFIXES and not path.name.startswith(".")


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


def _folders_in(folder: Path) -> list[Path]:
    """The folders directly in a folder, by name, without hidden ones and without links, which may lead in circles."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    )


def _images_below(folder: Path) -> list[Path]:
    """The images in a folder and in its subfolders."""
    images = _images_in(folder)
    for subfolder in _folders_in(folder):
        images += _images_below(subfolder)
    return images


def _has_images(folder: Path) -> bool:
    """Whether there is an image in a folder or below it."""
    return bool(_images_in(folder)) or any(map(_has_images, _folders_in(folder)))


def _no_label(missing: list[tuple[Path, str]], count: int, labels: Path, exact: bool) -> str:
    """The message for images, with the names that their labels must have, of a folder with `count` images."""
    file, name = missing[0]
    there = sorted(labels.iterdir())
    lossy = next((path for path in there if path.stem == name and path.suffix.lower() in LOSSY), None)
    longer = next((path for path in there if _is_label(path) and path.name.startswith((f"{name}_", f"{name}-"))), None)
    message = (
        f"{len(missing)} of {count} images in {file.parent} have no label, the first being {file.name}: "
        f"add {labels / name}{'' if exact else '.png'}, or remove the image"
    )
    if lossy is not None:
        message += f". {lossy.name} is no label: JPEG changes class ids at the edges; save labels as PNG"
    elif longer is not None and not exact:
        message += f". If {longer.name} is its label: --label-suffix {longer.stem.removeprefix(name)}"
    return message


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
