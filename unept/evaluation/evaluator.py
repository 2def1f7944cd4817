"""Score a model on a data set, with and without refinement (Sec. 4)."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..data import DatasetError, SegmentationDataset, evaluation_loader
from ..data.base import OnBadSample
from ..inference import InferenceConfig, infer, read_prediction
from ..memory import require_memory_for_images
from ..model.finite import raise_not_a_number
from ..model.output import SegmentationModel, class_ids
from .boundary_metrics import BoundaryFScore, BoundaryIoU
from .comparison import mean_scores
from .inspection import Inspection
from .metrics import ConfusionMatrix


class PredictionMetrics:
    """Region and boundary metrics of one kind of prediction.

    Args:
        dataset: the data set that is predicted.
        tolerances: distances in pixels within which a boundary counts as found; the first is the main one.
        device: device of the predictions.
    """

    def __init__(self, dataset: SegmentationDataset, tolerances: Sequence[float], device: torch.device | str = "cpu"):
        num_classes, ignore_index = len(dataset.classes), dataset.ignore_index
        self.regions = ConfusionMatrix(num_classes, ignore_index, device)
        self.boundaries, *self.further = (BoundaryFScore(num_classes, t, ignore_index, device) for t in tolerances)
        self.bands = BoundaryIoU(num_classes, ignore_index=ignore_index, device=device)
        self._all: list[Any] = [self.regions, self.boundaries, *self.further, self.bands]

    def update(self, ids: Tensor, labels: Tensor) -> None:
        """Count predicted and true class ids, both (B, H, W)."""
        for metric in self._all:
            metric.update(ids, labels)

    def all_reduce(self) -> None:
        """Sum the counts over all processes of the default process group."""
        for metric in self._all:
            metric.all_reduce()

    def means(self) -> dict[str, float]:
        """Return `mIoU`, `pixAcc`, `boundary_f`, `boundary_iou`; of further tolerances `boundary_f_1px` and so on."""
        regions = self.regions.scores()
        return {
            "mIoU": regions.mean_iou,
            "pixAcc": regions.pixel_accuracy,
            "boundary_f": self.boundaries.scores().mean_f,
            "boundary_iou": self.bands.scores().mean_iou,
            **{f"boundary_f_{metric.tolerance:g}px": metric.scores().mean_f for metric in self.further},
        }


def evaluate_model(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    config: InferenceConfig,
    device: torch.device,
    boundary_tolerance: float | Sequence[float],
    progress: bool = False,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
    inspection: Inspection | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score the refined and the unrefined prediction from one pass of the network over the data set.

    Where a process group is initialised, each rank evaluates its share and all return the scores of the whole data set.

    Args:
        model: the model on `device`; its mode (training or evaluation) is the same afterwards.
        dataset: images and their labels, of the same size.
        config: views and refinement.
        device: device of the model.
        boundary_tolerance: distance in pixels within which a boundary counts as found; or several, of which the first
            is that of `boundary_f` and `class_boundary_f`.
        progress: whether to show a progress bar.
        workers: number of processes that read the data; 0 reads in this process.
        on_bad_sample: `"error"` raises for an image or label that cannot be read, `"skip"` leaves its image out.
        inspection: counts what an evaluation shows besides its scores, of the refined prediction; None counts nothing.
        should_stop: asked before each image; where it is true, the rest is left out, and the scores are of no use.

    Returns:
        A dictionary. Shares from 0 to 1, NaN where there is nothing to divide by: `mIoU`, `pixAcc`, `boundary_f`,
        `boundary_iou` (`BoundaryIoU`), of further tolerances `boundary_f_1px` and so on, all of these ending in
        `_unrefined` too, and `mean_accuracy`. One value per class:
        `iou`, `accuracy`, `class_boundary_f`, `class_boundary_iou` and `share` (of the pixels that are not ignored).
        The rest: `dataset`, its description; `left_out`, the names of the classes that have no IoU
        (`ConfusionMatrix.scores`); `boundary_tolerance`; `images`, the number of images; `skipped`, how many more were
        left out; `images_per_s`, reading and scoring included.

    Raises:
        ValueError: the model and the data set have different classes, or the data set is empty or has no labels.
        FloatingPointError: a prediction holds NaN.
        DatasetError: a file of the data set breaks a rule; or, with `"skip"`, no image could be read.
        MemoryError: a CPU has too little memory to see an image whole.
    """
    check_classes(model, dataset)
    if not dataset.labelled:
        raise ValueError(
            f"{dataset.description}: this split has images without labels, and scores compare predictions with labels. "
            "Evaluate a split that has them (--split val), or segment the images with `python -m unept.predict`"
        )
    loader = evaluation_loader(
        dataset, distributed.rank(), distributed.world_size(), workers, on_bad_sample=on_bad_sample
    )
    tolerances = boundary_tolerance if isinstance(boundary_tolerance, Sequence) else (boundary_tolerance,)
    refined, unrefined = (PredictionMetrics(dataset, tolerances, device) for _ in range(2))
    has_nan = torch.zeros((), dtype=torch.bool, device=device)
    start = time.perf_counter()
    bar = tqdm(loader, desc="evaluate", unit="image", disable=None if progress else True, leave=False)
    for position, (image, labels) in enumerate(bar):
        if should_stop():
            break
        advice = (
            f"with an image of {labels.shape[2]}x{labels.shape[1]} pixels: --window 512 (window=512) sees it in parts"
        )
        require_memory_for_images(labels.shape, config, device, advice)
        image, labels = image.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        output = infer(model, image, config)
        has_nan |= output.scores.isnan().any()
        size = labels.shape[1:]
        if inspection is None:
            ids = class_ids(output, size, config.refinement)
        else:
            ids, confidence = read_prediction(output, size, config)
            index = distributed.rank() + (position + loader.skipped) * distributed.world_size()
            inspection.update(index, ids, confidence, labels)
        refined.update(ids, labels)
        unrefined.update(class_ids(output, size, None), labels)
    if distributed.sum_over_ranks(int(has_nan), device):
        raise_not_a_number()
    if distributed.world_size() > 1:
        refined.all_reduce()
        unrefined.all_reduce()
        if inspection is not None:
            inspection.all_reduce()
    skipped = distributed.sum_over_ranks(loader.skipped, device)
    if skipped == len(dataset):
        raise DatasetError(f"none of the {skipped} images can be read: restore the files that are named above")
    images = len(dataset) - skipped
    return {
        "dataset": dataset.description,
        **_summarize(refined, unrefined, dataset.classes),
        "boundary_tolerance": tolerances[0],
        "images": images,
        "skipped": skipped,
        "images_per_s": images / (time.perf_counter() - start),
    }


def _summarize(refined: PredictionMetrics, unrefined: PredictionMetrics, classes: Sequence[str]) -> dict[str, Any]:
    """Return the scores by the names that `evaluate_model` documents."""
    regions = refined.regions.scores()
    true_pixels = refined.regions.matrix.sum(1)
    return {
        **refined.means(),
        **{f"{name}_unrefined": mean for name, mean in unrefined.means().items()},
        "mean_accuracy": regions.mean_accuracy,
        "iou": list(regions.iou),
        "accuracy": list(regions.accuracy),
        "class_boundary_f": list(refined.boundaries.scores().f),
        "class_boundary_iou": list(refined.bands.scores().iou),
        "share": (true_pixels / true_pixels.sum()).tolist(),
        "left_out": [name for name, iou in zip(classes, regions.iou, strict=True) if math.isnan(iou)],
    }


def check_classes(model: SegmentationModel, dataset: SegmentationDataset) -> None:
    """Raise ValueError if a model does not predict the classes of a data set, or the data set is empty.

    A model without class names of its own ("class 0", "class 1", ...) only needs their number.
    """
    if model.num_classes != len(dataset.classes):
        raise ValueError(
            f"the model predicts {model.num_classes} classes, but the data set has {len(dataset.classes)}: "
            "evaluate it on data with the class list it was trained with, or train a model on this data"
        )
    different = [(a, b) for a, b in zip(model.classes, dataset.classes, strict=True) if a != b]
    if different and not all(name == f"class {k}" for k, name in enumerate(model.classes)):
        raise ValueError(
            f"the model's classes are not those of the data set: its {different[0][0]!r} stands where the data set has "
            f"{different[0][1]!r}. Give the class list that the model was trained with, in the same order"
        )
    if not len(dataset):
        raise ValueError("the data set holds no image: check its root folder and the split")


def format_table(scores: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Format the scores of `evaluate_model` as an aligned table with one line per class, in percent, and a summary."""
    width = max(len("class"), *(len(name) for name in classes))
    header = f"{'class':{width}}  {'IoU':>6}  {'accuracy':>8}  {'boundary F':>10}  {'boundary IoU':>12}  {'pixels':>6}"
    columns = ("iou", "accuracy", "class_boundary_f", "class_boundary_iou", "share")
    lines = [header, "-" * len(header)]
    for name, *values in zip(classes, *(scores[column] for column in columns), strict=True):
        numbers = [f"{_percent(value):>{n}}" for value, n in zip(values, (6, 8, 10, 12, 6), strict=True)]
        lines.append("  ".join([f"{name:{width}}", *numbers]))
    lines.append("-" * len(header))
    means = mean_scores(scores)
    width = max(len(label) for label, _ in means)
    lines.append(f"{'':{width}}  {'refined':>10}  {'unrefined':>10}")
    for label, key in means:
        pair = f"{_percent(scores[key]):>10}  {_percent(scores[key + '_unrefined']):>10}"
        lines.append(f"{label:{width}}  {pair}")
    skipped = f" ({scores['skipped']} more left out because they cannot be read)" if scores["skipped"] else ""
    lines.append(
        f"{scores['dataset']}. All in percent; boundary F within {scores['boundary_tolerance']} px, "
        "boundary IoU within 2 % of the diagonal; "
        f"{scores['images']} images{skipped}, {scores['images_per_s']:.1f} images/s."
    )
    if left_out := scores["left_out"]:
        lines.append(
            f"mIoU leaves out {len(left_out)} of {len(classes)} classes, found neither in the labels nor in the "
            "predictions; one that is only predicted counts as 0."
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"
