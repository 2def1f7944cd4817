"""Check whole splits before a run, so that a damaged file does not stop it after days, nor wrong labels waste it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .base import IGNORE_INDEX, DatasetError, OnBadSample, SegmentationDataset

MANY_IGNORED = 0.5  # a larger share of ignored pixels is worth a warning


def check_splits(
    build: Callable[[str], SegmentationDataset], workers: int = 0, splits: Sequence[str] = ("train", "val")
) -> None:
    """Read every file of the splits; print the pixels of each class, and a line for each split that is in order.

    Args:
        build: returns the dataset of a split.
        workers: the number of processes that read; 0 reads in this process.
        splits: the names of the splits.

    Raises:
        DatasetError: if files of any split break a rule, see `SegmentationDataset.check`, or its labels are no use, see
            `check_pixels`. It is raised after all splits have been read.
        ValueError: if `build` can't create the dataset from its options.
    """
    problems = []
    for split in splits:
        start = time.perf_counter()
        try:
            dataset = build(split)
            pixels = dataset.check(workers=workers, progress=f"check {split}")
            if dataset.labelled:
                print(format_pixels(dataset, pixels))
                for warning in check_pixels(dataset, pixels, split):
                    print(f"warning: {warning}")
        except DatasetError as error:
            problems.append(str(error))
            continue
        seconds = time.perf_counter() - start
        print(f"{split}: {len(dataset)} images of {dataset.description} are in order ({seconds:.1f} s)")
    if problems:
        raise DatasetError("\n".join(problems))


def check_before_run(
    dataset: SegmentationDataset,
    split: str,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    sample: int = 20,
) -> list[str]:
    """Read some samples of a split before a run; all of them if those of the split train hold a single class.

    Args:
        dataset: the dataset.
        split: the name of the split.
        workers: the number of processes that read all samples, where that is needed.
        on_bad_sample: `"skip"` leaves out samples that cannot be read.
        sample: the number of samples to read.

    Returns:
        The warnings of `check_pixels`.

    Raises:
        DatasetError: as `check_splits`.
    """
    options: dict[str, Any] = {} if on_bad_sample == "error" else {"on_bad_sample": on_bad_sample}
    pixels, every = dataset.check(sample=sample, **options), len(dataset) <= sample
    classes = pixels[: len(dataset.classes)]
    if split == "train" and not every and len(classes) > 1 and classes.count_nonzero() < 2:
        pixels, every = dataset.check(workers=workers, progress=f"check {split}", **options), True
    return check_pixels(dataset, pixels, split, every)


def format_pixels(dataset: SegmentationDataset, pixels: Tensor) -> str:
    """Format the pixels of each training id, (256,), as a table with one line per class and one for ignored pixels."""
    rows = [*zip(dataset.classes, pixels.tolist(), strict=False), ("(ignored)", int(pixels[dataset.ignore_index]))]
    width = max(len("class"), *(len(name) for name, _ in rows))
    total = max(1, int(pixels.sum()))
    lines = [f"{'class':{width}}  {'pixels':>14}  {'share':>7}"]
    lines += [f"{name:{width}}  {count:14d}  {100 * count / total:6.2f}%" for name, count in rows]
    return "\n".join(lines)


def check_pixels(dataset: SegmentationDataset, pixels: Tensor, split: str, every: bool = True) -> list[str]:
    """Judge labels by their pixels.

    Args:
        dataset: the dataset.
        pixels: (256,), the pixels of each training id, as `SegmentationDataset.check` returns them.
        split: the name of the split, for messages.
        every: whether all samples were read; otherwise a class without a pixel may have some in the others.

    Returns:
        Warnings: those of the dataset, classes without a pixel, and a large share of ignored pixels.

    Raises:
        DatasetError: if all pixels are ignored; if all samples of the split train were read and hold one class; if
            there is only one class; or if the `ignore_index` of the dataset is another than what training pads with.
    """
    if dataset.ignore_index != IGNORE_INDEX:
        raise DatasetError(
            f"the ignore_index of {dataset.description} is {dataset.ignore_index}, but training pads labels with "
            f"{IGNORE_INDEX}: give it masks that hold {IGNORE_INDEX} where a pixel does not count"
        )
    K = len(dataset.classes)
    if K == 1:
        raise DatasetError(
            f"{dataset.classes[0]!r} is the only class of {dataset.description}, and would be predicted everywhere: "
            "list what is not it as a class of its own, such as background, before it; the dataset folder then maps "
            "masks of 0 and 255 with --label-ids 0=0 255=1"
        )
    warnings = dataset.warnings()
    counts, ignored = pixels[:K].tolist(), int(pixels[dataset.ignore_index])
    found = [k for k in range(K) if counts[k]]
    missing = [name for name, count in zip(dataset.classes, counts, strict=True) if not count]
    share = ignored / max(1, sum(counts) + ignored)
    where = f"{'the' if every else 'the sampled'} labels of {split}"
    if not found:
        raise DatasetError(
            f"{where} have no pixel of any class: all {ignored} pixels are ignored. Check the ids in the labels "
            "against the class list; the dataset folder maps ids with --label-ids, such as 0=0 255=1"
        )
    if len(found) == 1:
        message = (
            f"{where} have pixels of one class only, {dataset.classes[found[0]]!r}, none of {_shown(missing)}, and "
            f"{share:.1%} of the pixels are ignored. {_single_class_advice(found[0], ignored)}"
        )
        if every and split == "train":
            raise DatasetError(message)
        warnings.append(message)
    elif missing and every:
        warnings.append(
            f"{where} have no pixel of {_shown(missing)}. If the ids of the labels count from 1, or skip some, the "
            "dataset folder maps them with --label-ids"
        )
    if share > MANY_IGNORED:
        warnings.append(f"{share:.1%} of the pixels in {where} are ignored: check the ids against the class list")
    return warnings


def _shown(names: Sequence[str]) -> str:
    """Names for a message, at most five of them."""
    listed = ", ".join(repr(name) for name in names[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"


def _single_class_advice(found: int, ignored: int) -> str:
    """What the ids look like, and what to do, where only one class has pixels."""
    if ignored and found == 0:
        return (
            "This looks like masks of 0 and 255, where 255 means ignored: map it with --label-ids 0=0 255=1 (dataset "
            "folder), or save the masks with 0 and 1"
        )
    if not ignored:
        return "There is nothing to learn: check that the labels are those of the images, and the class list"
    return "Check the ids in the labels against the class list"
