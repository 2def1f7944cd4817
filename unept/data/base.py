"""The contract of a dataset: what it must give, and what it gets for that.

To add a dataset, subclass `SegmentationDataset` (or `unept.data.files.FileDataset` if it is pairs of files) in a module
of its own, and add a row to `unept.data.registry.DATASETS`; options, command line and model card follow from that row.

Letters: H, W height and width of an image, K number of classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from tqdm import tqdm

SPLITS = ("train", "val", "test")
IGNORE_INDEX = 255
OnBadSample = Literal["error", "skip"]  # what to do with a sample that cannot be read
MAX_PROBLEMS = 5  # of the bad samples that `SegmentationDataset.check` finds, how many its error names


class DatasetError(ValueError):
    """A folder or file of a dataset breaks a rule; the message names it, the rule and the remedy."""


class SegmentationDataset(Dataset):
    """Images with one class id per pixel. `dataset[i]` is `(image, mask)`, without any transform.

    `image` is a `tv_tensors.Image`, uint8 (3, H, W), RGB; `mask` is a `tv_tensors.Mask`, uint8 (H, W), that holds
    training ids 0..K-1, and `ignore_index` where a pixel does not count.

    A subclass must give `classes`, `palette`, `__len__`, `__getitem__` and `name`. `__getitem__` raises `DatasetError`
    for a sample whose files break a rule. The other members have defaults, to be overridden where they don't fit.

    Attributes:
        classes: the K class names, by training id.
        palette: the color (r, g, b) of each class, 0..255.
        ignore_index: 255, which training pads labels with.
        has_test_server: whether the benchmark has a server that scores predictions of its test split.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = IGNORE_INDEX
    has_test_server: bool = False

    @property
    def description(self) -> str:
        """The name of the dataset and its number of classes, as results state them."""
        return f"{type(self).__name__}, {len(self.classes)} classes"

    @property
    def file_ids(self) -> tuple[int, ...]:
        """The id that each of the K classes has in label files, and in predictions written for others to read."""
        return tuple(range(len(self.classes)))

    @property
    def labelled(self) -> bool:
        """Whether there are labels; without them only `image`, `name` and `check` are available."""
        return True

    def warnings(self) -> list[str]:
        """What is odd about the files that were found; said when they are checked."""
        return []

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        raise NotImplementedError

    def image(self, i: int) -> tv_tensors.Image:
        """The image of sample `i` alone, as `dataset[i]` gives it."""
        return self[i][0]

    def name(self, i: int) -> str:
        """The stem for names of files about sample `i`, different for every sample."""
        raise NotImplementedError

    def check(
        self,
        sample: int | None = None,
        workers: int = 0,
        progress: str | None = None,
        on_bad_sample: OnBadSample = "error",
    ) -> Tensor:
        """Read all samples, or `sample` of them spread evenly over the dataset, and raise if any breaks a rule.

        Args:
            sample: the number of samples to read; None reads all.
            workers: the number of processes that read; 0 reads in this process.
            progress: the title of a progress bar; None shows no bar.
            on_bad_sample: `"skip"` leaves out samples that break a rule, unless all do.

        Returns:
            (256,) int64: the number of pixels of each training id in the samples that were read, zeros without labels.

        Raises:
            DatasetError: if any sample breaks a rule. The message names the first five of them and counts the others.
            ValueError: if `sample` is not positive.
        """
        if sample is not None and sample < 1:
            raise ValueError(f"sample is {sample}; give how many samples to check, at least 1, or None for all")
        count = len(self) if sample is None else min(sample, len(self))
        reader = _ProblemReader(self, [i * len(self) // count for i in range(count)])
        # With a generator of its own, the loader leaves the global random state as it was.
        loader = DataLoader(reader, batch_size=None, num_workers=workers, generator=torch.Generator())
        bar = tqdm(loader, desc=progress, unit="image", disable=None if progress else True, leave=False)
        pixels, problems = torch.zeros(256, dtype=torch.int64), list[str]()
        for counts, problem in bar:
            pixels += counts
            if problem:
                problems.append(problem)
        if on_bad_sample == "skip" and len(problems) < count:
            return pixels
        if len(problems) > MAX_PROBLEMS:
            rest = len(problems) - MAX_PROBLEMS
            problems[MAX_PROBLEMS:] = [f"... and {rest} more of the {count} samples that were checked"]
        if problems:
            raise DatasetError("\n".join(problems))
        return pixels


def get_sample(dataset: SegmentationDataset, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Return `dataset[i]`, of a class that somebody else may have written.

    Raises:
        DatasetError: it is not what `SegmentationDataset` says; or of `dataset[i]` itself.
    """
    image, mask = dataset[i]
    of_bytes = all(isinstance(item, Tensor) and item.dtype == torch.uint8 for item in (image, mask))
    if not of_bytes or image.dim() != 3 or image.shape[1:] != mask.shape:
        given = " and ".join(
            f"a {type(item).__name__} of {getattr(item, 'dtype', 'no type')} {tuple(getattr(item, 'shape', ()))}"
            for item in (image, mask)
        )
        raise DatasetError(
            f"sample {i} of {type(dataset).__name__} is {given}; it must be an image, a uint8 tensor (C, H, W), and a "
            f"mask of class ids of that size, a uint8 tensor (H, W) with {IGNORE_INDEX} where a pixel does not count"
        )
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


class _ProblemReader(Dataset):
    """Reads the samples `indices` of a dataset.

    Item i is the number of pixels of each training id in that sample, (256,) int64, and the message of the rule that it
    breaks, or an empty one.
    """

    def __init__(self, dataset: SegmentationDataset, indices: list[int]):
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        nothing = torch.zeros(256, dtype=torch.int64)
        try:
            if not self.dataset.labelled:
                self.dataset.image(self.indices[i])
                return nothing, ""
            mask = get_sample(self.dataset, self.indices[i])[1].as_subclass(Tensor)
        except DatasetError as error:
            return nothing, str(error)
        counts = torch.bincount(mask.flatten(), minlength=256)
        allowed = {*range(len(self.dataset.classes)), IGNORE_INDEX, self.dataset.ignore_index}
        if bad := sorted(set(counts.nonzero().flatten().tolist()) - allowed):
            return nothing, (
                f"sample {self.indices[i]} of {type(self.dataset).__name__} has the id {bad[0]} in {counts[bad[0]]} "
                f"pixels: ids go from 0 to {len(self.dataset.classes) - 1}, or are {IGNORE_INDEX} where a pixel does "
                "not count"
            )
        return counts, ""
