"""Loaders whose sample number n depends on the seed and n alone, so that a run resumes exactly without workers' state.

It depends neither on the number of workers, nor on where the run was resumed, nor on what else draws random numbers.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import tv_tensors
from tqdm import tqdm

from ..allocator import keep_no_freed_memory
from ..signals import shield_worker
from .base import DatasetError, OnBadSample, SegmentationDataset, get_sample
from .transforms import eval_transform

Transform = Callable[[Any, Any], tuple[Tensor, ...]]


class TrainingSampler(Sampler):
    """An endless sequence of `(index, sample_seed)`, in which every epoch is a fresh permutation of the dataset.

    Sample number n of the run (counted over all ranks and epochs) is a pure function of (seed, n). Rank r of W draws
    the numbers `start_sample + r`, `start_sample + r + W`, ...

    Args:
        length: the number of samples in the dataset.
        seed: the seed of the run.
        start_sample: the number of samples that all ranks together have drawn before.
        rank: the rank of this process.
        world_size: the number of processes.

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
    """One item of a training loader."""

    images: Tensor
    """uint8 (B, 3, h, w)."""
    labels: Tensor
    """uint8 (B, h, w)."""
    params: Tensor | None
    """float32 (B, 7), of the photometric distortion (`photometric.distort`); None where the transform draws none."""
    seconds: float
    """The mean time per sample, from the file to the batch, in the process that made the batch."""
    skipped: Sequence[str]
    """The message of each bad sample that was replaced by another one."""


class Sample(NamedTuple):
    """One item of a `TransformedDataset`."""

    tensors: tuple[Tensor, ...]
    """What the transform returned, as plain tensors."""
    seconds: float
    """The time that reading and transforming took."""
    skipped: Sequence[str]
    """The message of each bad sample that this one replaces."""


def read_sample(
    dataset: SegmentationDataset, index: int, on_bad_sample: OnBadSample = "error"
) -> tuple[int, tuple[tv_tensors.Image, tv_tensors.Mask], list[str]]:
    """Read the sample at `index`; with `"skip"`, the next one that can be read. The first comes after the last.

    Returns:
        The index of the sample that was read, the sample, and the messages of those that were skipped.

    Raises:
        DatasetError: if it can't be read; with `"skip"`, if no sample of the dataset can.
    """
    if on_bad_sample == "error":
        return index, get_sample(dataset, index), []
    errors: list[str] = []
    for i in itertools.chain(range(index, len(dataset)), range(index)):
        try:
            return i, get_sample(dataset, i), errors
        except DatasetError as error:
            errors.append(str(error))
    raise DatasetError(f"none of the dataset's {len(dataset)} samples can be read. {errors[0]}")


def report_skipped(errors: Iterable[str]) -> None:
    """Print to stderr which samples were skipped, and why; each only once per process."""
    for error in errors:
        _report_once(error)


@functools.cache
def _report_once(error: str) -> None:
    tqdm.write(f"skipped: {error}", file=sys.stderr)


class TransformedDataset(Dataset):
    """A dataset under a transform; keys are `(index, sample_seed)`, values are samples of plain tensors.

    The transform's random numbers follow from sample_seed; the global random state is left as it was. A DatasetError is
    returned, not raised, for the loader to raise in its own process.

    Args:
        dataset: the dataset to read.
        transform: maps an image and its mask to tensors.
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
    """Stack samples into a batch, or return the first error among them."""
    start = time.perf_counter()
    samples: list[Sample] = []
    for item in items:
        if isinstance(item, DatasetError):
            return item
        samples.append(item)
    # Images whose channels lie innermost would make a batch of that layout, and the convolutions would follow it.
    tensors = default_collate([tuple(t.contiguous() for t in sample.tensors) for sample in samples])
    skipped = [error for sample in samples for error in sample.skipped]
    seconds = sum(sample.seconds for sample in samples) + time.perf_counter() - start
    images, labels, params = (*tensors, None)[:3]
    return Batch(images, labels, params, seconds / len(samples), skipped)


def _collate_pair(items: list[Sample | DatasetError]) -> tuple[Tensor, Tensor] | DatasetError:
    batch = _collate(items)
    return batch if isinstance(batch, DatasetError) else (batch.images, batch.labels)


def _collate_image(items: list[Tensor | DatasetError]) -> Tensor | DatasetError:
    (item,) = items
    return item if isinstance(item, DatasetError) else item.contiguous()[None]


class _Loader(DataLoader):
    """Raises the dataset's errors in this process, where torch would wrap them in a worker process's traceback.

    Attributes:
        skipped: the number of bad samples that were skipped so far, in this process's share. Each is reported once.
        skip_errors: skip a batch that is an error, rather than raise it.
    """

    skipped = 0
    skip_errors = False

    def __iter__(self) -> Iterator[Any]:
        error = None
        for batch in super().__iter__():
            if isinstance(batch, DatasetError):
                if not self.skip_errors:
                    error = batch
                    break
                self._count([str(batch)])
                continue
            if isinstance(batch, Batch):
                self._count(batch.skipped)
            yield batch
        # Not raised inside the loop: its workers would live as long as the traceback, and then be waited for in vain.
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
    start_sample: int | None = None,
) -> _Loader:
    """Create an endless loader of `Batch`es.

    Its attribute `skipped` counts the bad samples that were replaced in all the batches taken from it so far.

    Args:
        dataset: the dataset to draw from.
        transform: see `train_transform`; it must give every sample the same size.
        batch_size: B, the number of samples in one batch of this rank.
        seed: the seed of the run, the same on every rank.
        start_step: the number of batches that every rank has drawn before; the loader goes on with the next.
        workers: the number of processes that prepare batches; 0 prepares them in this process.
        rank: the rank of this process.
        world_size: the number of processes.
        pin_memory: copy batches into page-locked memory, from which copies to a GPU do not block; None does so where
            there is CUDA.
        on_bad_sample: `"error"` raises DatasetError for a sample that can't be read. `"skip"` replaces it by the next
            one that can be read, so that sample n stays a function of (seed, n), and raises only if there is none.
        start_sample: the number of samples that all ranks together have drawn before, where batches had other sizes;
            None: those of `start_step` batches.
    """
    if start_sample is None:
        start_sample = start_step * batch_size * world_size
    sampler = TrainingSampler(len(dataset), seed, start_sample, rank, world_size)
    samples = TransformedDataset(dataset, transform, on_bad_sample)
    return _make_loader(samples, sampler, batch_size, workers, pin_memory, _collate)


def evaluation_loader(
    dataset: SegmentationDataset,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    transform: Transform | None = None,
    pin_memory: bool | None = None,
    on_bad_sample: OnBadSample = "error",
) -> _Loader:
    """Create a loader of this rank's samples, one at a time: (image uint8 (1, 3, h, w), labels uint8 (1, H, W)).

    These are samples `rank`, `rank + world_size`, ...: over all ranks every sample comes exactly once, and ranks may
    differ by one in their number of samples.

    Args:
        dataset: the dataset to read.
        rank: the rank of this process.
        world_size: the number of processes.
        workers: the number of processes that read; 0 reads in this process.
        transform: see `eval_transform`; None leaves the images as they are.
        pin_memory: as in `training_loader`.
        on_bad_sample: `"error"` raises DatasetError for a sample that can't be read. `"skip"` leaves it out, and counts
            it in the loader's attribute `skipped`.
    """
    _check_rank(rank, world_size)
    keys = [(index, 0) for index in range(rank, len(dataset), world_size)]
    samples = TransformedDataset(dataset, transform or eval_transform())
    loader = _make_loader(samples, keys, 1, workers, pin_memory, _collate_pair)
    loader.skip_errors = on_bad_sample == "skip"
    return loader


def image_loader(dataset: SegmentationDataset, workers: int = 0, pin_memory: bool | None = None) -> DataLoader:
    """Create a loader of the images as they are, one at a time, uint8 (1, 3, H, W); labels are not read.

    Args:
        dataset: the dataset to read.
        workers: the number of processes that read; 0 reads in this process.
        pin_memory: as in `training_loader`.
    """
    return _make_loader(_ImageReader(dataset), range(len(dataset)), 1, workers, pin_memory, _collate_image)


class _ImageReader(Dataset):
    """The images of a dataset; for one that can't be read, the DatasetError is the item."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __getitem__(self, i: int) -> Tensor | DatasetError:
        try:
            return self.dataset.image(i).as_subclass(torch.Tensor)
        except DatasetError as error:
            return error


def _make_loader(
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
        worker_init_fn=_prepare_worker,
        # Without its own generator, every iterator would draw its workers' base seed from the global one.
        generator=torch.Generator(),
    )


def _prepare_worker(worker: int) -> None:
    """Make the process of a loader one that signals spare, and that returns what an image takes after it."""
    shield_worker(worker)
    keep_no_freed_memory()


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} and world_size {world_size}; rank counts from 0 to world_size - 1")
