"""The context branch: encoder, decoder, position and scale encoding (Eq. 5, Sec. 3.1)."""

import math

import torch
from torch import Tensor, nn

from .attention import Shapes, SparseSamplingAttention


def reference_grid(shapes: Shapes, device: torch.device) -> Tensor:
    """Pixel centres ((i + 0.5) / size) of maps one after another: (1, sum of H * W, 2), (x, y) in [0, 1], float32."""
    grids = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        grids.append(torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1).flatten(0, 1))
    return torch.cat(grids)[None]


def sine_position_encoding(points: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine and cosine of the coordinates at geometrically spaced frequencies: half of the channels for y, half for x.

    Args:
        points: (..., 2), (x, y) in [0, 1].
        dim: channels, a multiple of 4.
        temperature: ratio of the highest frequency to the lowest.

    Returns:
        (..., dim).
    """
    count = dim // 4
    frequency = 2 * math.pi * temperature ** -(torch.arange(count, device=points.device, dtype=points.dtype) / count)
    angle = points.flip(-1)[..., None] * frequency  # (..., 2, dim / 4): y first
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear, dropout.

    Dropout stands before the ReLU, which changes nothing (it scales by a number >= 0) but the memory: what ReLU and the
    second linear layer keep for the backward is then one tensor, not two.
    """

    def __init__(self, d_model: int, hidden: int, dropout: float):
        super().__init__(
            nn.Linear(d_model, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, d_model), nn.Dropout(dropout)
        )
        for linear in (self[0], self[3]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


class EncoderLayer(nn.Module):
    """Sparse self-attention over the pyramid, then a feed-forward network, each with residual and LayerNorm."""

    def __init__(self, d_model: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = SparseSamplingAttention(d_model, num_heads, num_levels, num_points)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, ffn_dim, dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, encoding: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """(B, S, d_model) to the same; `encoding` (1, S, d_model) is added to the queries only."""
        x = self.norm1(x + self.dropout(self.self_attention(x + encoding, x, shapes, reference_points)))
        return self.norm2(x + self.feed_forward(x))


class DecoderLayer(nn.Module):
    """Sparse self-attention on the context queries (Eq. 4), cross-attention into X_enc (Eq. 6), feed-forward."""

    def __init__(self, d_model: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = SparseSamplingAttention(d_model, num_heads, 1, num_points)
        self.cross_attention = SparseSamplingAttention(d_model, num_heads, num_levels, num_points)
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, ffn_dim, dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self,
        c: Tensor,
        encoding: Tensor,
        shape: tuple[int, int],
        reference_points: Tensor,
        memory: Tensor,
        shapes: Shapes,
    ) -> Tensor:
        """Context queries (B, Q, d_model), which form one map of `shape`, and `memory` X_enc (B, S, d_model)."""
        c = self.norm1(c + self.dropout(self.self_attention(c + encoding, c, [shape], reference_points)))
        c = self.norm2(c + self.dropout(self.cross_attention(c + encoding, memory, shapes, reference_points)))
        return self.norm3(c + self.feed_forward(c))


class Encoder(nn.Module):
    """X_ms to X_enc (Eq. 5, Phi_enc): a stack of `EncoderLayer`.

    Args:
        num_layers: how many.
        d_model, num_heads, num_levels, num_points, ffn_dim, dropout: of each.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.scale_encoding = nn.Parameter(torch.randn(num_levels, d_model) * 0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(d_model, num_heads, num_levels, num_points, ffn_dim, dropout) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """(B, S, d_model) to (B, S, d_model)."""
        reference_points = reference_grid(shapes, x.device)
        sizes = [height * width for height, width in shapes]
        scale = torch.cat([e.expand(n, -1) for e, n in zip(self.scale_encoding, sizes, strict=True)])
        encoding = (sine_position_encoding(reference_points, x.shape[-1]) + scale).to(x.dtype)
        for layer in self.layers:
            x = layer(x, encoding, shapes, reference_points)
        return x


class Decoder(nn.Module):
    """Context queries and X_enc to the features of the prediction (Eq. 5, Phi_dec): a stack of `DecoderLayer`.

    Args:
        num_layers: how many.
        d_model, num_heads, num_levels, num_points, ffn_dim, dropout: of each.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(d_model, num_heads, num_levels, num_points, ffn_dim, dropout) for _ in range(num_layers)
        )

    def forward(self, queries: Tensor, memory: Tensor, shapes: Shapes) -> Tensor:
        """Context queries (B, d_model, h, w) and X_enc (B, S, d_model) to (B, d_model, h, w), channels-last."""
        shape = (queries.shape[2], queries.shape[3])
        reference_points = reference_grid([shape], queries.device)
        encoding = sine_position_encoding(reference_points, queries.shape[1]).to(queries.dtype)
        c = queries.flatten(2).transpose(1, 2)
        for layer in self.layers:
            c = layer(c, encoding, shape, reference_points, memory, shapes)
        return c.transpose(1, 2).unflatten(2, shape)
