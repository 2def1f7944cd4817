"""Boundary head, direction head and the refinement that reads them (Sec. 3.2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import upsample_argmax
from .spatial import conv_bn_relu

# (dx, dy) of the 8 directions: bin k is centred on the angle -180 + 45 k degrees of atan2(dy, dx).
DIRECTIONS = ((-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1))


class PixelHead(nn.Sequential):
    """1x1 convolution to 256 channels, batch normalisation, ReLU, 1x1 convolution: (B, C, h, w) to (B, out, h, w).

    The boundary head has one output (the logit of "boundary"), the direction head one for each direction.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 256):
        super().__init__(conv_bn_relu(in_channels, hidden, 1), nn.Conv2d(hidden, out_channels, 1))


def upsample_boundary(boundary: Tensor, size: tuple[int, int]) -> Tensor:
    """Boundary logits (B, 1, h, w) to (B, H, W), bilinear, float32."""
    return F.interpolate(boundary.float(), size, mode="bilinear", align_corners=False)[:, 0]


@torch.no_grad()
def refinement_offset(
    boundary: Tensor, direction: Tensor, size: tuple[int, int], *, scale: int = 1, threshold: float = 0.5
) -> Tensor:
    """Where each pixel reads its refined prediction: itself, or one step into its segment if it lies on a boundary.

    Args:
        boundary: logits (B, 1, h, w).
        direction: logits (B, 8, h, w).
        size: (H, W) of the result.
        scale: pixels a step; SegFix uses 2 at inference.
        threshold: of the boundary's probability.

    Returns:
        (B, 2, H, W) int16, (dx, dy) in pixels; (0, 0) off the boundary.
    """
    # DIRECTIONS by arithmetic: a table would have to be copied to the device, and the copy waited for.
    angle = upsample_argmax(direction, size) * (math.pi / 4) - math.pi
    steps = torch.stack([angle.cos(), angle.sin()], dim=1).round().to(torch.int16) * scale
    return steps * (upsample_boundary(boundary, size).sigmoid() > threshold)[:, None]
