"""Loaders whose sample number n depends on the seed and n alone: a run resumes exactly without any worker's state.

Not on the number of workers, nor on where the run was resumed, nor on what else draws random numbers.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from tqdm import tqdm

from .base import DatasetError, SegmentationDataset
from .transforms import eval_transform

Transform = Callable[[Any, Any], tuple[Tensor, ...]]
OnBadSample = Literal["error", "skip"]


class TrainingSampler(Sampler):
    """Endless `(index, sample_seed)`; every epoch is a fresh permutation of the dataset.

    Sample number n of the run (counted over all ranks and epochs) is a pure function of (seed, n). Rank r of W draws
    the numbers `start_sample + r`, `start_sample + r + W`, ...

    Args:
        length: of the dataset.
        seed: of the run.
        start_sample: how many samples all ranks together have drawn before.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: if the dataset is empty, start_sample is negative or rank is not in [0, world_size).
    """

    def __init__(self, length: int, seed: int, start_sample: int = 0, rank: int = 0, world_size: int = 1):
        if length < 1:
            raise ValueError(f"the dataset has {length} samples; training needs at least 1")
        if start_sample < 0:
            raise ValueError(f"start_sample is {start_sample}; it counts the samples drawn before, 0 or more")
        _check_rank(rank, world_size)
        self.length = length
        self.seed = seed
        self.start = start_sample + rank
        self.step = world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order: np.ndarray = np.empty(0)
        order_epoch = -1
        for n in itertools.count(self.start, self.step):
            epoch, position = divmod(n, self.length)
            if epoch != order_epoch:
                order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.length)
                order_epoch = epoch
            (sample_seed,) = np.random.SeedSequence((self.seed, 1, n)).generate_state(1, np.uint64)
            yield int(order[position]), int(sample_seed)


class Batch(NamedTuple):
    """What a training loader gives."""

    images: Tensor
    """uint8 (B, 3, h, w)."""
    labels: Tensor
    """uint8 (B, h, w)."""
    strengths: Tensor | None
    """Of `photometric.distort`, float32 (B, 7); None where the transform draws none."""
    seconds: float
    """That the process which made the batch spent on a sample, in the mean, from the file to the batch."""
    skipped: Sequence[str]
    """Of each bad sample that another one stands in for, what is wrong with it."""


class Sample(NamedTuple):
    """One sample: what the transform gives, as plain tensors, and the last fields of `Batch`."""

    tensors: tuple[Tensor, ...]
    seconds: float
    skipped: Sequence[str]


def read_sample(
    dataset: SegmentationDataset, index: int, on_bad_sample: OnBadSample = "error"
) -> tuple[int, tuple[tv_tensors.Image, tv_tensors.Mask], list[str]]:
    """The sample at `index`; with `"skip"`, else the next one that can be read, the first coming after the last.

    Returns:
        Its index, itself, and what is wrong with each of those before it.

    Raises:
        DatasetError: it can't be read; with `"skip"`, none of the data set can.
    """
    if on_bad_sample == "error":
        return index, dataset[index], []
    errors: list[str] = []
    for i in itertools.chain(range(index, len(dataset)), range(index)):
        try:
            return i, dataset[i], errors
        except DatasetError as error:
            errors.append(str(error))
    raise DatasetError(f"none of the data set's {len(dataset)} samples can be read. {errors[0]}")


def report_skipped(errors: Iterable[str]) -> None:
    """Say on stderr which samples were passed over, and why; each only once."""
    for error in errors:
        _report(error)


@functools.cache
def _report(error: str) -> None:
    tqdm.write(f"skipped: {error}", file=sys.stderr)


class TransformedDataset(Dataset):
    """`dataset` under `transform`; keys are `(index, sample_seed)`, values samples of plain tensors.

    The transform's random numbers follow from sample_seed; the global random state is left as it was. A DatasetError is
    returned, not raised, for the loader to raise in its own process.

    Args:
        dataset: what to read.
        transform: of its images and masks.
        on_bad_sample: see `read_sample`.
    """

    def __init__(self, dataset: SegmentationDataset, transform: Transform, on_bad_sample: OnBadSample = "error"):
        self.dataset = dataset
        self.transform = transform
        self.on_bad_sample = on_bad_sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample | DatasetError:
        start = time.perf_counter()
        index, sample_seed = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed every CUDA device as well.
            torch.default_generator.manual_seed(sample_seed)
            try:
                _, pair, skipped = read_sample(self.dataset, index, self.on_bad_sample)
            except DatasetError as error:
                return error
            tensors = tuple(tensor.as_subclass(Tensor) for tensor in self.transform(*pair))
        return Sample(tensors, time.perf_counter() - start, skipped)


def _collate(items: list[Sample | DatasetError]) -> Batch | DatasetError:
    """A batch, or the first error among the samples."""
    start = time.perf_counter()
    samples: list[Sample] = []
    for item in items:
        if isinstance(item, DatasetError):
            return item
        samples.append(item)
    # An image whose channels lie innermost would hand that on to the batch, and to the network's convolutions.
    tensors = default_collate([tuple(t.contiguous() for t in sample.tensors) for sample in samples])
    skipped = [error for sample in samples for error in sample.skipped]
    seconds = sum(sample.seconds for sample in samples) + time.perf_counter() - start
    images, labels, strengths = (*tensors, None)[:3]
    return Batch(images, labels, strengths, seconds / len(samples), skipped)


def _collate_pair(items: list[Sample | DatasetError]) -> tuple[Tensor, Tensor] | DatasetError:
    batch = _collate(items)
    return batch if isinstance(batch, DatasetError) else (batch.images, batch.labels)


def _collate_image(items: list[Tensor | DatasetError]) -> Tensor | DatasetError:
    (item,) = items
    return item if isinstance(item, DatasetError) else item.contiguous()[None]


class _Loader(DataLoader):
    """Raises errors of the data set here: torch would wrap them in the traceback of a worker process.

    Attributes:
        skipped: bad samples that were passed over so far, in this process's share; each is reported at its first time.
        leave_out: pass over a batch that is an error.
    """

    skipped = 0
    leave_out = False

    def __iter__(self) -> Iterator[Any]:
        error = None
        for batch in super().__iter__():
            if isinstance(batch, DatasetError):
                if not self.leave_out:
                    error = batch
                    break
                self._count([str(batch)])
                continue
            if isinstance(batch, Batch):
                self._count(batch.skipped)
            yield batch
        # Not in the loop: its workers would live as long as the error's traceback, and then be waited for in vain.
        if error is not None:
            raise error

    def _count(self, errors: Sequence[str]) -> None:
        self.skipped += len(errors)
        report_skipped(errors)


def training_loader(
    dataset: SegmentationDataset,
    transform: Transform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
    on_bad_sample: OnBadSample = "error",
) -> _Loader:
    """An endless loader of `Batch`es.

    Its attribute `skipped` counts the bad samples that others stood in for, of all the batches taken from it so far.

    Args:
        dataset: what to draw from.
        transform: see `train_transform`; must give every sample one size.
        batch_size: B, samples in one batch of this rank.
        seed: of the run, the same on every rank.
        start_step: how many batches every rank has drawn before; the loader goes on with the next.
        workers: processes that prepare batches; 0: this one.
        rank: of this process.
        world_size: number of processes.
        pin_memory: into page-locked memory, for copies that do not block; None: where there is CUDA.
        on_bad_sample: `"error"`: a sample that can't be read raises DatasetError. `"skip"`: the next one of the data
            set that can be read stands in for it, so that sample n stays a function of (seed, n); if there is none,
            DatasetError.
    """
    start_sample = start_step * batch_size * world_size
    sampler = TrainingSampler(len(dataset), seed, start_sample, rank, world_size)
    samples = TransformedDataset(dataset, transform, on_bad_sample)
    return _loader(samples, sampler, batch_size, workers, pin_memory, _collate)


def evaluation_loader(
    dataset: SegmentationDataset,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    transform: Transform | None = None,
    pin_memory: bool | None = None,
    on_bad_sample: OnBadSample = "error",
) -> _Loader:
    """Samples `rank`, `rank + world_size`, ... one at a time: (image uint8 (1, 3, h, w), labels uint8 (1, H, W)).

    Over all ranks every sample comes exactly once, so that ranks may differ by one in their number of samples.

    Args:
        dataset: what to read.
        rank: of this process.
        world_size: number of processes.
        workers: processes that read; 0: this one.
        transform: see `eval_transform`; None: the images as they are.
        pin_memory: as in `training_loader`.
        on_bad_sample: `"error"`: a sample that can't be read raises DatasetError. `"skip"`: it is left out, and counted
            in the loader's attribute `skipped`.
    """
    _check_rank(rank, world_size)
    keys = [(index, 0) for index in range(rank, len(dataset), world_size)]
    samples = TransformedDataset(dataset, transform or eval_transform())
    loader = _loader(samples, keys, 1, workers, pin_memory, _collate_pair)
    loader.leave_out = on_bad_sample == "skip"
    return loader


def image_loader(dataset: SegmentationDataset, workers: int = 0, pin_memory: bool | None = None) -> DataLoader:
    """The images as they are, one after another, uint8 (1, 3, H, W); labels are not read.

    Args:
        dataset: what to read.
        workers: processes that read; 0: this one.
        pin_memory: as in `training_loader`.
    """
    return _loader(_Images(dataset), range(len(dataset)), 1, workers, pin_memory, _collate_image)


class _Images(Dataset):
    """The images of `dataset`, or the DatasetError that there is instead."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __getitem__(self, i: int) -> Tensor | DatasetError:
        try:
            return self.dataset.image(i).as_subclass(torch.Tensor)
        except DatasetError as error:
            return error


def _loader(
    dataset: Dataset,
    sampler: Any,
    batch_size: int,
    workers: int,
    pin_memory: bool | None,
    collate: Callable[[list[Any]], Any],
) -> _Loader:
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        collate_fn=collate,
        # Without a generator of its own, every iterator would draw its workers' base seed from the global one.
        generator=torch.Generator(),
    )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} and world_size {world_size}; rank counts from 0 to world_size - 1")
