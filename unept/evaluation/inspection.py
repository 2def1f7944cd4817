"""What an evaluation shows besides its scores: calibration, the confusion of classes, and which images are worst.

Letters: K classes, N bins of confidence.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import distributed
from ..files import write_atomically
from .counts import bincount, binsum
from .metrics import ConfusionMatrix


@dataclass(frozen=True)
class CalibrationScores:
    """Result of `Calibration.scores`. Shares are from 0 to 1; NaN in bins without a pixel."""

    ece: float
    """Expected calibration error: the mean of |accuracy - confidence| over the bins, weighted by their pixels."""
    accuracy: tuple[float, ...]
    """Share of the pixels of each bin whose class is right."""
    confidence: tuple[float, ...]
    """Mean confidence of the pixels of each bin."""
    share: tuple[float, ...]
    """Share of all pixels that each bin has."""


class Calibration:
    """Measure whether a confidence of p is right in a share p of the pixels: the expected calibration error (ECE).

    This is the measure of Guo et al. ("On Calibration of Modern Neural Networks", 2017) over all pixels that are not
    ignored, with N bins of equal width: bin n holds the confidences from n / N to (n + 1) / N.

    Args:
        num_bins: number of bins N.
        ignore_index: true class of the pixels that do not count.
        device: where the sums are kept.

    Attributes:
        sums: float64 (3, N): the number of pixels, how many of them are right, and the sum of their confidence.
    """

    def __init__(self, num_bins: int = 15, ignore_index: int = 255, device: torch.device | str = "cpu"):
        self.ignore_index = ignore_index
        self.sums = torch.zeros(3, num_bins, dtype=torch.float64, device=device)

    def update(self, prediction: Tensor, confidence: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            prediction: class ids of any integer dtype and any shape.
            confidence: probability of these classes from 0 to 1, of the same shape.
            target: true class ids, of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if not prediction.shape == confidence.shape == target.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)}, confidence {tuple(confidence.shape)} and target "
                f"{tuple(target.shape)}; they must be equal"
            )
        num_bins, confidence = self.sums.shape[1], confidence.double()
        bins = (confidence * num_bins).long().clamp(0, num_bins - 1)
        bins = torch.where(target == self.ignore_index, num_bins, bins)
        right_bins = torch.where(prediction == target, bins, num_bins)
        self.sums[0] += bincount(bins, num_bins)
        self.sums[1] += bincount(right_bins, num_bins)
        self.sums[2] += binsum(bins, confidence, num_bins)

    def all_reduce(self) -> None:
        """Sum the counts over all processes of the default process group."""
        dist.all_reduce(self.sums)

    def scores(self) -> CalibrationScores:
        """Return the expected calibration error and the curve; the error is NaN if no pixel was counted."""
        pixels, right, confidence = self.sums.cpu()
        gap = (right - confidence).abs().sum() / pixels.sum()  # each bin's gap times its pixels is this difference
        return CalibrationScores(
            ece=gap.item(),
            accuracy=tuple((right / pixels).tolist()),
            confidence=tuple((confidence / pixels).tolist()),
            share=tuple((pixels / pixels.sum()).tolist()),
        )


@dataclass(frozen=True)
class ImageScore:
    """How well one image is segmented."""

    index: int
    """Number of the image in its data set."""
    mean_iou: float
    """Mean IoU of the classes in the image or in its prediction, from 0 to 1."""


class Inspection:
    """What `unept.evaluation.evaluator.evaluate_model` is given to keep of the refined prediction.

    Args:
        num_classes: number of classes K.
        ignore_index: true class of the pixels that do not count.
        device: device of the predictions.

    Attributes:
        matrix: counts of the data set, int64 (K, K); rows are the truth, columns the prediction.
        calibration: see `Calibration`.
        images: the score of every image that has a pixel which is not ignored.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.calibration = Calibration(ignore_index=ignore_index, device=device)
        self.images: list[ImageScore] = []
        self._ignore_index = ignore_index

    def update(self, index: int, ids: Tensor, confidence: Tensor, labels: Tensor) -> None:
        """Count one image.

        Args:
            index: its number in the data set.
            ids: predicted class ids (1, H, W).
            confidence: their probability (1, H, W).
            labels: true class ids (1, H, W).
        """
        regions = ConfusionMatrix(len(self.matrix), self._ignore_index, self.matrix.device)
        regions.update(ids, labels)
        mean_iou = regions.scores().mean_iou
        if not math.isnan(mean_iou):
            self.images.append(ImageScore(index, mean_iou))
        self.matrix += regions.matrix
        self.calibration.update(ids, confidence, labels)

    def all_reduce(self) -> None:
        """Collect what all processes of the default process group have counted."""
        dist.all_reduce(self.matrix)
        self.calibration.all_reduce()
        parts: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(parts, self.images)
        self.images = [image for part in parts for image in part]

    def worst(self, count: int) -> list[ImageScore]:
        """Return the `count` images of the lowest mean IoU, worst first; all of them if there are fewer."""
        return sorted(self.images, key=lambda image: (image.mean_iou, image.index))[:count]


COLUMNS = {
    "IoU": "iou",
    "accuracy": "accuracy",
    "boundary F": "class_boundary_f",
    "boundary IoU": "class_boundary_iou",
    "share of pixels": "share",
}


def write_class_table(scores: Mapping[str, Any], classes: Sequence[str], path: Path) -> None:
    """Write one line per class, shares from 0 to 1, as CSV with a header; what has no value is an empty cell.

    Args:
        scores: result of `unept.evaluation.evaluator.evaluate_model`.
        classes: the K class names.
        path: the file to write.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "class", *COLUMNS])
    rows = zip(classes, *(scores[name] for name in COLUMNS.values()), strict=True)
    for k, (name, *values) in enumerate(rows):
        writer.writerow([k, name, *("" if math.isnan(value) else f"{value:.6f}" for value in values)])
    write_atomically(path, text.getvalue().encode())
