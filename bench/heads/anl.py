"""ANL: asymmetric non-local neural networks (Zhu et al. 2019)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unept.model.spatial import conv_bn_relu

from ..compared import resize
from .base import AuxiliaryClassifier, Head, HeadOutput

POOLED = (1, 3, 6, 8)  # 110 anchors


def pyramid_pool(x: Tensor) -> Tensor:
    """(B, C, H, W) to its averages over grids of 1, 3, 6 and 8 cells each way: (B, C, 110)."""
    return torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in POOLED], dim=2)


class AsymmetricNonLocal(nn.Module):
    """Queries of one map attend to 110 averages of another: softmax(Q K_P^T) V_P instead of H W keys.

    Args:
        query_channels: of the map that asks.
        key_channels: of the map that is asked.
        dim: channels of Q, K and V.
        out_channels: of the result.
    """

    def __init__(self, query_channels: int, key_channels: int, dim: int, out_channels: int):
        super().__init__()
        self.query = conv_bn_relu(query_channels, dim, 1)
        self.key = conv_bn_relu(key_channels, dim, 1)
        self.value = nn.Conv2d(key_channels, dim, 1)
        self.output = nn.Sequential(nn.Conv2d(dim, out_channels, 1), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """(B, C_q, H, W) and (B, C_k, H', W') to (B, C_out, H, W)."""
        q = self.query(x).flatten(2).transpose(1, 2)  # (B, HW, dim)
        k, v = pyramid_pool(self.key(source)), pyramid_pool(self.value(source))  # (B, dim, 110)
        weights = (q @ k * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.output((weights @ v.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]))


class ANLHead(Head):
    """AFNB, in which C5 asks C4, a 3x3 convolution, and APNB, in which the map asks itself.

    Both blocks concatenate their result with their input and mix the two by a 1x1 convolution.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 512):
        super().__init__(channels, num_classes)
        low, high = channels[-2:]
        self.afnb = AsymmetricNonLocal(high, low, dim // 2, high)
        self.mix_fused = nn.Sequential(nn.Conv2d(2 * high, high, 1, bias=False), nn.BatchNorm2d(high))
        self.reduce = conv_bn_relu(high, dim, 3)
        self.apnb = AsymmetricNonLocal(dim, dim, dim // 2, dim)
        self.mix = nn.Sequential(conv_bn_relu(2 * dim, dim, 1), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        self.auxiliary = AuxiliaryClassifier(low, num_classes)

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`."""
        low, high = features[-2:]
        low = resize(low, high.shape[2:]) if low.shape[2:] != high.shape[2:] else low
        fused = self.mix_fused(torch.cat([self.afnb(high, low), high], dim=1))
        x = self.reduce(fused)
        x = self.mix(torch.cat([self.apnb(x, x), x], dim=1))
        auxiliary = (self.auxiliary(low),) if self.training else ()
        return HeadOutput(self.classifier(x), auxiliary=auxiliary)
