"""Pictures: label maps in colour, panels of samples, training curves, bars of classes.

Letters: H, W height and width, K number of classes. A palette holds an (r, g, b) for each class, 0..255. Ids from 0 to
K - 1 are classes; any other (ignored) is black.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

Palette = Sequence[Sequence[int]]
DPI = 120
COLUMN = 3.2  # inches, of a panel


class Sample(NamedTuple):
    """One row of `sample_panel`: an image and what the network makes of it. Tensors on any device."""

    name: str
    """Shown beside the row."""
    image: Tensor
    """(3, H, W) uint8, RGB."""
    truth: Tensor
    """(H, W) class ids, as the next two."""
    prediction: Tensor
    """Without refinement."""
    refined: Tensor | None
    """With refinement; None for a model without boundary head."""
    boundary: Tensor | None
    """(H, W) probability of a boundary; None likewise."""


def colorize(ids: Tensor, palette: Palette) -> Tensor:
    """Class ids (H, W), any integer dtype, to their colours (3, H, W) uint8."""
    table = torch.zeros(len(palette) + 1, 3, dtype=torch.uint8, device=ids.device)
    table[:-1] = torch.tensor(palette, dtype=torch.uint8, device=ids.device)
    known = (ids >= 0) & (ids < len(palette))
    return table[torch.where(known, ids.long(), len(palette))].permute(2, 0, 1)


def overlay(image: Tensor, ids: Tensor, palette: Palette, alpha: float = 0.5) -> Tensor:
    """An image (3, H, W) uint8 mixed with the colours of its class ids (H, W), of weight alpha; ignored pixels stay."""
    known = (ids >= 0) & (ids < len(palette))
    mixed = image.float().lerp(colorize(ids, palette).float(), alpha).round().to(torch.uint8)
    return torch.where(known, mixed, image)


def save_image(picture: Tensor, path: Path) -> None:
    """Write a picture (3, H, W) uint8; the suffix of `path` says as what."""
    Image.fromarray(_pixels(picture)).save(path)


def save_palette_png(ids: Tensor, palette: Palette, path: Path) -> None:
    """Write class ids (H, W) as a PNG whose pixels are the ids (mode P) and whose palette shows them in colour.

    Raises:
        ValueError: an id that does not fit into 8 bits.
    """
    if ids.numel() and (ids.min() < 0 or ids.max() > 255):
        raise ValueError(f"ids go from {int(ids.min())} to {int(ids.max())}; a palette PNG holds 0 to 255")
    picture = Image.fromarray(ids.to("cpu", torch.uint8).numpy())
    colors = torch.zeros(256, 3, dtype=torch.uint8)  # all 256: for a shorter palette PIL writes fewer bits a pixel
    colors[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    picture.putpalette(colors.numpy().tobytes())
    picture.save(path)


def sample_panel(samples: Sequence[Sample], classes: Sequence[str], palette: Palette, path: Path) -> None:
    """One picture of all samples, a row each: image, truth, prediction, refined, boundary; a legend of their classes.

    Columns that no sample has (refined and boundary of a model without a spatial branch) are left out.
    """
    rows = [_pictures(sample, palette) for sample in samples]
    columns = list(rows[0])
    ratio = max(sample.image.shape[1] / sample.image.shape[2] for sample in samples)
    width = COLUMN * len(columns)
    figure = Figure(figsize=(width, COLUMN * ratio * len(rows) + 1), dpi=DPI, layout="compressed")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, row, sample in zip(axes, rows, samples, strict=True):
        for axis, column in zip(axes_row, columns, strict=True):
            enlarged = row[column].shape[1] < COLUMN * DPI  # then keep the pixels visible
            axis.imshow(row[column], interpolation="nearest" if enlarged else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes_row[0].set_ylabel(sample.name, fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=11)
    ids = torch.cat([ids.flatten().cpu() for sample in samples for ids in (sample.truth, sample.prediction)]).unique()
    patches = [Patch(color=np.array(palette[k]) / 255, label=classes[k]) for k in ids.tolist() if k < len(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=int(width / 1.7), fontsize=9, frameon=False)
    figure.savefig(path, bbox_inches="tight")


def curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the lines of metrics.jsonl: the loss and its terms, the scores of the evaluations, and the learning rate.

    Args:
        lines: training lines have `step`, `loss`, `lr` and terms of the loss; evaluation lines `step` and `mIoU`.
        path: of the picture.
    """
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "mIoU" in line]
    figure = Figure(figsize=(13, 4), dpi=DPI, layout="constrained")
    losses, scores, rates = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    for name in ("loss", "segmentation", "refined", "boundary", "direction"):
        _line(losses, training, name, linewidth=2 if name == "loss" else 1)
    losses.set(title="loss and its unweighted terms", yscale="log")
    dashed = {"linestyle": "--", "alpha": 0.6}
    for color, name in zip(("C0", "C1", "C2"), ("mIoU", "pixAcc", "boundary_f"), strict=True):
        _line(scores, evaluations, name, color=color, marker="o", markersize=4)
        _line(scores, evaluations, f"{name}_unrefined", color=color, **dashed)
    scores.set(title="validation", ylim=(0, 1))
    scores.yaxis.set_major_formatter("{x:.0%}")
    _line(rates, training, "lr", color="C4")
    rates.set(title="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", scilimits=(0, 0))
    for axis in (losses, scores, rates):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis is not rates and axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path)


def class_bars(scores: Mapping[str, Any], classes: Sequence[str], path: Path) -> None:
    """Draw the IoU of every class as a bar, best first, and their mean as a line.

    Args:
        scores: `iou` of the K classes, NaN where a class does not occur, and `mIoU`, as `evaluate_model` gives them.
        classes: K names.
        path: of the picture.
    """
    ranked = sorted((iou, name) for iou, name in zip(scores["iou"], classes, strict=True) if not math.isnan(iou))
    figure = Figure(figsize=(7, 1.1 + 0.26 * len(ranked)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    bars = axis.barh([name for _, name in ranked], [iou for iou, _ in ranked], color="C0")
    axis.bar_label(bars, fmt="{:.1%}", padding=3, fontsize=8, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5})
    axis.axvline(scores["mIoU"], color="C3", linestyle="--", label=f"mIoU {scores['mIoU']:.1%}")
    axis.set(xlim=(0, 1.08), ylim=(-0.6, len(ranked) - 0.4), xlabel="IoU")
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    figure.savefig(path)


def _line(axis: Any, lines: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=name.replace("_", " ").replace("boundary f", "boundary F"), **style)


def _pictures(sample: Sample, palette: Palette) -> dict[str, np.ndarray]:
    """The row's pictures (H, W, 3) by caption."""
    pictures = {"image": sample.image} | {
        name: colorize(ids, palette)
        for name, ids in (("truth", sample.truth), ("prediction", sample.prediction), ("refined", sample.refined))
        if ids is not None
    }
    if sample.boundary is not None:
        pictures["boundary"] = (sample.boundary * 255).round().to(torch.uint8).expand(3, -1, -1)
    return {name: _pixels(picture) for name, picture in pictures.items()}


def _pixels(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).contiguous().cpu().numpy()
