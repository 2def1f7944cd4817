"""Pictures: label maps in colour, panels of samples, sampled points, training curves, bars of classes.

Letters: H, W height and width, K number of classes. A palette holds an (r, g, b) for each class, 0..255. Ids from 0 to
K - 1 are classes; any other (ignored) is black.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
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
    truth: Tensor | None
    """(H, W) class ids, as the next two; None where it is not known."""
    prediction: Tensor
    """Without refinement."""
    refined: Tensor | None
    """With refinement; None for a model without boundary head."""
    boundary: Tensor | None
    """(H, W) probability of a boundary; None likewise."""


class SampledPoints(NamedTuple):
    """Where one query of a sparse sampling attention reads, M heads, L levels, N points. Tensors on the CPU."""

    query: tuple[float, float]
    """(x, y) of the query in pixels of the image."""
    xy: Tensor
    """(M, L, N, 2): (x, y) of the points in pixels of the image, pixel centres at integers."""
    weights: Tensor
    """(M, L, N): attention weights; those of a head sum to 1."""
    inside: Tensor
    """(M, L, N) bool: whether a point reads any pixel of its map; one that does not counts as zero."""
    shapes: list[tuple[int, int]]
    """(H_l, W_l) of the maps."""
    covered: tuple[float, float]
    """(height, width) in pixels of the image that each map covers from the upper left corner, padding included."""


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
    _sample_figure(samples, classes, palette)[0].savefig(path, bbox_inches="tight")


def refinement_panel(
    sample: Sample, window: tuple[int, int, int, int], classes: Sequence[str], palette: Palette, path: Path
) -> None:
    """The sample whole and, below it, a window of it enlarged: (top, left, height, width) in pixels (Fig. 3, 4)."""
    top, left, height, width = window
    rows, columns = slice(top, top + height), slice(left, left + width)
    maps = (None if m is None else m[..., rows, columns] for m in sample[1:])
    figure, axes = _sample_figure([sample, Sample("enlarged", *maps)], classes, palette)
    for axis in axes[0]:
        for color, linewidth in (("black", 3), ("white", 1.5)):  # seen on dark and on light pictures
            frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=color, linewidth=linewidth)
            axis.add_patch(frame)
    figure.savefig(path, bbox_inches="tight")


def _sample_figure(samples: Sequence[Sample], classes: Sequence[str], palette: Palette) -> tuple[Figure, np.ndarray]:
    """The figure of `sample_panel` and its axes, a row for each sample."""
    rows = [_pictures(sample, palette) for sample in samples]
    columns = list(rows[0])
    ratio = max(sample.image.shape[1] / sample.image.shape[2] for sample in samples)
    width = COLUMN * len(columns)
    figure = Figure(figsize=(width, COLUMN * ratio * len(rows) + 1), dpi=DPI, layout="compressed")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, row, sample in zip(axes, rows, samples, strict=True):
        for axis, column in zip(axes_row, columns, strict=True):
            _show(axis, row[column])
        axes_row[0].set_ylabel(sample.name, fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=11)
    shown = [ids.flatten().cpu() for sample in samples for ids in (sample.truth, sample.prediction) if ids is not None]
    ids = torch.cat(shown).unique().tolist()
    patches = [Patch(color=np.array(palette[k]) / 255, label=classes[k]) for k in ids if k < len(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=int(width / 1.7), fontsize=9, frameon=False)
    return figure, axes


def picture_row(pictures: Mapping[str, Tensor], path: Path, star: tuple[float, float] | None = None) -> None:
    """Pictures (3, H, W) uint8 of one size side by side under their captions.

    Args:
        pictures: by caption.
        path: of the picture.
        star: (x, y) in pixels, marked on each.
    """
    height, width = next(iter(pictures.values())).shape[1:]
    size = (COLUMN * len(pictures), COLUMN * height / width + 0.6)
    figure = Figure(figsize=size, dpi=DPI, layout="compressed")
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (caption, picture) in zip(axes, pictures.items(), strict=True):
        _show(axis, _pixels(picture))
        axis.set_title(caption, fontsize=9)
        if star is not None:
            _star(axis, star)
    figure.savefig(path, bbox_inches="tight")


def heat(values: Tensor, image: Tensor, alpha: float = 0.65) -> Tensor:
    """Values (H, W) in colour, dark to bright from 0.5 % to 99.5 % of them, over an image (3, H, W) uint8."""
    low, high = np.quantile(values.cpu().numpy(), (0.005, 0.995))
    share = (values.cpu().numpy() - low) / max(high - low, 1e-12)
    colors = torch.from_numpy(colormaps["inferno"](share.clip(0, 1), bytes=True)[..., :3]).permute(2, 0, 1)
    return image.cpu().float().lerp(colors.float(), alpha).round().to(torch.uint8)


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


def sampled_points(points: SampledPoints, image: Tensor, caption: str, path: Path) -> None:
    """The points that one query reads, a column for each level: coloured by weight above, by head below (Fig. 7).

    A point's area grows with its weight. The frame is the map's, padding included; points that lie wholly outside of
    it, which count as zero, are drawn as crosses where they are nearest to it.

    Args:
        points: of the query.
        image: (3, H, W) uint8.
        caption: above the picture.
        path: of the picture.
    """
    num_heads, num_levels, num_points = points.weights.shape
    height, width = points.covered
    figure = Figure(figsize=(4.2 * num_levels + 1, 8.4 * height / width + 1.2), dpi=DPI, layout="compressed")
    axes = figure.subplots(2, num_levels, squeeze=False)
    picture = _pixels(image.float().lerp(torch.full_like(image, 255, dtype=torch.float32), 0.45).to(torch.uint8))
    count = 10 if num_heads <= 10 else 20  # colours
    heads = (torch.arange(num_heads) % count)[:, None].expand(-1, num_points)
    colors = {"weight": ("viridis", 0.0, float(points.weights.max())), "head": (f"tab{count}", -0.5, count - 0.5)}
    for row, (what, (cmap, low, high)) in zip(axes, colors.items(), strict=True):
        for level, axis in enumerate(row):
            value = points.weights[:, level] if what == "weight" else heads
            axis.imshow(picture)
            drawn = _scatter(axis, points, level, value, cmap=cmap, vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), facecolor="0.85")
            _star(axis, points.query, filled=False)  # hides no point
        if what == "weight":
            figure.colorbar(drawn, ax=row, label="weight", shrink=0.9, pad=0.01)
    for level, axis in enumerate(axes[0]):
        rows, columns = points.shapes[level]
        share = float(points.weights[:, level].sum() / num_heads)
        outside = int((~points.inside[:, level]).sum())
        note = f", {outside} outside (x)" if outside else ""
        axis.set_title(f"scale {level + 1} ({rows}x{columns}): {share:.0%} of the weight{note}", fontsize=9)
    dots = [colormaps[f"tab{count}"](m % count) for m in range(num_heads)]
    marks = [
        Line2D([], [], color=color, marker="o", linestyle="", label=f"head {m}")
        for m, color in enumerate(dots, start=1)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4 * num_levels, fontsize=9, frameon=False)
    figure.suptitle(caption, fontsize=11)
    figure.savefig(path, bbox_inches="tight")


def _scatter(axis: Any, points: SampledPoints, level: int, value: Tensor, **colors: Any) -> Any:
    """Draw the points of a level, coloured by `value` (M, N); gives what a colour bar needs."""
    height, width = points.covered
    xy = torch.minimum(points.xy[:, level].clamp_min(-0.5), torch.tensor([width - 0.5, height - 0.5]))
    # An even weighting, 1 / (L N) each, gives marks of 22 square points.
    area = 22 * points.weights[:, level] * points.weights[0].numel()
    for marker, chosen in (("x", ~points.inside[:, level]), ("o", points.inside[:, level])):
        x, y = xy[chosen].unbind(-1)
        edge = {"edgecolors": "black", "linewidths": 0.4} if marker == "o" else {"linewidths": 1.4}
        drawn = axis.scatter(
            x, y, s=area[chosen].clamp(9, 200), c=value[chosen], marker=marker, clip_on=False, **edge, **colors
        )
    return drawn


def _star(axis: Any, xy: tuple[float, float], filled: bool = True) -> None:
    for color, width in (("black", 3.5), ("lime", 1.5)):
        face = "lime" if filled else "none"
        axis.plot(*xy, marker="*", markersize=15, markerfacecolor=face, markeredgecolor=color, markeredgewidth=width)


def class_comparison(
    rows: Sequence[tuple[str, float, float]], labels: tuple[str, str], means: tuple[float, float], path: Path
) -> None:
    """IoU of classes of two runs as pairs of bars, in the order given, with the difference beside them (Fig. 8).

    Args:
        rows: of each class its name and the two IoU, from 0 to 1.
        labels: names of the two runs.
        means: their mIoU over all classes.
        path: of the picture.
    """
    figure = Figure(figsize=(7.5, 1.4 + 0.42 * len(rows)), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    at = np.arange(len(rows))
    for i in range(2):
        label = f"{labels[i]} (mIoU {means[i]:.1%})"
        axis.barh(at + 0.4 * i - 0.2, [row[1 + i] for row in rows], 0.38, color=f"C{i}", label=label)
    for y, (_, first, second) in enumerate(rows):
        axis.text(max(first, second) + 0.01, y, f"{100 * (first - second):+.1f}", va="center", fontsize=8)
    axis.set_yticks(at, [row[0] for row in rows])
    axis.set(xlim=(0, 1.1), ylim=(len(rows) - 0.4, -0.6), xlabel="IoU; beside the bars the difference in points")
    axis.set_xticks(np.linspace(0, 1, 6))
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", fontsize=9, frameon=False)
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


def _show(axis: Any, picture: np.ndarray) -> None:
    """A picture (H, W, 3) without frame and ticks; an enlarged one keeps its pixels visible."""
    axis.imshow(picture, interpolation="nearest" if picture.shape[1] < COLUMN * DPI else "antialiased")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _pixels(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).contiguous().cpu().numpy()
