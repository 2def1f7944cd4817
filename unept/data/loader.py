"""Loaders whose sample number n depends on the seed and n alone: a run resumes exactly without any worker's state.

Not on the number of workers, nor on where the run was resumed, nor on what else draws random numbers.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .base import DatasetError, SegmentationDataset
from .transforms import eval_transform

Transform = Callable[[Any, Any], tuple[Tensor, Tensor]]


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


class TransformedDataset(Dataset):
    """`dataset` under `transform`; keys are `(index, sample_seed)`, values plain uint8 tensors (3, h, w) and (h, w).

    The transform's random numbers follow from sample_seed; the global random state is left as it was. A DatasetError is
    returned, not raised, for the loader to raise in its own process.
    """

    def __init__(self, dataset: SegmentationDataset, transform: Transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | DatasetError:
        index, sample_seed = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed every CUDA device as well.
            torch.default_generator.manual_seed(sample_seed)
            try:
                image, mask = self.transform(*self.dataset[index])
            except DatasetError as error:
                return error
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def _collate(items: list[Any]) -> Any:
    """A batch, or the first error among the samples."""
    return next((item for item in items if isinstance(item, DatasetError)), None) or default_collate(items)


class _Loader(DataLoader):
    """Raises errors of the data set here: torch would wrap them in the traceback of a worker process."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, DatasetError):
                raise batch
            yield batch


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
) -> DataLoader:
    """An endless loader of (images uint8 (B, 3, h, w), labels uint8 (B, h, w)).

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
    """
    start_sample = start_step * batch_size * world_size
    sampler = TrainingSampler(len(dataset), seed, start_sample, rank, world_size)
    return _loader(TransformedDataset(dataset, transform), sampler, batch_size, workers, pin_memory)


def evaluation_loader(
    dataset: SegmentationDataset,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    transform: Transform | None = None,
    pin_memory: bool | None = None,
) -> DataLoader:
    """Samples `rank`, `rank + world_size`, ... one at a time: (image uint8 (1, 3, h, w), labels uint8 (1, H, W)).

    Over all ranks every sample comes exactly once, so that ranks may differ by one in their number of samples.

    Args:
        dataset: what to read.
        rank: of this process.
        world_size: number of processes.
        workers: processes that read; 0: this one.
        transform: see `eval_transform`; None: the images as they are.
        pin_memory: as in `training_loader`.
    """
    _check_rank(rank, world_size)
    keys = [(index, 0) for index in range(rank, len(dataset), world_size)]
    return _loader(TransformedDataset(dataset, transform or eval_transform()), keys, 1, workers, pin_memory)


def image_loader(dataset: SegmentationDataset, workers: int = 0, pin_memory: bool | None = None) -> DataLoader:
    """The images as they are, one after another, uint8 (1, 3, H, W); labels are not read.

    Args:
        dataset: what to read.
        workers: processes that read; 0: this one.
        pin_memory: as in `training_loader`.
    """
    return _loader(_Images(dataset), range(len(dataset)), 1, workers, pin_memory)


class _Images(Dataset):
    """The images of `dataset`, or the DatasetError that there is instead."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __getitem__(self, i: int) -> Tensor | DatasetError:
        try:
            return self.dataset.image(i).as_subclass(torch.Tensor)
        except DatasetError as error:
            return error


def _loader(dataset: Dataset, sampler: Any, batch_size: int, workers: int, pin_memory: bool | None) -> DataLoader:
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=workers > 0,
        collate_fn=_collate,
        # Without a generator of its own, every iterator would draw its workers' base seed from the global one.
        generator=torch.Generator(),
    )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} and world_size {world_size}; rank counts from 0 to world_size - 1")
