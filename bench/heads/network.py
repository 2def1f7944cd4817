"""A head on one of our backbones, as `Trainer` and `evaluate_model` use `UNEPT`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unept.model.backbone import Backbone
from unept.model.output import STRIDE, UNEPTOutput, padded_size

from ..compared import ComparedNetwork, crop, resize
from .anl import ANLHead
from .base import Head, HeadOutput, Points
from .ccnet import CCNetHead
from .dnlnet import DNLNetHead
from .encnet import EncNetHead
from .ocrnet import OCRNetHead
from .pointrend import PointRendHead
from .psanet import PSANetHead
from .setr import SETRNaiveHead, SETRProgressiveHead

HEADS: dict[str, type[Head]] = {
    "CCNet": CCNetHead,
    "OCRNet": OCRNetHead,
    "ANL": ANLHead,
    "DNLNet": DNLNetHead,
    "PSANet": PSANetHead,
    "EncNet": EncNetHead,
    "PointRend": PointRendHead,
    "SETR naive": SETRNaiveHead,
    "SETR PUP": SETRProgressiveHead,
}


class HeadNetwork(ComparedNetwork):
    """A backbone and a head.

    Args:
        head: a class of `HEADS`.
        classes: names of the K classes.
        palette: an (r, g, b) per class.
        backbone: `unept.model.backbone.Backbone`, or a module with its attributes.
        fuse: concatenate all feature maps, resized to the finest, into one (HRNet).
        options: further arguments of the head.
    """

    def __init__(
        self,
        head: type[Head],
        classes: Sequence[str],
        palette: Sequence[Any],
        backbone: nn.Module,
        *,
        fuse: bool = False,
        **options: Any,
    ):
        of: Any = backbone
        divisor = math.lcm(STRIDE, *of.strides)
        super().__init__(classes, palette, mean=of.mean, std=of.std, divisor=divisor)
        self.backbone: Any = backbone
        self.fuse = fuse
        self.head = head([sum(of.channels)] if fuse else of.channels, len(classes), **options)

    def forward(self, images: Tensor) -> UNEPTOutput | HeadOutput:
        """Predict class logits at 1/8 of the image or finer.

        Args:
            images: as `UNEPT.forward` takes them.

        Returns:
            In evaluation mode a `UNEPTOutput` without boundary and direction; in training mode a `HeadOutput`.
        """
        size, padded = padded_size(images.shape[2:]), self.pad(images)
        features = self.backbone(padded)
        if self.fuse:
            features = [torch.cat([resize(x, features[0].shape[2:]) for x in features], dim=1)]
        output, full = self.head(features), padded.shape[2:]
        logits = crop(output.logits, full, size)
        if not self.training:
            return UNEPTOutput(logits, None, None, size[0] // logits.shape[2])
        points = output.points
        if points is not None:  # from the padded image to the labels; some of them lie outside
            scale = points.coordinates.new_tensor([full[1] / size[1], full[0] / size[0]])
            points = Points(points.coordinates * scale, points.logits)
        return HeadOutput(logits, tuple(crop(x, full, size) for x in output.auxiliary), points, output.presence)


def build_network(
    name: str,
    classes: Sequence[str],
    palette: Sequence[Any],
    backbone: str,
    *,
    output_stride: int | None = None,
    pretrained: bool = False,
    weights: str | Path | None = None,
    **options: Any,
) -> HeadNetwork:
    """Build a network of `HEADS` on a backbone of timm.

    Args:
        name: name of the head.
        classes: names of the K classes.
        palette: an (r, g, b) per class.
        backbone: timm's name of the backbone.
        output_stride: see `Backbone`.
        pretrained: see `Backbone`.
        weights: see `Backbone`.
        options: further arguments of the head.

    Raises:
        ValueError: there is no head of this name, or see `Backbone`.
    """
    if name not in HEADS:
        raise ValueError(f"there is no head {name!r}; there are {', '.join(HEADS)}")
    head = HEADS[name]
    features = Backbone(
        backbone, num_levels=head.num_levels, output_stride=output_stride, pretrained=pretrained, weights=weights
    )
    return HeadNetwork(head, classes, palette, features, **options)
