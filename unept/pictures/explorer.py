"""What `unept.demo` shows of an image: predictions before and after refinement, boundary, confidence, sampled points.

Letters: H, W height and width of the image. Pictures are uint8 (3, H, W), RGB, on the CPU.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..colors import overlay
from ..inference import InferenceConfig, infer, read_prediction
from ..model.finite import require_numbers
from ..model.network import UNEPT
from ..model.output import boundary_probability, class_ids
from . import charts, drawing
from .recording import record, sampling_layer


class Exploration(NamedTuple):
    """The pictures of an image."""

    unrefined: Tensor
    """The image mixed with its classes before refinement; the image itself for a model that does not refine."""
    refined: Tensor
    """The image mixed with its classes."""
    boundary: Tensor | None
    """The probability of a boundary as colors; None for a model without a spatial branch."""
    confidence: Tensor
    """The probability of the predicted class as colors."""
    ids: Tensor
    """(H, W) int64: the class ids after refinement."""
    changed: float
    """The share of the pixels that refinement changes, from 0 to 1."""


def explore(model: UNEPT, image: Tensor, config: InferenceConfig, alpha: float = 0.6) -> Exploration:
    """Segment an image and draw what the model says about it.

    Args:
        model: the network.
        image: uint8 (3, H, W) on any device.
        config: how images are seen and refined.
        alpha: the weight of the colors of the classes, from 0 to 1.
    """
    size = image.shape[1:]
    refines = replace(config, refine=model.refines)
    output = infer(model, image.to(model.mean.device), refines)
    require_numbers(output.scores)
    ids, confidence = (maps[0].cpu() for maps in read_prediction(output, size, refines))
    plain = class_ids(output, size, None)[0].cpu()
    image = image.cpu()
    boundary = boundary_probability(output, size)
    return Exploration(
        unrefined=overlay(image, plain, model.palette, alpha) if model.refines else image,
        refined=overlay(image, ids, model.palette, alpha),
        boundary=None if boundary is None else charts.probability_colors(boundary[0]),
        confidence=charts.probability_colors(confidence),
        ids=ids,
        changed=float((ids != plain).float().mean()),
    )


def draw_points(model: UNEPT, image: Tensor, config: InferenceConfig, query: tuple[float, float], path: Path) -> None:
    """Draw the points that the last cross-attention of the decoder reads for a pixel (Fig. 7).

    Args:
        model: the network.
        image: uint8 (3, H, W) on any device.
        config: how images are seen.
        query: (x, y) of the pixel.
        path: the file to write.

    Raises:
        NotInModel: the attention of the model samples no points (Table 8).
    """
    recording = record(model, image.to(model.mean.device), config, query, sampling_layer(model, "decoder", None))
    assert recording.points is not None
    caption = f"what the decoder reads for pixel ({query[0]:g}, {query[1]:g})"
    drawing.sampled_points(recording.points, image.cpu(), caption, path)
