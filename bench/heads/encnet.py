"""EncNet: context encoding (Zhang et al. 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unept.model.spatial import conv_bn_relu

from .base import AuxiliaryClassifier, Head, HeadOutput


class Encoding(nn.Module):
    """The residuals of all pixels to K codewords d_k, softly assigned with smoothing factors s_k.

        a_ik = softmax_k(-s_k |x_i - d_k|^2),   e_k = sum over i of a_ik (x_i - d_k)

    Args:
        dim: channels of x and d_k.
        codewords: K.
    """

    def __init__(self, dim: int, codewords: int = 32):
        super().__init__()
        bound = (codewords * dim) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codewords, dim).uniform_(-bound, bound))
        self.smoothing = nn.Parameter(torch.rand(codewords))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to (B, K, dim), in float32: the squared distances are differences of larger numbers."""
        with torch.autocast(x.device.type, enabled=False):
            x, d = x.float().flatten(2).transpose(1, 2), self.codewords.float()  # (B, HW, dim), (K, dim)
            distance = x.square().sum(-1, keepdim=True) - 2 * (x @ d.t()) + d.square().sum(-1)
            assigned = (-self.smoothing * distance).softmax(dim=-1).transpose(1, 2)  # (B, K, HW)
            return assigned @ x - assigned.sum(-1, keepdim=True) * d


class ContextEncoding(nn.Module):
    """Scale each channel by what the whole image holds: e = sum over k of ReLU(BN(e_k)), y = x sigmoid(W e).

    From e, a second linear layer predicts which classes the image holds, which the SE-loss teaches.

    Args:
        dim: channels.
        num_classes: of the second layer.
        codewords: K.
    """

    def __init__(self, dim: int, num_classes: int, codewords: int = 32):
        super().__init__()
        self.project = conv_bn_relu(dim, dim, 1)
        self.encode = Encoding(dim, codewords)
        self.norm = nn.BatchNorm1d(codewords)
        self.scale = nn.Linear(dim, dim)
        self.presence = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim, H, W) to the same, and logits of the presence of each class (B, num_classes)."""
        e = self.norm(self.encode(self.project(x))).relu().sum(dim=1)
        return x * self.scale(e).sigmoid()[..., None, None], self.presence(e)


class EncNetHead(Head):
    """A 3x3 convolution on C5, context encoding, a classifier."""

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 512, codewords: int = 32):
        super().__init__(channels, num_classes)
        self.reduce = conv_bn_relu(channels[-1], dim, 3)
        self.context = ContextEncoding(dim, num_classes, codewords)
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(dim, num_classes, 1))
        self.auxiliary = AuxiliaryClassifier(channels[-2], num_classes)

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`."""
        x, presence = self.context(self.reduce(features[-1]))
        logits = self.classifier(x)
        if not self.training:
            return HeadOutput(logits)
        return HeadOutput(logits, auxiliary=(self.auxiliary(features[-2]),), presence=presence)
