"""CCNet: criss-cross attention (Huang et al. 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import ContextHead


class CrissCrossAttention(nn.Module):
    """Each pixel attends to its row and its column, H + W - 1 pixels: A = softmax(Q K^T), H' = A V + H.

    Q and K have an eighth of the channels. Applied twice with the same weights, every pixel sees every other.

    Args:
        dim: channels C.
        recurrence: R, how often it is applied.
    """

    def __init__(self, dim: int, recurrence: int = 2):
        super().__init__()
        self.query, self.key = nn.Conv2d(dim, dim // 8, 1), nn.Conv2d(dim, dim // 8, 1)
        self.value = nn.Conv2d(dim, dim, 1)
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        for _ in range(self.recurrence):
            x = x + self._attend(x)
        return x

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        height, width = x.shape[2:]
        column = torch.einsum("bcyx,bczx->byxz", q, k)  # (B, H, W, H)
        row = torch.einsum("bcyx,bcyz->byxz", q, k)  # (B, H, W, W)
        itself = torch.eye(height, dtype=torch.bool, device=x.device)[:, None]  # in the row already
        column = column.masked_fill(itself, -torch.inf)
        column, row = torch.cat([column, row], dim=-1).softmax(dim=-1).split([height, width], dim=-1)
        return torch.einsum("byxz,bczx->bcyx", column, v) + torch.einsum("byxz,bcyz->bcyx", row, v)


class CCNetHead(ContextHead):
    """Criss-cross attention, twice, between two 3x3 convolutions; its result is concatenated with C5."""

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 512):
        super().__init__(channels, num_classes, CrissCrossAttention(dim), dim)
