"""Check whole splits before a run, so that a damaged file does not stop it after days."""

import time
from collections.abc import Callable, Sequence

from .base import DatasetError, SegmentationDataset


def check_splits(
    build: Callable[[str], SegmentationDataset], workers: int = 0, splits: Sequence[str] = ("train", "val")
) -> None:
    """Read every file of the splits, and print a line for each split that is in order.

    Args:
        build: returns the dataset of a split.
        workers: the number of processes that read; 0 reads in this process.
        splits: the names of the splits.

    Raises:
        DatasetError: if files of any split break a rule, see `SegmentationDataset.check`. It is raised after all splits
            have been read.
        ValueError: if `build` can't create the dataset from its options.
    """
    problems = []
    for split in splits:
        start = time.perf_counter()
        try:
            dataset = build(split)
            dataset.check(workers=workers, progress=f"check {split}")
        except DatasetError as error:
            problems.append(str(error))
            continue
        seconds = time.perf_counter() - start
        print(f"{split}: {len(dataset)} images of {dataset.description} are in order ({seconds:.1f} s)")
    if problems:
        raise DatasetError("\n".join(problems))
