"""Pixel accuracy and IoU, accumulated on the device over a data set; `boundary_metrics` has those of boundaries.

Letters: K classes. Counts are int64 tensors that `all_reduce` sums over processes before `scores()`. `update` never
waits for a GPU, which is why `scores()` is the one to raise if a class id was outside 0..K-1.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .counts import bincount, check_ids, check_inputs, validate


@dataclass(frozen=True)
class RegionScores:
    """Result of `ConfusionMatrix.scores`: shares from 0 to 1, NaN where there is nothing to divide by."""

    pixel_accuracy: float
    """pixAcc: the share of the pixels that are not ignored whose class is right."""
    mean_iou: float
    """mIoU: the mean of `iou` over the classes that occur in the truth or in the prediction."""
    mean_accuracy: float
    """The mean of `accuracy` over the classes that occur in the truth."""
    iou: tuple[float, ...]
    """Intersection over union per class; NaN if the class occurs neither in the truth nor in the prediction."""
    accuracy: tuple[float, ...]
    """Share of the true pixels that is predicted right, per class; NaN if there is no true pixel."""


class ConfusionMatrix:
    """Count the pairs of true and predicted class over all pixels whose truth is not ignored.

    Args:
        num_classes: number of classes K.
        ignore_index: true class of the pixels that do not count.
        device: where the counts are kept.

    Attributes:
        matrix: counts, int64 (K, K); rows are the truth, columns the prediction.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._num_invalid = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            prediction: class ids of any integer dtype and any shape, on the device of the counts.
            target: true class ids, of the same shape.

        Raises:
            TypeError: either does not hold integers.
            ValueError: shapes or devices differ.
        """
        check_inputs(prediction, target, self.matrix)
        num_classes = len(self.matrix)
        prediction, target, valid, num_invalid = validate(prediction, target, num_classes, self.ignore_index)
        self._num_invalid += num_invalid
        cells = torch.where(valid, target * num_classes + prediction, num_classes**2)
        self.matrix += bincount(cells, num_classes**2).view_as(self.matrix)

    def all_reduce(self) -> None:
        """Sum the counts over all processes of the default process group."""
        dist.all_reduce(self.matrix)
        dist.all_reduce(self._num_invalid)

    def scores(self) -> RegionScores:
        """Return the pixel accuracy, IoU and accuracy per class, and their means.

        A class that occurs neither in the truth nor in the prediction has no IoU and is left out of the mean; one that
        is only predicted counts with IoU 0.

        Raises:
            ValueError: a class id was outside 0..K-1.
        """
        check_ids(self._num_invalid, len(self.matrix))
        matrix = self.matrix.double().cpu()
        correct, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou = correct / (true + predicted - correct)
        accuracy = correct / true
        return RegionScores(
            pixel_accuracy=(correct.sum() / true.sum()).item(),
            mean_iou=iou.nanmean().item(),
            mean_accuracy=accuracy.nanmean().item(),
            iou=tuple(iou.tolist()),
            accuracy=tuple(accuracy.tolist()),
        )
