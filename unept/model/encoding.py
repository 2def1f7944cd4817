"""Reference points and position encoding of the context branch (Sec. 3.1.1)."""

import math

import torch
from torch import Tensor

Shapes = list[tuple[int, int]]


def reference_grid(shapes: Shapes, device: torch.device) -> Tensor:
    """Pixel centres of maps [(H_l, W_l)], one map after another.

    Returns:
        (1, S, 2) float32 with S = sum of H_l * W_l: (x, y) in [0, 1], pixel i of n at (i + 0.5) / n.
    """
    grids = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        grids.append(torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1).flatten(0, 1))
    return torch.cat(grids)[None]


def sine_position_encoding(points: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine and cosine of the coordinates at geometrically spaced frequencies.

    Args:
        points: (..., 2), (x, y) in [0, 1].
        dim: number of channels, a multiple of 4.
        temperature: ratio of the highest frequency to the lowest.

    Returns:
        (..., dim): the first half of the channels encodes y, the second half x.
    """
    count = dim // 4
    frequency = 2 * math.pi * temperature ** -(torch.arange(count, device=points.device, dtype=points.dtype) / count)
    angle = points.flip(-1)[..., None] * frequency  # (..., 2, dim / 4): y first
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
