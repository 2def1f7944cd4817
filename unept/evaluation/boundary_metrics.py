"""Boundary F-score and Boundary IoU, accumulated on the device over a data set.

Letters: K classes. Counts are int64 tensors that `all_reduce` sums over processes before `scores()`. `update` never
waits for a GPU, which is why `scores()` is the one to raise if a class id was outside 0..K-1.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from .counts import bincount, check_ids, check_inputs, validate


@dataclass(frozen=True)
class BoundaryScores:
    """Result of `BoundaryFScore.scores`: shares from 0 to 1, NaN where there is nothing to divide by."""

    mean_f: float
    """The mean of `f` over the classes that have a boundary in the truth or in the prediction."""
    f: tuple[float, ...]
    """2 * precision * recall / (precision + recall) per class; 0 if nothing matches, NaN without a boundary."""
    precision: tuple[float, ...]
    """Share of the predicted boundary pixels that have a true one within the tolerance, per class."""
    recall: tuple[float, ...]
    """Share of the true boundary pixels that have a predicted one within the tolerance, per class."""


@dataclass(frozen=True)
class BoundaryIoUScores:
    """Result of `BoundaryIoU.scores`: shares from 0 to 1, NaN where there is nothing to divide by."""

    mean_iou: float
    """The mean of `iou` over the classes that occur in the truth or in the prediction."""
    iou: tuple[float, ...]
    """Boundary IoU per class; NaN if the class occurs neither in the truth nor in the prediction."""


class BoundaryFScore:
    """Measure how well predicted class boundaries lie on the true ones: the F-score of the boundary pixels per class.

    This is the contour measure of Csurka et al. ("What is a good evaluation measure for semantic segmentation?", 2013)
    and Perazzi et al. ("A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", 2016), class by
    class as in Takikawa et al. ("Gated-SCNN", 2019), but with matches counted over the data set, not averaged over
    images.

    A pixel is on the boundary of its class if one of its 4 neighbours is not ignored and is of another class: both
    sides of an edge are boundary. It matches if the other map has a boundary pixel of the same class within the
    Euclidean distance `tolerance`. Ignored pixels are removed from both maps: neither they nor the edge of the image
    are boundary.

    Args:
        num_classes: number of classes K.
        tolerance: distance in pixels, usually 1 to 3; 0 asks for the same pixel.
        ignore_index: true class of the pixels that do not count.
        device: where the counts are kept.

    Attributes:
        counts: counts, int64 (K, 4): predicted boundary pixels, how many of them match, true boundary pixels, how many
            of them match.

    Raises:
        ValueError: the tolerance is negative.
    """

    def __init__(
        self,
        num_classes: int,
        tolerance: float = 1,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
    ):
        if tolerance < 0:
            raise ValueError(f"tolerance is {tolerance}; give a distance in pixels, 0 or more")
        self.tolerance = tolerance
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, 4, dtype=torch.int64, device=device)
        self._num_invalid = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            prediction: class ids of any integer dtype, (B, H, W) or (H, W), on the device of the counts.
            target: true class ids, of the same shape.

        Raises:
            TypeError: either does not hold integers.
            ValueError: shapes or devices differ, or there are fewer than two dimensions.
        """
        check_inputs(prediction, target, self.counts)
        if target.dim() < 2:
            raise ValueError(f"target has shape {tuple(target.shape)}; it must be (B, H, W) or (H, W)")
        num_classes = len(self.counts)
        prediction, target, valid, num_invalid = validate(prediction, target, num_classes, self.ignore_index)
        self._num_invalid += num_invalid
        predicted = _boundary_classes(torch.where(valid, prediction, num_classes), num_classes)
        true = _boundary_classes(torch.where(valid, target, num_classes), num_classes)
        for column, (boundary, other) in zip((0, 2), ((predicted, true), (true, predicted)), strict=True):
            matched = torch.where(self._matches(boundary, other), boundary, num_classes)
            self.counts[:, column] += bincount(boundary, num_classes)
            self.counts[:, column + 1] += bincount(matched, num_classes)

    def all_reduce(self) -> None:
        """Sum the counts over all processes of the default process group."""
        dist.all_reduce(self.counts)
        dist.all_reduce(self._num_invalid)

    def scores(self) -> BoundaryScores:
        """Return the F-score, precision and recall per class, and the mean F-score of the classes with a boundary.

        Raises:
            ValueError: a class id was outside 0..K-1.
        """
        check_ids(self._num_invalid, len(self.counts))
        predicted, predicted_matches, true, true_matches = self.counts.double().cpu().unbind(1)
        precision, recall = predicted_matches / predicted, true_matches / true
        f = 2 * precision * recall / (precision + recall)
        f = torch.where((predicted_matches == 0) & (predicted + true > 0), 0.0, f)
        return BoundaryScores(
            mean_f=f.nanmean().item(),
            f=tuple(f.tolist()),
            precision=tuple(precision.tolist()),
            recall=tuple(recall.tolist()),
        )

    def _matches(self, boundary: Tensor, other: Tensor) -> Tensor:
        """Return a bool mask (..., H, W) of the pixels around which `other` has the same class within the tolerance.

        There is one comparison per offset in the disk, so the work does not grow with the number of classes.
        """
        radius = math.floor(self.tolerance)
        padded = pad(other, (radius, radius, radius, radius), value=-1)
        height, width = boundary.shape[-2:]
        mask = torch.zeros_like(boundary, dtype=torch.bool)
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                if dx * dx + dy * dy <= self.tolerance**2:
                    mask |= boundary == padded[..., radius + dy :, radius + dx :][..., :height, :width]
        return mask


class BoundaryIoU:
    """Measure the intersection over union of the bands along the boundaries of true and predicted classes.

    This is Boundary IoU of Cheng et al. ("Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", 2021),
    class by class, with pixels counted over the data set as for mIoU. The band of a class holds its pixels within a
    distance d of its boundary; d is 0.02 of the image's diagonal as in the paper, rounded to whole pixels, at least 1.

    As in the authors' code, distances are those of d erosions by 3x3 squares (the larger of |dx| and |dy|), and what
    lies beyond the edge of the image is another class. Ignored pixels are removed from both maps: they are in no band
    and make none.

    Args:
        num_classes: number of classes K.
        dilation_ratio: d as a share of the image's diagonal.
        ignore_index: true class of the pixels that do not count.
        device: where the counts are kept.

    Attributes:
        counts: counts, int64 (K, 3): pixels in the predicted band, in the true band, in both.

    Raises:
        ValueError: the ratio is not positive.
    """

    def __init__(
        self,
        num_classes: int,
        dilation_ratio: float = 0.02,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
    ):
        if dilation_ratio <= 0:
            raise ValueError(f"dilation_ratio is {dilation_ratio}; give a positive share of the image's diagonal")
        self.dilation_ratio = dilation_ratio
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, 3, dtype=torch.int64, device=device)
        self._num_invalid = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            prediction: class ids of any integer dtype, (B, H, W) or (H, W), on the device of the counts.
            target: true class ids, of the same shape.

        Raises:
            TypeError: either does not hold integers.
            ValueError: shapes or devices differ, or there are not two or three dimensions.
        """
        check_inputs(prediction, target, self.counts)
        if target.dim() not in (2, 3):
            raise ValueError(f"target has shape {tuple(target.shape)}; it must be (B, H, W) or (H, W)")
        if target.dim() == 2:
            prediction, target = prediction[None], target[None]
        num_classes = len(self.counts)
        prediction, target, valid, num_invalid = validate(prediction, target, num_classes, self.ignore_index)
        self._num_invalid += num_invalid
        distance = max(1, round(self.dilation_ratio * math.hypot(*target.shape[1:])))
        predicted, true = (_band_classes(labels, valid, distance, num_classes) for labels in (prediction, target))
        both = torch.where(predicted == true, true, num_classes)
        for column, band in enumerate((predicted, true, both)):
            self.counts[:, column] += bincount(band, num_classes)

    def all_reduce(self) -> None:
        """Sum the counts over all processes of the default process group."""
        dist.all_reduce(self.counts)
        dist.all_reduce(self._num_invalid)

    def scores(self) -> BoundaryIoUScores:
        """Return the Boundary IoU per class, and the mean over the classes that occur.

        Raises:
            ValueError: a class id was outside 0..K-1.
        """
        check_ids(self._num_invalid, len(self.counts))
        predicted, true, both = self.counts.double().cpu().unbind(1)
        iou = both / (predicted + true - both)
        return BoundaryIoUScores(mean_iou=iou.nanmean().item(), iou=tuple(iou.tolist()))


def _band_classes(labels: Tensor, valid: Tensor, distance: int, fill: int) -> Tensor:
    """Return `labels` (B, H, W) with `fill` wherever a pixel is not valid or not in the band of its class.

    A pixel is in the band if the square of pixels within `distance` around it leaves the image or holds a valid pixel
    of another class: if the smallest or the largest valid label in it is not its own.
    """
    ids = labels.float()[:, None]  # exact below 2^24
    size = 2 * distance + 1
    in_band = ~valid
    for sign in (1, -1):
        signed = torch.where(valid[:, None], sign * ids, -torch.inf)
        rows = max_pool2d(signed, (size, 1), stride=1, padding=(distance, 0))
        largest = max_pool2d(rows, (1, size), stride=1, padding=(0, distance))
        in_band = in_band | (largest != sign * ids)[:, 0]
    in_band = in_band.clone()
    for axis in (1, 2):
        length = labels.shape[axis]
        reach = min(distance, length)
        in_band.narrow(axis, 0, reach).fill_(True)
        in_band.narrow(axis, length - reach, reach).fill_(True)
    return torch.where(in_band & valid, labels, fill)


def _boundary_classes(labels: Tensor, fill: int) -> Tensor:
    """Return `labels` (..., H, W) with `fill` wherever a pixel is not on a boundary.

    Pixels that do not count hold `fill` already.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (-2, -1):
        size = labels.shape[axis] - 1
        first, second = labels.narrow(axis, 0, size), labels.narrow(axis, 1, size)
        edge = (first != second) & (first != fill) & (second != fill)
        mask.narrow(axis, 0, size).logical_or_(edge)
        mask.narrow(axis, 1, size).logical_or_(edge)
    return torch.where(mask, labels, fill)
