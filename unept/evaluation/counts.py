"""Checking and counting class ids without waiting for a GPU: what all metrics share. Letters: K classes."""

import torch
from torch import Tensor

# Numbers that a GPU counts in at a time: 8 MB.
COUNTERS = 1 << 20


def validate(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tell the pixels that count from those that are ignored or have an id outside 0..K-1.

    Returns:
        The prediction and the target as int64; a bool mask of the pixels that count; the number of pixels that are not
        ignored and have an id outside 0..K-1, an int64 scalar.
    """
    prediction, target = prediction.long(), target.long()
    labelled = target != ignore_index
    in_bounds = (prediction >= 0) & (prediction < num_classes) & (target >= 0) & (target < num_classes)
    return prediction, target, labelled & in_bounds, (labelled & ~in_bounds).sum()


def bincount(values: Tensor, length: int, copies: int | None = None) -> Tensor:
    """Count how often each of 0..length-1 occurs, int64 (length,); the value `length` is not counted. See `binsum`."""
    # torch.bincount waits for a GPU, because its result's size depends on the values.
    return binsum(values, torch.ones_like(values), length, copies)


def binsum(bins: Tensor, values: Tensor, length: int, copies: int | None = None) -> Tensor:
    """Sum the values of each bin without waiting for a GPU.

    Args:
        bins: of each value a number from 0 to `length`, int64; those in bin `length` are not summed.
        values: of the same shape.
        length: number of bins.
        copies: number of sums per bin that are added in the end. None: as many as pay on the device.

    Returns:
        (length,), in the dtype of the values.
    """
    bins, values = bins.flatten(), values.flatten()
    if copies is None:
        copies = max(1, min(256, COUNTERS // (length + 1))) if bins.is_cuda else 1
    if copies > 1:
        # Most pixels of an image have few values: they would add millions of times to one address, one after another.
        bins = bins + torch.arange(len(bins), device=bins.device).remainder_(copies) * (length + 1)
    sums = torch.zeros(copies * (length + 1), dtype=values.dtype, device=values.device)
    return sums.index_add_(0, bins, values).view(copies, length + 1).sum(0)[:length]


def check_inputs(prediction: Tensor, target: Tensor, counts: Tensor) -> None:
    """Raise TypeError or ValueError unless both are integers of one shape, on the device of the counts."""
    for name, ids in (("prediction", prediction), ("target", target)):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {ids.dtype}; it must hold integers: convert it with {name}.long()")
        if ids.device != counts.device:
            raise ValueError(
                f"{name} is on {ids.device} and the counts on {counts.device}; both must be on one device: move "
                f"{name} with .to({str(counts.device)!r}), or give the metric another device"
            )
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; they must be equal: "
            "predict class ids at the size of the labels"
        )


def check_ids(num_invalid: Tensor, num_classes: int) -> None:
    """Raise ValueError if the number of pixels whose class was outside 0..K-1, an int64 scalar, is not 0."""
    if count := int(num_invalid):
        raise ValueError(
            f"{count} pixels had a predicted or a true class outside 0..{num_classes - 1}: "
            "give a model and labels of the same class list"
        )
