"""What all heads share: their output, the auxiliary classifier, resizing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unept.model.spatial import conv_bn_relu


class Points(NamedTuple):
    """Predictions at single points of the images."""

    coordinates: Tensor
    """(B, P, 2), (x, y) in [0, 1]."""
    logits: Tensor
    """(B, K, P)."""


class HeadOutput(NamedTuple):
    """What a head predicts. All but the logits are there in training only."""

    logits: Tensor
    """(B, K, h, w) at any resolution."""
    auxiliary: tuple[Tensor, ...] = ()
    """Logits (B, K, h, w) of auxiliary classifiers."""
    points: Points | None = None
    """Of PointRend: predictions at sampled points."""
    presence: Tensor | None = None
    """Of EncNet: (B, K), logits of whether the image holds each class."""


class Head(nn.Module):
    """Feature maps to classes.

    Args:
        channels: number of channels of each feature map, finest first.
        num_classes: K.

    Attributes:
        num_levels: number of feature maps that the head takes from a backbone.
        output_stride: of the ResNet that its paper puts it on.
    """

    num_levels = 2
    output_stride = 8

    def __init__(self, channels: Sequence[int], num_classes: int):
        super().__init__()
        self.channels, self.num_classes = list(channels), num_classes

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """Maps (B, C_l, H_l, W_l), finest first; auxiliary and point predictions are made in training mode only."""
        raise NotImplementedError


class AuxiliaryClassifier(nn.Sequential):
    """A 3x3 convolution and a classifier on an intermediate feature map: deep supervision (PSPNet, Sec. 3.3).

    Table 7 counts its parameters, as the programs do that its numbers come from; without it CCNet has 67 M, not 69.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 256):
        super().__init__(conv_bn_relu(in_channels, hidden, 3), nn.Dropout2d(0.1), nn.Conv2d(hidden, num_classes, 1))


class ContextHead(Head):
    """Reduce C5 to 512 channels, let a block add context, concatenate both and classify: CCNet's and DNLNet's head.

    Args:
        channels, num_classes: see `Head`.
        block: (B, 512, h, w) to the same.
        dim: channels of the block.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, block: nn.Module, dim: int = 512):
        super().__init__(channels, num_classes)
        self.reduce = conv_bn_relu(channels[-1], dim, 3)
        self.block = block
        self.after = conv_bn_relu(dim, dim, 3)
        self.fuse = nn.Sequential(conv_bn_relu(channels[-1] + dim, dim, 3), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.auxiliary = AuxiliaryClassifier(channels[-2], num_classes)

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`."""
        x = features[-1]
        context = self.after(self.block(self.reduce(x)))
        auxiliary = (self.auxiliary(features[-2]),) if self.training else ()
        return HeadOutput(self.classifier(self.fuse(torch.cat([x, context], dim=1))), auxiliary=auxiliary)
