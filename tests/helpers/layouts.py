"""Data sets on disk, in miniature: the benchmarks', and one's own."""

from pathlib import Path

import numpy as np
from PIL import Image

from unept.data import build_dataset

Paths = tuple[Path, Path]


def ade20k(root: Path, split: str, i: int) -> Paths:
    folder = {"train": "training", "val": "validation", "test": "testing"}[split]
    base, stem = root / "ADEChallengeData2016", f"ADE_{split}_{i + 1:08d}"
    return base / "images" / folder / f"{stem}.jpg", base / "annotations" / folder / f"{stem}.png"


def cityscapes(root: Path, split: str, i: int) -> Paths:
    city = ("munich", "aachen")[i % 2]
    stem = f"{city}_{i:06d}_000019"
    image = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
    return image, root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"


def pascal_context(root: Path, split: str, i: int) -> Paths:
    base, stem = root / "VOC2010", f"2008_{i:06d}"
    return base / "JPEGImages" / f"{stem}.jpg", base / "SegmentationClassContext" / f"{stem}.png"


def camvid(root: Path, split: str, i: int) -> Paths:
    return root / split / f"{i}.png", root / f"{split}annot" / f"{i}.png"


def shapes(root: Path, **counts: int) -> Path:
    """Images of the shapes data set as files for the data set `folder`, so many of each split; gives `root`."""
    for split, count in counts.items():
        dataset = build_dataset("shapes", split=split, size=64, length=count)
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, labels = dataset[i]
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / split / f"{i}.png")
            Image.fromarray(labels.numpy()).save(root / "labels" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(dataset.classes) + "\n")
    return root


def write(layout, root: Path, split: str, labels: list[np.ndarray], labelled: bool = True) -> list[Paths]:
    """Write noise as images and `labels`, (H, W) arrays of the files' ids, as their labels; gives (image, label)."""
    pairs = [layout(root, split, i) for i in range(len(labels))]
    for i, ((image, label), ids) in enumerate(zip(pairs, labels, strict=True)):
        for path in (image, label) if labelled else (image,):
            path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)
        if labelled:
            Image.fromarray(ids.astype(np.uint8)).save(label)
    if layout is pascal_context:
        listing = root / "VOC2010" / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{image.stem}\n" for image, _ in pairs))
    return pairs


def write_noisy_camvid(root: Path) -> Path:
    """A CamVid of four images of 48x64 per split, of noise, with a random label per 8x8 pixels; gives `root`."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        labels = [generator.integers(0, 12, (6, 8)).repeat(8, 0).repeat(8, 1) for _ in range(4)]
        write(camvid, root, split, labels)
    return root
