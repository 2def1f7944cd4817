"""PSANet: point-wise spatial attention (Zhao et al. 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unept.model.spatial import conv_bn_relu

from ..compared import resize
from .base import AuxiliaryClassifier, Head, HeadOutput


def offset_index(height: int, width: int, extent: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the offset from pixel i to pixel j lies in a map of `extent` x `extent` offsets with zero in its centre.

    Returns:
        (HW, HW) int64, row by row, and (HW, HW) bool: whether the map is large enough for it.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in (height, width)), indexing="ij")
    dy, dx = (p.flatten()[None, :] - p.flatten()[:, None] + extent // 2 for p in (rows, columns))
    inside = (dy >= 0) & (dy < extent) & (dx >= 0) & (dx < extent)
    return (dy * extent + dx).clamp(0, extent**2 - 1), inside


class PointwiseSpatialAttention(nn.Module):
    """A pixel predicts a weight for each offset from itself: those that it collects, or those that it distributes.

        collect     z_i = 1/N sum over j of F_(j-i)(x_i) x_j
        distribute  z_i = 1/N sum over j of F_(i-j)(x_j) x_j

    F is an over-complete map: of its offsets each pixel uses the N = H W that lead to a pixel. It is computed at half
    of the resolution, with which the head has the parameters of Table 7.

    Args:
        in_channels: of the map.
        dim: channels of x and z.
        extent: side of the map of offsets, odd: 2 H - 1 for H x H pixels. Pixels further apart have no weight.
        distributes: the second equation.
    """

    def __init__(self, in_channels: int, dim: int, extent: int, *, distributes: bool):
        super().__init__()
        if extent % 2 == 0:
            raise ValueError(f"extent is {extent}: it must be odd, so that it has a centre")
        self.extent, self.distributes = extent, distributes
        self.reduce = conv_bn_relu(in_channels, dim, 1)
        self.offsets = nn.Sequential(conv_bn_relu(dim, dim, 1), nn.Conv2d(dim, extent**2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, dim, ceil(H / 2), ceil(W / 2))."""
        x = resize(self.reduce(x), [(n + 1) // 2 for n in x.shape[2:]])
        height, width = x.shape[2:]
        index, inside = offset_index(height, width, self.extent, x.device)
        predicted = self.offsets(x).flatten(2).transpose(1, 2)  # (B, HW, extent^2)
        weights = predicted.gather(2, index.expand(len(x), -1, -1)) * inside  # (B, HW, HW): of i for j
        if self.distributes:
            weights = weights.transpose(1, 2)
        z = weights @ x.flatten(2).transpose(1, 2) / (height * width)
        return z.transpose(1, 2).unflatten(2, (height, width))


class PSANetHead(Head):
    """Both attentions on C5, their results mixed and concatenated with C5.

    Args:
        channels, num_classes: see `Head`.
        dim: channels of either attention.
        extent: see `PointwiseSpatialAttention`; 59 spans a crop of 480x480 at 1/16.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 512, extent: int = 59):
        super().__init__(channels, num_classes)
        self.collect = PointwiseSpatialAttention(channels[-1], dim, extent, distributes=False)
        self.distribute = PointwiseSpatialAttention(channels[-1], dim, extent, distributes=True)
        self.mix = conv_bn_relu(2 * dim, channels[-1], 1)
        self.fuse = nn.Sequential(conv_bn_relu(2 * channels[-1], dim, 3), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.auxiliary = AuxiliaryClassifier(channels[-2], num_classes)

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`."""
        x = features[-1]
        context = self.mix(torch.cat([self.collect(x), self.distribute(x)], dim=1))
        x = self.fuse(torch.cat([x, resize(context, x.shape[2:])], dim=1))
        auxiliary = (self.auxiliary(features[-2]),) if self.training else ()
        return HeadOutput(self.classifier(x), auxiliary=auxiliary)
