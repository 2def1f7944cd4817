"""Segmentation metrics, accumulated on the device over a data set: pixel accuracy, IoU and the boundary F-score.

Letters: K classes. Counts are exposed as int64 tensors, to be summed over processes (`torch.distributed.all_reduce`)
before `scores()`. `update` never waits for a GPU; so it is `scores()` that raises if a class id was outside 0..K-1.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.checks import check_integer, check_same_device


@dataclass(frozen=True)
class RegionScores:
    """What `ConfusionMatrix.scores` gives: shares from 0 to 1; NaN where there is nothing to divide by."""

    pixel_accuracy: float
    """pixAcc: the share of the counted pixels whose class is right."""
    mean_iou: float
    """mIoU: the mean of `iou` over the classes that occur in truth or prediction."""
    mean_accuracy: float
    """The mean of `accuracy` over the classes that occur in truth."""
    iou: tuple[float, ...]
    """Intersection over union of each class; NaN if it occurs neither in truth nor in prediction."""
    accuracy: tuple[float, ...]
    """Of each class's true pixels, the share that was found; NaN if there is none."""


@dataclass(frozen=True)
class BoundaryScores:
    """What `BoundaryFScore.scores` gives: shares from 0 to 1; NaN where there is nothing to divide by."""

    mean_f: float
    """The mean of `f` over the classes that have a boundary in truth or prediction."""
    f: tuple[float, ...]
    """2 * precision * recall / (precision + recall) of each class; 0 if nothing matches, NaN without a boundary."""
    precision: tuple[float, ...]
    """Of each class's predicted boundary pixels, the share that has a true one within the tolerance."""
    recall: tuple[float, ...]
    """Of each class's true boundary pixels, the share that has a predicted one within the tolerance."""


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all pixels whose truth is not ignored.

    Args:
        num_classes: K.
        ignore_index: pixels with this truth do not count.
        device: where the counts are kept.

    Attributes:
        matrix: int64 (K, K), rows the truth, columns the prediction.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._invalid = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            prediction: class ids of any integer dtype and any shape, on the counts' device.
            target: the truth, of the same shape.

        Raises:
            TypeError: if either is not integer.
            ValueError: if shapes or devices differ.
        """
        _check_inputs(prediction, target, self.matrix)
        num_classes = len(self.matrix)
        prediction, target, counts, invalid = _countable(prediction, target, num_classes, self.ignore_index)
        self._invalid += invalid
        cells = torch.where(counts, target * num_classes + prediction, num_classes**2)
        self.matrix += _bincount(cells, num_classes**2).view_as(self.matrix)

    def all_reduce(self) -> None:
        """Add up the counts of all processes of the default process group."""
        dist.all_reduce(self.matrix)
        dist.all_reduce(self._invalid)

    def scores(self) -> RegionScores:
        """Pixel accuracy, IoU and accuracy of each class, and their means.

        A class that occurs neither in truth nor in prediction has no IoU and is left out of the mean; one that is only
        predicted counts with IoU 0.

        Raises:
            ValueError: if a class id was outside 0..K-1.
        """
        _check_ids(self._invalid, len(self.matrix))
        matrix = self.matrix.double().cpu()
        hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou = hits / (truth + predicted - hits)
        accuracy = hits / truth
        return RegionScores(
            pixel_accuracy=(hits.sum() / truth.sum()).item(),
            mean_iou=iou.nanmean().item(),
            mean_accuracy=accuracy.nanmean().item(),
            iou=tuple(iou.tolist()),
            accuracy=tuple(accuracy.tolist()),
        )


class BoundaryFScore:
    """How well predicted class boundaries lie on the true ones: the F-score of each class's boundary pixels.

    The contour measure of Csurka et al. ("What is a good evaluation measure for semantic segmentation?", 2013) and
    Perazzi et al. ("A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", 2016), class by
    class as in Takikawa et al. ("Gated-SCNN", 2019), but with matches counted over the data set, not averaged over
    images.

    A pixel is on its class's boundary if one of its 4 neighbours counts and is of another class: both sides of an edge
    are boundary. It matches if the other map has a boundary pixel of the same class within the Euclidean distance
    `tolerance`. Ignored pixels are taken out of both maps: they are no boundary, and neither is the image's edge.

    Args:
        num_classes: K.
        tolerance: in pixels, usually 1 to 3; 0 asks for the same pixel.
        ignore_index: pixels with this truth do not count.
        device: where the counts are kept.

    Attributes:
        counts: int64 (K, 4): predicted boundary pixels, how many of them match, true ones, how many of them match.
    """

    def __init__(
        self,
        num_classes: int,
        tolerance: float = 1,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
    ):
        if tolerance < 0:
            raise ValueError(f"tolerance is {tolerance}; it is a distance in pixels, 0 or more")
        self.tolerance = tolerance
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, 4, dtype=torch.int64, device=device)
        self._invalid = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            prediction: class ids of any integer dtype, (B, H, W) or (H, W), on the counts' device.
            target: the truth, of the same shape.

        Raises:
            TypeError: if either is not integer.
            ValueError: if shapes or devices differ, or there are no two dimensions.
        """
        _check_inputs(prediction, target, self.counts)
        if target.dim() < 2:
            raise ValueError(f"target has shape {tuple(target.shape)}; it must be (B, H, W) or (H, W)")
        num_classes = len(self.counts)
        prediction, target, counts, invalid = _countable(prediction, target, num_classes, self.ignore_index)
        self._invalid += invalid
        found = _boundary_classes(torch.where(counts, prediction, num_classes), num_classes)
        truth = _boundary_classes(torch.where(counts, target, num_classes), num_classes)
        for column, (boundary, other) in zip((0, 2), ((found, truth), (truth, found)), strict=True):
            matched = torch.where(self._near_same_class(boundary, other), boundary, num_classes)
            self.counts[:, column] += _bincount(boundary, num_classes)
            self.counts[:, column + 1] += _bincount(matched, num_classes)

    def all_reduce(self) -> None:
        """Add up the counts of all processes of the default process group."""
        dist.all_reduce(self.counts)
        dist.all_reduce(self._invalid)

    def scores(self) -> BoundaryScores:
        """F-score, precision and recall of each class, and the mean F-score of the classes that have a boundary.

        Raises:
            ValueError: if a class id was outside 0..K-1.
        """
        _check_ids(self._invalid, len(self.counts))
        found, found_matched, truth, truth_matched = self.counts.double().cpu().unbind(1)
        precision, recall = found_matched / found, truth_matched / truth
        f = 2 * precision * recall / (precision + recall)
        f = torch.where((found_matched == 0) & (found + truth > 0), 0.0, f)
        return BoundaryScores(
            mean_f=f.nanmean().item(),
            f=tuple(f.tolist()),
            precision=tuple(precision.tolist()),
            recall=tuple(recall.tolist()),
        )

    def _near_same_class(self, boundary: Tensor, other: Tensor) -> Tensor:
        """Whether `other` holds the same class within the tolerance: bool, the shape of `boundary`.

        One comparison for each offset in the disk: the work does not grow with the number of classes.
        """
        reach = math.floor(self.tolerance)
        padded = pad(other, (reach, reach, reach, reach), value=-1)
        height, width = boundary.shape[-2:]
        near = torch.zeros_like(boundary, dtype=torch.bool)
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                if dx * dx + dy * dy <= self.tolerance**2:
                    near |= boundary == padded[..., reach + dy :, reach + dx :][..., :height, :width]
        return near


def _boundary_classes(labels: Tensor, none: int) -> Tensor:
    """The class of every boundary pixel, else `none`, which `labels` (..., H, W) holds where a pixel doesn't count."""
    boundary = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (-2, -1):
        size = labels.shape[axis] - 1
        first, second = labels.narrow(axis, 0, size), labels.narrow(axis, 1, size)
        edge = (first != second) & (first != none) & (second != none)
        boundary.narrow(axis, 0, size).logical_or_(edge)
        boundary.narrow(axis, 1, size).logical_or_(edge)
    return torch.where(boundary, labels, none)


def _countable(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both maps as int64, the pixels that count, and the number of those that can't: an id outside 0..K-1."""
    prediction, target = prediction.long(), target.long()
    kept = target != ignore_index
    valid = (prediction >= 0) & (prediction < num_classes) & (target >= 0) & (target < num_classes)
    return prediction, target, kept & valid, (kept & ~valid).sum()


def _bincount(values: Tensor, length: int) -> Tensor:
    """How often each of 0..length-1 occurs, int64; `length` itself stands for none."""
    # torch.bincount waits for a GPU, because its result's size depends on the values.
    counts = torch.zeros(length + 1, dtype=torch.int64, device=values.device)
    return counts.index_add_(0, values.flatten(), torch.ones_like(values.flatten()))[:length]


def _check_inputs(prediction: Tensor, target: Tensor, counts: Tensor) -> None:
    check_integer(prediction=prediction, target=target)
    check_same_device(prediction=prediction, target=target, counts=counts)
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; they must be equal: "
            "predict class ids at the size of the labels"
        )


def _check_ids(invalid: Tensor, num_classes: int) -> None:
    if count := int(invalid):
        raise ValueError(
            f"{count} pixels had a predicted or a true class outside 0..{num_classes - 1}: "
            "the labels or the model belong to another class list"
        )
