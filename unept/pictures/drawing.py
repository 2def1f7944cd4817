"""Pictures drawn with matplotlib: panels of samples, sampled points, training curves, bars per class.

Only this module and `charts` import matplotlib. A `path` is the file that a function writes; its suffix says in which
format. Letters: H, W height and width, K number of classes, M heads, L levels, N points. Palettes are as in
`unept.colors`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from torch import Tensor

from ..colors import Palette, colorize
from ..files import temporary_file
from .recording import SampledPoints

DPI = 120
COLUMN = 3.2  # width of a panel's column in inches
MAX_RATIO = 6  # height of a panel's row as a multiple of its width; taller images are drawn narrower


class Sample(NamedTuple):
    """One row of `sample_panel`: an image and its predictions. Tensors may be on any device."""

    name: str
    """The label beside the row."""
    image: Tensor
    """uint8 (3, H, W), RGB."""
    truth: Tensor | None
    """(H, W), the true class ids; None where they are not known."""
    prediction: Tensor
    """(H, W), the class ids predicted without refinement."""
    refined: Tensor | None
    """(H, W), the class ids predicted with refinement; None for a model without a boundary head."""
    boundary: Tensor | None
    """(H, W), the probability of a boundary; None for a model without a boundary head."""


def sample_panel(samples: Sequence[Sample], classes: Sequence[str], palette: Palette, path: Path) -> None:
    """Draw a row per sample (image, truth, prediction, refined, boundary) and a legend of the classes in them.

    Columns that no sample has (refined and boundary of a model without a spatial branch) are left out.
    """
    save_figure(_sample_figure(samples, classes, palette)[0], path, bbox_inches="tight")


def refinement_panel(
    sample: Sample, window: tuple[int, int, int, int], classes: Sequence[str], palette: Palette, path: Path
) -> None:
    """Draw a sample and, below it, an enlarged window of it, (top, left, height, width) in pixels (Fig. 3, 4)."""
    top, left, height, width = window
    rows, columns = slice(top, top + height), slice(left, left + width)
    maps = (None if m is None else m[..., rows, columns] for m in sample[1:])
    figure, axes = _sample_figure([sample, Sample("enlarged", *maps)], classes, palette)
    _frame(axes[0], window)
    save_figure(figure, path, bbox_inches="tight")


def prediction_panel(
    name: str,
    image: Tensor,
    truth: Tensor | None,
    predictions: Mapping[str, Tensor],
    window: tuple[int, int, int, int],
    classes: Sequence[str],
    palette: Palette,
    path: Path,
) -> None:
    """Draw an image, its truth and several predictions; an enlarged window; and the errors of each (Fig. 1, 3).

    Args:
        name: the label of the first row.
        image: uint8 (3, H, W).
        truth: the class ids (H, W), 255 where they are ignored; without it no errors are drawn.
        predictions: the class ids (H, W) by the names of the models.
        window: what to enlarge, (top, left, height, width) in pixels.
        classes: the class names.
        palette: their colors.
        path: the file to write.
    """
    top, left, height, width = window
    ids = {**({} if truth is None else {"truth": truth.cpu()}), **{n: p.cpu() for n, p in predictions.items()}}
    pictures = {"image": image.cpu(), **{label: colorize(of, palette) for label, of in ids.items()}}
    rows = {name: pictures, "enlarged": {n: p[:, top : top + height, left : left + width] for n, p in pictures.items()}}
    if truth is not None:
        rows["wrong (red)"] = {label: error_map(ids[label], ids["truth"]) for label in predictions}
    size = (COLUMN * len(pictures), COLUMN * _ratio(*image.shape[1:]) * len(rows) + 1)
    figure = Figure(figsize=size, dpi=DPI, layout="compressed")
    axes = figure.subplots(len(rows), len(pictures), squeeze=False)
    for axes_row, (label, row) in zip(axes, rows.items(), strict=True):
        for axis, column in zip(axes_row, pictures, strict=True):
            if column in row:
                _show_picture(axis, _to_array(row[column]))
            else:
                axis.set_axis_off()
        shown = next(axis for axis, column in zip(axes_row, pictures, strict=True) if column in row)
        shown.set_ylabel(label, fontsize=8)
    for axis, column in zip(axes[0], pictures, strict=True):
        axis.set_title(column, fontsize=11)
    _frame(axes[0], window)
    _class_legend(figure, list(ids.values()), classes, palette)
    save_figure(figure, path, bbox_inches="tight")


def error_map(ids: Tensor, truth: Tensor, ignore_index: int = 255) -> Tensor:
    """Where class ids (H, W) differ from the truth: uint8 (3, H, W), red if wrong, light if right, dark if ignored."""
    colors = torch.tensor([[235, 235, 235], [214, 39, 40], [90, 90, 90]], dtype=torch.uint8)
    kind = (ids != truth).long().masked_fill(truth == ignore_index, 2)
    return colors[kind].permute(2, 0, 1)


def _frame(axes: Iterable[Any], window: tuple[int, int, int, int]) -> None:
    """Frame a window (top, left, height, width) in pictures, visible on dark and on light ones."""
    top, left, height, width = window
    for axis in axes:
        for color, linewidth in (("black", 3), ("white", 1.5)):
            frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=color, linewidth=linewidth)
            axis.add_patch(frame)


def _class_legend(figure: Figure, maps: Sequence[Tensor], classes: Sequence[str], palette: Palette) -> None:
    """Name the classes that occur in maps of class ids below the pictures."""
    ids = torch.cat([ids.flatten().cpu() for ids in maps]).unique().tolist()
    patches = [Patch(color=np.array(palette[k]) / 255, label=classes[k]) for k in ids if k < len(classes)]
    columns = int(figure.get_figwidth() / 1.7)
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _sample_figure(samples: Sequence[Sample], classes: Sequence[str], palette: Palette) -> tuple[Figure, np.ndarray]:
    """The figure of `sample_panel` and its axes, one row per sample."""
    rows = [_columns(sample, palette) for sample in samples]
    columns = list(rows[0])
    ratio = max(_ratio(*sample.image.shape[1:]) for sample in samples)
    width = COLUMN * len(columns)
    figure = Figure(figsize=(width, COLUMN * ratio * len(rows) + 1), dpi=DPI, layout="compressed")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, row, sample in zip(axes, rows, samples, strict=True):
        for axis, column in zip(axes_row, columns, strict=True):
            _show_picture(axis, row[column])
        axes_row[0].set_ylabel(sample.name, fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=11)
    predictions = (ids for sample in samples for ids in (sample.truth, sample.prediction, sample.refined))
    maps = [ids for ids in predictions if ids is not None]
    _class_legend(figure, maps, classes, palette)
    return figure, axes


def picture_row(pictures: Mapping[str, Tensor], path: Path, star: tuple[float, float] | None = None) -> None:
    """Draw pictures of the same size side by side under their captions.

    Args:
        pictures: uint8 (3, H, W) by caption.
        path: the file to write.
        star: a position (x, y) in pixels to mark on each picture; None marks nothing.
    """
    size = (COLUMN * len(pictures), COLUMN * _ratio(*next(iter(pictures.values())).shape[1:]) + 0.6)
    figure = Figure(figsize=size, dpi=DPI, layout="compressed")
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (caption, picture) in zip(axes, pictures.items(), strict=True):
        _show_picture(axis, _to_array(picture))
        axis.set_title(caption, fontsize=9)
        if star is not None:
            _mark_star(axis, star)
    save_figure(figure, path, bbox_inches="tight")


def heatmap(values: Tensor, image: Tensor, alpha: float = 0.65) -> Tensor:
    """Mix an image, uint8 (3, H, W), with values (H, W) as colors of weight alpha, dark to bright; uint8 (3, H, W).

    The colors span the values between the quantiles of 0.5 % and 99.5 %.
    """
    low, high = np.quantile(values.cpu().numpy(), (0.005, 0.995))
    share = (values.cpu().numpy() - low) / max(high - low, 1e-12)
    colors = torch.from_numpy(colormaps["inferno"](share.clip(0, 1), bytes=True)[..., :3]).permute(2, 0, 1)
    return image.cpu().float().lerp(colors.float(), alpha).round().to(torch.uint8)


def curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the lines of metrics.jsonl: the loss and its terms, the scores of the evaluations, and the learning rate.

    Args:
        lines: training lines have `step`, `loss`, `lr` and terms of the loss; evaluation lines have `step` and `mIoU`.
        path: the file to write.
    """
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "mIoU" in line]
    figure = Figure(figsize=(13, 4), dpi=DPI, layout="constrained")
    losses, scores, rates = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    for name in ("loss", "segmentation", "refined", "boundary", "direction", "dice", "lovasz"):
        _plot(losses, training, name, linewidth=2 if name == "loss" else 1)
    losses.set(title="loss and its unweighted terms", yscale="log")
    dashed = {"linestyle": "--", "alpha": 0.6}
    for color, name in zip(("C0", "C1", "C2"), ("mIoU", "pixAcc", "boundary_f"), strict=True):
        _plot(scores, evaluations, name, color=color, marker="o", markersize=4)
        _plot(scores, evaluations, f"{name}_unrefined", color=color, **dashed)
    scores.set(title="validation", ylim=(0, 1))
    scores.yaxis.set_major_formatter("{x:.0%}")
    _plot(rates, training, "lr", color="C4")
    rates.set(title="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", scilimits=(0, 0))
    for axis in (losses, scores, rates):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis is not rates and axis.lines:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    save_figure(figure, path)


def _plot(axis: Any, lines: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    """Plot the value `name` of the lines that have it over their step."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=name.replace("_", " ").replace("boundary f", "boundary F"), **style)


def class_bars(scores: Mapping[str, Any], classes: Sequence[str], path: Path) -> None:
    """Draw the IoU of every class as a bar, best first, and their mean as a line.

    Args:
        scores: `iou`, the IoU of the K classes with NaN for classes that do not occur, and `mIoU`; all from 0 to 1.
        classes: the K class names.
        path: the file to write.
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
    save_figure(figure, path)


def sampled_points(points: SampledPoints, image: Tensor, caption: str, path: Path) -> None:
    """Draw the points that one query reads, a column per level: colored by weight above, by head below (Fig. 7).

    A point's area grows with its weight. The frame is that of the map, padding included. Points wholly outside of it,
    which count as zero, are drawn as crosses at the nearest position of the frame.

    Args:
        points: the points of the query.
        image: uint8 (3, H, W).
        caption: the title of the picture.
        path: the file to write.
    """
    num_heads, num_levels, num_points = points.weights.shape
    figure = Figure(figsize=(4.2 * num_levels + 1, 8.4 * _ratio(*points.covered) + 1.2), dpi=DPI, layout="compressed")
    by_weight, by_head = figure.subplots(2, num_levels, squeeze=False)
    picture = _to_array(image.float().lerp(torch.full_like(image, 255, dtype=torch.float32), 0.45).to(torch.uint8))
    weight_colors = {"cmap": "viridis", "vmin": 0.0, "vmax": float(points.weights.max())}
    num_colors = 10 if num_heads <= 10 else 20
    head_colors = {"cmap": f"tab{num_colors}", "vmin": -0.5, "vmax": num_colors - 0.5}
    heads = (torch.arange(num_heads) % num_colors)[:, None].expand(-1, num_points)
    for level in range(num_levels):
        scatter = _scatter_level(by_weight[level], picture, points, level, points.weights[:, level], weight_colors)
        _scatter_level(by_head[level], picture, points, level, heads, head_colors)
        by_weight[level].set_title(_describe_level(points, level), fontsize=9)
    figure.colorbar(scatter, ax=by_weight, label="weight", shrink=0.9, pad=0.01)
    color_of = colormaps[f"tab{num_colors}"]
    marks = [
        Line2D([], [], color=color_of(m % num_colors), marker="o", linestyle="", label=f"head {m + 1}")
        for m in range(num_heads)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4 * num_levels, fontsize=9, frameon=False)
    figure.suptitle(caption, fontsize=11)
    save_figure(figure, path, bbox_inches="tight")


def _scatter_level(
    axis: Any, picture: np.ndarray, points: SampledPoints, level: int, value: Tensor, colors: dict[str, Any]
) -> Any:
    """Draw the points of a level over a picture (H, W, 3), colored by `value` (M, N).

    Returns:
        What matplotlib's color bar needs.
    """
    height, width = points.covered
    axis.imshow(picture)
    xy = torch.minimum(points.xy[:, level].clamp_min(-0.5), torch.tensor([width - 0.5, height - 0.5]))
    # Even weights of 1 / (L N) each give marks of 22 square points.
    area = 22 * points.weights[:, level] * points.weights[0].numel()
    in_bounds = points.in_bounds[:, level]
    for marker, mask in (("x", ~in_bounds), ("o", in_bounds)):
        x, y = xy[mask].unbind(-1)
        edge = {"edgecolors": "black", "linewidths": 0.4} if marker == "o" else {"linewidths": 1.4}
        size = area[mask].clamp(9, 200)
        scatter = axis.scatter(x, y, s=size, c=value[mask], marker=marker, clip_on=False, **edge, **colors)
    axis.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), facecolor="0.85")
    _mark_star(axis, points.query, filled=False)  # hides no point
    return scatter


def _describe_level(points: SampledPoints, level: int) -> str:
    """The size of a level's map, its share of the weight, and how many of its points lie outside."""
    rows, columns = points.shapes[level]
    share = float(points.weights[:, level].sum() / len(points.weights))
    outside = int((~points.in_bounds[:, level]).sum())
    note = f", {outside} outside (x)" if outside else ""
    return f"scale {level + 1} ({rows}x{columns}): {share:.0%} of the weight{note}"


def _mark_star(axis: Any, xy: tuple[float, float], filled: bool = True) -> None:
    """Mark a position (x, y) with a star that is visible on dark and on light pictures."""
    for color, width in (("black", 3.5), ("lime", 1.5)):
        face = "lime" if filled else "none"
        axis.plot(*xy, marker="*", markersize=15, markerfacecolor=face, markeredgecolor=color, markeredgewidth=width)


def class_comparison(
    rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], means: Sequence[float], path: Path
) -> None:
    """Draw the IoU per class of several runs as groups of bars, in the order given (Fig. 8).

    Beside each group stands how far the first run is ahead of the best of the others.

    Args:
        rows: per class its name and the IoU in each run, from 0 to 1.
        labels: the names of the runs.
        means: the mIoU of the runs over all classes.
        path: the file to write.
    """
    count = len(labels)
    figure = Figure(figsize=(7.5, 1.4 + 0.21 * count * len(rows)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    positions, thickness = np.arange(len(rows)), 0.8 / count
    for i, (label, mean) in enumerate(zip(labels, means, strict=True)):
        offset = thickness * (i - (count - 1) / 2)
        values = [iou[i] for _, iou in rows]
        axis.barh(positions + offset, values, 0.95 * thickness, color=f"C{i}", label=f"{label} (mIoU {mean:.1%})")
    for y, (_, iou) in enumerate(rows):
        axis.text(max(iou) + 0.01, y, f"{100 * (iou[0] - max(iou[1:])):+.1f}", va="center", fontsize=8)
    axis.set_yticks(positions, [row[0] for row in rows])
    axis.set(xlim=(0, 1.1), ylim=(len(rows) - 0.4, -0.6), xlabel="IoU; beside the bars the difference in points")
    axis.set_xticks(np.linspace(0, 1, 6))
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", fontsize=9, frameon=False)
    save_figure(figure, path)


def _columns(sample: Sample, palette: Palette) -> dict[str, np.ndarray]:
    """The pictures (H, W, 3) of a sample's row by caption."""
    pictures = {"image": sample.image} | {
        name: colorize(ids, palette)
        for name, ids in (("truth", sample.truth), ("prediction", sample.prediction), ("refined", sample.refined))
        if ids is not None
    }
    if sample.boundary is not None:
        pictures["boundary"] = (sample.boundary * 255).round().to(torch.uint8).expand(3, -1, -1)
    return {name: _to_array(picture) for name, picture in pictures.items()}


def _show_picture(axis: Any, picture: np.ndarray) -> None:
    """Show a picture (H, W, 3) without frame and ticks; the pixels of an enlarged one stay visible."""
    axis.imshow(picture, interpolation="nearest" if picture.shape[1] < COLUMN * DPI else "antialiased")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _ratio(height: float, width: float) -> float:
    """The height at which a picture of this size is drawn, as a multiple of its width."""
    return min(height / width, MAX_RATIO)


def _to_array(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).contiguous().cpu().numpy()


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as the suffix of the path says, whole or not at all.

    Names of files and classes may hold $, which is no formula; those of logarithmic axes are the only ones.
    """
    if not any("log" in (axes.get_xscale(), axes.get_yscale()) for axes in figure.axes):
        for text in figure.findobj(Text):
            text.set_parse_math(False)
    with temporary_file(path) as temporary:
        figure.savefig(temporary, **options)
