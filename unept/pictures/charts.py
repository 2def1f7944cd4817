"""Charts of an evaluation, drawn with matplotlib: which classes are confused, and how sure the model may be.

A `path` is the file that a function writes. Letters: K number of classes, N number of bins.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluation.inspection import CalibrationScores
from .drawing import DPI, save_figure

MAX_NUMBERS = 30  # classes up to which each cell of the matrix shows its number


def confusion_matrix(matrix: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw which class the pixels of each true class are predicted as, in percent of the true class.

    Args:
        matrix: counts (K, K); rows are the truth, columns the prediction. Classes without true pixels have empty rows.
        classes: the K class names.
        path: the file to write.
    """
    counts = matrix.cpu().double().numpy()
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    num_classes = len(classes)
    side = max(4.5, min(0.42 * num_classes, 26))
    figure = Figure(figsize=(side + 2.4, side + 1.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_facecolor("0.9")
    size = max(3, min(9, 72 * 0.7 * side / num_classes))
    axis.set_xticks(range(num_classes), classes, rotation=90, fontsize=size)
    axis.set_yticks(range(num_classes), classes, fontsize=size)
    axis.set(xlabel="predicted class", ylabel="true class")
    for row, column in np.argwhere(np.nan_to_num(shares) >= 0.005) if num_classes <= MAX_NUMBERS else ():
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
    bar = figure.colorbar(shown, ax=axis, shrink=0.7, pad=0.02, format="{x:.0%}")
    bar.set_label("share of the true class")
    save_figure(figure, path)


def calibration_curve(scores: CalibrationScores, path: Path) -> None:
    """Draw the accuracy of the pixels over their confidence, and below it how many pixels each bin of confidence has.

    Args:
        scores: result of `unept.evaluation.inspection.Calibration.scores`, N bins of equal width.
        path: the file to write.
    """
    num_bins = len(scores.share)
    figure = Figure(figsize=(5.2, 6.2), dpi=DPI, layout="constrained")
    curve, pixels = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    curve.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="as sure as right")
    found = [(c, a) for c, a in zip(scores.confidence, scores.accuracy, strict=True) if not np.isnan(a)]
    if found:
        curve.plot(*zip(*found, strict=True), color="C0", marker="o", label="model")
    curve.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"expected calibration error {scores.ece:.1%}")
    curve.yaxis.set_major_formatter("{x:.0%}")
    curve.legend(loc="upper left", fontsize=9, frameon=False)
    edges = np.arange(num_bins) / num_bins
    pixels.bar(edges, scores.share, width=1 / num_bins, align="edge", color="C0", edgecolor="white")
    pixels.set(xlabel="confidence", ylabel="pixels")
    for axis in (pixels.xaxis, pixels.yaxis):
        axis.set_major_formatter("{x:.0%}")
    for axis in (curve, pixels):
        axis.grid(alpha=0.3)
    save_figure(figure, path)
