"""DNLNet: the disentangled non-local block (Yin et al. 2020)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import ContextHead


class DisentangledNonLocal(nn.Module):
    """y_i = sum over j of (softmax_j((q_i - mean q)^T (k_j - mean k)) + softmax_j(m_j)) g_j;  z = x + W y.

    The first term, whitened, says what belongs together; the second, one map for all queries, what is salient.

    Args:
        dim: channels C; q, k and g have half of them.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(dim, dim // 2, 1) for _ in range(3))
        self.unary = nn.Conv2d(dim, 1, 1)
        self.output = nn.Conv2d(dim // 2, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        q, k, g = (projection(x).flatten(2) for projection in (self.query, self.key, self.value))  # (B, C / 2, HW)
        q, k = (t - t.mean(dim=2, keepdim=True) for t in (q, k))
        pairwise = torch.einsum("bci,bcj->bij", q, k).softmax(dim=-1)
        salient = self.unary(x).flatten(2).softmax(dim=-1)  # (B, 1, HW)
        y = torch.einsum("bij,bcj->bci", pairwise, g) + torch.einsum("boj,bcj->bco", salient, g)
        return x + self.output(y.unflatten(2, x.shape[2:]))


class DNLNetHead(ContextHead):
    """A disentangled non-local block between two 3x3 convolutions; its result is concatenated with C5."""

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 512):
        super().__init__(channels, num_classes, DisentangledNonLocal(dim), dim)
