"""The paper's figures: samples, models compared (Fig. 1, 3), refinement (Fig. 4), pyramid (Fig. 5), attention (Fig. 6).

Letters: H, W height and width of the image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..colors import as_rgb
from ..data import SegmentationDataset
from ..data.base import OnBadSample
from ..data.loader import read_sample, report_skipped
from ..evaluation.evaluator import check_classes
from ..evaluation.inspection import ImageScore
from ..inference import InferenceConfig, infer, predict_ids
from ..model.network import UNEPT
from ..model.output import DenseOutput, SegmentationModel, boundary_probability, class_ids
from . import drawing
from .recording import NotInModel, Recording, feature_colors, joint_attention, on_image

ZOOM = 4  # the enlarged window has 1 / ZOOM of the image's height and width


def make_sample(
    name: str, image: Tensor, truth: Tensor | None, output: DenseOutput, config: InferenceConfig
) -> drawing.Sample:
    """Collect what a panel shows of one image: its predictions with and without refinement, and its boundaries.

    Args:
        name: the label of the row.
        image: uint8 (C, H, W), on any device, shown by `as_rgb`.
        truth: the class ids (H, W), or None.
        output: the network's output for the image alone.
        config: how boundary pixels are refined; whether they are (`refine`) does not count.
    """
    size, image = (image.shape[1], image.shape[2]), as_rgb(image)
    plain = class_ids(output, size, None)[0]
    boundary = boundary_probability(output, size)
    if boundary is None:
        return drawing.Sample(name, image, truth, plain, None, None)
    refined = class_ids(output, size, replace(config, refine=True).refinement)[0]
    return drawing.Sample(name, image, truth, plain, refined, boundary[0])


def draw_samples(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    count: int,
    config: InferenceConfig,
    device: torch.device,
    path: Path,
    on_bad_sample: OnBadSample = "error",
) -> None:
    """Draw images spread evenly over the dataset, and what the model predicts for them (`drawing.sample_panel`).

    Args:
        model: the model on `device`.
        dataset: images and their labels.
        count: number of images; all of the dataset if it has fewer.
        config: views and refinement.
        device: device of the model.
        path: file of the picture.
        on_bad_sample: `"error"` raises for an image or label that cannot be read, `"skip"` draws the next one instead.

    Raises:
        ValueError: the model and the dataset have different classes, or the dataset is empty.
        DatasetError: a file of the dataset breaks a rule; or, with `"skip"`, no image could be read.
    """
    check_classes(model, dataset)
    count = min(count, len(dataset))
    samples = []
    for i in (n * len(dataset) // count for n in range(count)):
        i, pair, skipped = read_sample(dataset, i, on_bad_sample)
        report_skipped(skipped)
        image, labels = (tensor.as_subclass(Tensor) for tensor in pair)
        output = infer(model, image.to(device), config)
        samples.append(make_sample(dataset.name(i), image, labels, output, config))
    drawing.sample_panel(samples, dataset.classes, dataset.palette, path)


def draw_worst(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    images: Sequence[ImageScore],
    config: InferenceConfig,
    device: torch.device,
    path: Path,
) -> None:
    """Draw images with their truth and prediction under one another, each with its score (`drawing.sample_panel`).

    Args:
        model: the model on `device`.
        dataset: images and their labels.
        images: numbers of at least one image of the data set, and their scores.
        config: views and refinement.
        device: device of the model.
        path: file of the picture.

    Raises:
        DatasetError: a file of the dataset breaks a rule.
    """
    samples = []
    for score in images:
        image, labels = (tensor.as_subclass(Tensor) for tensor in dataset[score.index])
        output = infer(model, image.to(device), config)
        samples.append(
            make_sample(f"{dataset.name(score.index)}\nmIoU {score.mean_iou:.1%}", image, labels, output, config)
        )
    drawing.sample_panel(samples, dataset.classes, dataset.palette, path)


def most_different(first: Tensor, *others: Tensor) -> tuple[int, int, int, int]:
    """The window (top, left, height, width), 1/4 of (H, W) each way, in which most ids of some maps (H, W) differ.

    Of several such windows it is the one nearest to the centre; so the centre itself where the maps are the same.
    """
    height, width = (max(1, n // ZOOM) for n in first.shape)
    differ = torch.stack([first != other for other in others]).any(0).float()[None, None]
    counts = (F.avg_pool2d(differ, (height, width), stride=1)[0, 0] * height * width).round().cpu()
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in counts.shape)
    distance = (rows[:, None].square() + columns.square()).masked_fill(counts < counts.max(), torch.inf)
    top, left = divmod(int(distance.argmin()), counts.shape[1])
    return top, left, height, width


def draw_refinement(
    model: SegmentationModel, image: Tensor, output: DenseOutput, config: InferenceConfig, name: str, path: Path
) -> float:
    """Draw the predictions before and after refinement.

    Args:
        model: the network; only its classes and palette are used.
        image: uint8 (3, H, W).
        output: the network's output for the image alone.
        config: how boundary pixels are refined; whether they are (`refine`) does not count.
        name: the label of the picture.
        path: the file to write.

    Returns:
        The share of the pixels that refinement changes.

    Raises:
        NotInModel: if the network does not refine.
    """
    sample = make_sample(name, image, None, output, config)
    if sample.refined is None:
        raise NotInModel("no refinement picture: this network has no spatial branch, so it does not refine")
    window = most_different(sample.prediction, sample.refined)
    drawing.refinement_panel(sample, window, model.classes, model.palette, path)
    return float((sample.prediction != sample.refined).float().mean())


def draw_predictions(
    predictors: Mapping[str, tuple[SegmentationModel, InferenceConfig]],
    image: Tensor,
    truth: Tensor | None,
    name: str,
    path: Path,
) -> None:
    """Draw what models predict for an image, their errors, and an enlarged window where they differ most.

    A single model is compared with the truth.

    Args:
        predictors: each model and its views by its name, all with the same classes.
        image: uint8 (C, H, W), on the models' device, shown by `as_rgb`.
        truth: the class ids (H, W), or None.
        name: the label of the picture.
        path: the file to write.
    """
    predictions = {label: predict_ids(model, image, config)[0].cpu() for label, (model, config) in predictors.items()}
    model = next(iter(predictors.values()))[0]
    maps = list(predictions.values())
    if len(maps) == 1 and truth is not None:
        maps.append(truth.cpu())
    window = most_different(*maps)
    drawing.prediction_panel(name, as_rgb(image), truth, predictions, window, model.classes, model.palette, path)


def draw_pyramid(image: Tensor, recording: Recording, path: Path) -> None:
    """Draw the first three principal components of each level's features as colors, without the padding."""
    size = (image.shape[1], image.shape[2])
    pictures = {"image": image.cpu()}
    for level, feature in enumerate(recording.features, start=1):
        # The number of rows and columns that show any of the image.
        rows, columns = (
            min(n, int(-(-pixels * n // length)))
            for n, pixels, length in zip(feature.shape[1:], size, recording.covered, strict=True)
        )
        colors, share = feature_colors(feature[:, :rows, :columns])
        padding = (0, feature.shape[2] - columns, 0, feature.shape[1] - rows)
        picture = on_image(F.pad(colors, padding), recording.covered, size, mode="nearest")
        caption = f"scale {level}: {feature.shape[0]} channels, {rows}x{columns}\n{share:.0%} of the variance"
        pictures[caption] = (picture * 255).round().to(torch.uint8)
    drawing.picture_row(pictures, path)


def draw_attention(model: UNEPT, image: Tensor, recording: Recording, query: tuple[float, float], path: Path) -> None:
    """Draw the backbone's joint attention, that of the class token and that of the token at the query.

    The picture between them shows the image, darkened where the attention of the class token is below its mean.

    Raises:
        NotInModel: see `joint_attention`.
    """
    image = image.cpu()
    overall, at_query = (
        on_image(joint[None], recording.covered, image.shape[1:])[0]
        for joint in joint_attention(model, recording, query)
    )
    masked = torch.where(overall < overall.mean(), image // 8, image)
    pictures = {
        "image and query": image,
        "joint attention": drawing.heatmap(overall, image),
        "masked below its average": masked,
        "joint attention of the query": drawing.heatmap(at_query, image),
    }
    drawing.picture_row(pictures, path, star=query)
