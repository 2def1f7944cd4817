"""PointRend: segmentation as rendering (Kirillov et al. 2019), on the semantic FPN."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compared import resize
from .base import Head, HeadOutput, Points


def sample(x: Tensor, coordinates: Tensor) -> Tensor:
    """x (B, C, H, W) at points (B, P, 2), (x, y) in [0, 1], bilinearly: (B, C, P)."""
    grid = (2 * coordinates - 1)[:, :, None].to(x.dtype)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)[..., 0]


def uncertainty(logits: Tensor) -> Tensor:
    """How close the two best classes are, (B, K, ...) to (B, ...): higher is less certain."""
    best = logits.topk(2, dim=1).values
    return best[:, 1] - best[:, 0]


class FeaturePyramid(nn.Module):
    """FPN: each map gets the coarser ones added, up-sampled; all have `dim` channels."""

    def __init__(self, channels: Sequence[int], dim: int = 256):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps, finest first, to as many of `dim` channels."""
        maps = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for i in range(len(maps) - 2, -1, -1):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:], mode="nearest")
        return [output(x) for output, x in zip(self.output, maps, strict=True)]


class SemanticBranch(nn.Module):
    """Each level by 3x3 convolutions and doublings to the finest level's size; their sum is classified."""

    def __init__(self, num_levels: int, num_classes: int, dim: int = 256, hidden: int = 128):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(self._convolution(dim if step == 0 else hidden, hidden) for step in range(max(1, level)))
            for level in range(num_levels)
        )
        self.classifier = nn.Conv2d(hidden, num_classes, 1)

    @staticmethod
    def _convolution(in_channels: int, channels: int) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.GroupNorm(32, channels), nn.ReLU(inplace=True))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first, to logits (B, K, h, w) at the finest."""
        total = torch.zeros_like(maps[0][:, :1])
        for level, (steps, x) in enumerate(zip(self.levels, maps, strict=True)):
            for step, convolution in enumerate(steps):
                x = convolution(x)
                if level:
                    x = resize(x, maps[level - step - 1].shape[2:])
            total = total + x
        return self.classifier(total)


class PointHead(nn.Module):
    """A perceptron on single points: fine features and coarse logits in, logits out (Sec. 3.2 of PointRend).

    Three hidden layers of 256; the coarse logits are concatenated to the input of each layer.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 256):
        super().__init__()
        sizes = (channels, hidden, hidden, hidden)
        self.hidden = nn.ModuleList(nn.Conv1d(sizes[i] + num_classes, hidden, 1) for i in range(3))
        self.classifier = nn.Conv1d(hidden + num_classes, num_classes, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """(B, C, P) and (B, K, P) to (B, K, P)."""
        x = fine
        for layer in self.hidden:
            x = layer(torch.cat([x, coarse], dim=1)).relu()
        return self.classifier(torch.cat([x, coarse], dim=1))


class PointRendHead(Head):
    """Coarse logits at 1/4 of the image, refined at the least certain points.

    In training the point head learns on `train_points` points, of which a share `importance` are the least certain of
    `oversample` times as many random ones. In evaluation the logits are doubled in size twice, each time with the
    `points` least certain pixels predicted anew.

    Args:
        channels, num_classes: see `Head`.
        train_points, oversample, importance: N, k and beta of the paper.
        points: per doubling; the paper's 8096 for semantic segmentation.
    """

    num_levels = 4
    output_stride = 32

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        train_points: int = 2048,
        oversample: int = 3,
        importance: float = 0.75,
        points: int = 8096,
    ):
        super().__init__(channels, num_classes)
        self.pyramid = FeaturePyramid(channels)
        self.coarse = SemanticBranch(len(channels), num_classes)
        self.point_head = PointHead(256, num_classes)
        self.train_points, self.oversample, self.importance = train_points, oversample, importance
        self.points = points

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`."""
        maps = self.pyramid(features)
        coarse = self.coarse(maps)
        if not self.training:
            return HeadOutput(self._subdivide(coarse, maps[0]))
        coordinates = self._training_points(coarse)
        logits = self.point_head(sample(maps[0], coordinates), sample(coarse, coordinates))
        return HeadOutput(coarse, points=Points(coordinates, logits))

    @torch.no_grad()
    def _training_points(self, coarse: Tensor) -> Tensor:
        """(B, N, 2), (x, y) in [0, 1]."""
        batch, certain = len(coarse), self.train_points - int(self.importance * self.train_points)
        drawn = torch.rand(batch, self.oversample * self.train_points, 2, device=coarse.device)
        hardest = uncertainty(sample(coarse, drawn)).topk(self.train_points - certain, dim=1).indices
        hard = drawn.gather(1, hardest[..., None].expand(-1, -1, 2))
        return torch.cat([hard, torch.rand(batch, certain, 2, device=coarse.device)], dim=1)

    def _subdivide(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Logits at four times the resolution."""
        logits = coarse
        for _ in range(2):
            height, width = (2 * n for n in logits.shape[2:])
            logits = resize(logits, (height, width))
            chosen = uncertainty(logits).flatten(1).topk(min(self.points, height * width), dim=1).indices
            row, column = chosen.div(width, rounding_mode="floor"), chosen % width
            coordinates = torch.stack([(column + 0.5) / width, (row + 0.5) / height], dim=-1)
            better = self.point_head(sample(fine, coordinates), sample(coarse, coordinates))
            where = chosen[:, None].expand(-1, logits.shape[1], -1)
            logits = logits.flatten(2).scatter(2, where, better.to(logits.dtype)).unflatten(2, (height, width))
        return logits
