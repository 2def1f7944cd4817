"""Boundary head, direction head and the refinement that reads them (Sec. 3.2)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import upsample_argmax
from ..validation import check_fields, check_range
from .spatial import conv_bn_relu

StepDirection = Literal["best", "mean"]

# (dx, dy) of the paper's 8 directions: bin k is centred on the angle -180 + 45 k degrees of atan2(dy, dx).
DIRECTIONS = ((-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1))


@dataclass(frozen=True)
class Refinement:
    """How the prediction of boundary pixels is refined (Sec. 3.2): it is read some steps inside their segment."""

    scale: int = 1
    """Length of a step, in pixels along each axis. Training uses 1; SegFix uses 2 at inference. With more than 8
    directions a step is longer by a factor that keeps them apart (`direction_steps`)."""
    steps: int = 1
    """Number of steps, each from where the one before ended, in the direction predicted there. A pixel stops where no
    boundary is predicted. The paper takes one step."""
    direction: StepDirection = "best"
    """best: a step leads in the direction with the largest score, as in the paper. mean: it is the mean of the unit
    vectors of all directions, weighted by their probabilities, times `scale`: shorter where they disagree, as they do
    on thin objects."""
    threshold: float = 0.5
    """A pixel lies on a boundary if its boundary probability is above this."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("scale", self.scale, 1, 127)
        check_range("steps", self.steps, 1, 127)


ONE_STEP = Refinement()  # what training refines by


class SubpixelConv(nn.Sequential):
    """1x1 convolution that predicts every pixel of a block: (B, C, h, w) to (B, out_channels, s h, s w).

    All pixels of a block start with equal weights, so that the first outputs are constant on each block rather than
    noise from pixel to pixel.

    Args:
        in_channels: C.
        out_channels: channels of the result.
        upscale: s, rows and columns of a block.
    """

    def __init__(self, in_channels: int, out_channels: int, upscale: int):
        super().__init__(nn.Conv2d(in_channels, out_channels * upscale**2, 1), nn.PixelShuffle(upscale))
        with torch.no_grad():
            for parameter in self[0].parameters():
                parameter.copy_(parameter[:: upscale**2].repeat_interleave(upscale**2, dim=0))


class PixelHead(nn.Sequential):
    """1x1 convolution, batch normalisation, ReLU, 1x1 convolution: (B, C, h, w) to (B, out_channels, s h, s w).

    The boundary head has one output channel, the logit of "boundary"; the direction head has one for each direction.

    Args:
        in_channels: C.
        out_channels: channels of the result.
        hidden: channels between the two convolutions.
        upscale: s. With 1 the last convolution gives one value per channel; otherwise it is a `SubpixelConv`.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 256, upscale: int = 1):
        last = nn.Conv2d(hidden, out_channels, 1) if upscale == 1 else SubpixelConv(hidden, out_channels, upscale)
        super().__init__(conv_bn_relu(in_channels, hidden, 1), last)


def upsample_boundary(boundary: Tensor, size: tuple[int, int]) -> Tensor:
    """Up-sample boundary logits (B, 1, h, w) bilinearly to (B, H, W), float32, where `size` is (H, W).

    Logits that have this size already stay as they are; the result may then share their memory.
    """
    boundary = boundary.float()
    if boundary.shape[2:] != size:
        boundary = F.interpolate(boundary, size, mode="bilinear", align_corners=False)
    return boundary[:, 0]


def mirrored_directions(num_directions: int) -> list[int]:
    """The direction that is seen in a mirrored image where direction k of an even number is seen in the original."""
    return [(num_directions // 2 - k) % num_directions for k in range(num_directions)]


def step_length(num_directions: int) -> int:
    """Pixels, along the longer axis, of a step of scale 1: as many as keep the directions apart."""
    return max(1, math.ceil(num_directions / 8))


def direction_steps(bins: Tensor, num_directions: int) -> Tensor:
    """Steps of whole pixels in the directions of bins (B, H, W): (B, 2, H, W) int16, (dx, dy).

    Up to 8 directions lead to the 8 neighbours of a pixel; more lead to the pixels of the square ring of radius 2, 3,
    ..., as in SegFix, of which each radius r has 8 r.
    """
    # The angle is computed: a table of DIRECTIONS would have to be copied to the device, and the copy waited for.
    angle = bins * (2 * math.pi / num_directions) - math.pi
    step = torch.stack([angle.cos(), angle.sin()], dim=1)
    if num_directions > 8:
        step = step / step.abs().amax(dim=1, keepdim=True) * step_length(num_directions)
    return step.round().to(torch.int16)


def mean_direction(direction: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean of the unit vectors of all directions, weighted by their probabilities.

    Args:
        direction: logits (B, m, h, w) of the m directions.
        size: (H, W) of the result, to which the mean is up-sampled bilinearly.

    Returns:
        (B, 2, H, W) float32, (dx, dy); its length is 1 where one direction is certain, and 0 where all are equally
        likely or opposite ones are.
    """
    count = direction.shape[1]
    probabilities = direction.float().softmax(1)
    angle = torch.arange(count, device=direction.device)[:, None, None] * (2 * math.pi / count) - math.pi
    mean = torch.stack([(probabilities * angle.cos()).sum(1), (probabilities * angle.sin()).sum(1)], dim=1)
    return mean if mean.shape[2:] == size else F.interpolate(mean, size, mode="bilinear", align_corners=False)


@torch.no_grad()
def refinement_offset(boundary: Tensor, direction: Tensor, size: tuple[int, int], refinement: Refinement) -> Tensor:
    """Where each pixel reads its refined prediction: further inside its segment on a boundary, at itself elsewhere.

    Args:
        boundary: logits (B, 1, h, w).
        direction: logits (B, m, h, w) of the m directions, by default `DIRECTIONS`; for the best one, probabilities do.
        size: (H, W) of the result.
        refinement: length, number and direction of the steps, and what counts as boundary.

    Returns:
        (B, 2, H, W) int16, (dx, dy) in pixels; (0, 0) off the boundary.
    """
    if refinement.direction == "mean":
        step = (mean_direction(direction, size) * refinement.scale).round().to(torch.int16)
    else:
        best = direction.argmax(1) if direction.shape[2:] == size else upsample_argmax(direction, size)
        step = direction_steps(best, direction.shape[1]) * refinement.scale
    step = step * (upsample_boundary(boundary, size).sigmoid() > refinement.threshold)[:, None]
    offset = step
    for _ in range(refinement.steps - 1):
        offset = offset + read_at_offset(step, offset)
    return offset


def read_at_offset(maps: Tensor, offset: Tensor) -> Tensor:
    """Read maps (B, C, H, W) at p + offset(p), clamped to the image.

    Args:
        maps: of any dtype.
        offset: (B, 2, H, W) integer, (dx, dy) in pixels.

    Returns:
        (B, C, H, W), of the dtype of `maps`.
    """
    height, width = maps.shape[2:]
    rows = torch.arange(height, device=maps.device)[:, None]
    columns = torch.arange(width, device=maps.device)
    y = (rows + offset[:, 1].long()).clamp(0, height - 1)
    x = (columns + offset[:, 0].long()).clamp(0, width - 1)
    index = (y * width + x).flatten(1)[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, index).unflatten(2, (height, width))
