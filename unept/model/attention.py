"""Sparse sampling attention as a module (Eq. 2-4, 6)."""

import math

import torch
from torch import Tensor, nn

from ..kernels.sparse_attention import project, projected_sampling_attention
from .encoding import Shapes


def ring_offsets(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """Initial sampling offsets: head m looks in direction 2 pi m / M on every level, from the query itself on.

    The paper does not state them. Deformable DETR and the released code start one pixel away and have twice the gap
    between points, so that nothing is sampled where the query lies: in small that learned more slowly
    (`bench/results/README.md`).

    Args:
        num_heads: M.
        num_levels: L.
        num_points: N, points per head and level.

    Returns:
        (M, L, N, 2) float32, (x, y) in pixels of each level; point n lies n / 2 pixels away, on a square ring.
    """
    angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    direction = direction / direction.abs().amax(dim=-1, keepdim=True)
    distance = torch.arange(num_points, dtype=torch.float32) / 2
    rings = direction[:, None, None, :] * distance[None, None, :, None]
    return rings.expand(num_heads, num_levels, num_points, 2).contiguous()


class SparseSamplingAttention(nn.Module):
    """Each query attends, per head, to N points of each of L feature maps (Eq. 3, 4 and 6).

    W^Q maps a query to M heads of d_k channels. From the channels of each head, U^wts gives L * N attention logits and
    U^pos the (x, y) offsets of the L * N points. W^V and W^O are the usual projections of values and output.

    Args:
        d_model: channels of queries, values and output, a multiple of `num_heads`.
        num_heads: M.
        num_levels: L.
        num_points: N, points per head and level.

    Raises:
        ValueError: `d_model` is not a multiple of `num_heads`.
    """

    def __init__(self, d_model: int = 256, num_heads: int = 8, num_levels: int = 3, num_points: int = 16):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model is {d_model} and num_heads {num_heads}: d_model must be a multiple of num_heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        head_dim = d_model // num_heads
        samples = num_levels * num_points
        self.query_projection = nn.Linear(d_model, d_model)  # W^Q
        self.value_projection = nn.Linear(d_model, d_model)  # W^V
        self.output_projection = nn.Linear(d_model, d_model)  # W^O
        # U^pos and U^wts of all heads side by side, [M, d_k, 2LN + LN]: zero, so that at first only the biases count.
        self.sampling_weight = nn.Parameter(torch.zeros(num_heads, head_dim, 3 * samples))
        offsets = ring_offsets(num_heads, num_levels, num_points).flatten(1)
        self.sampling_bias = nn.Parameter(torch.cat([offsets, torch.zeros(num_heads, samples)], dim=1))
        for projection in (self.query_projection, self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def sampling(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Where each query samples and with which attention logits (Eq. 3).

        Args:
            query: (B, Q, d_model).

        Returns:
            Offsets (B, Q, M, L, N, 2), (x, y) in pixels of each level, and logits (B, Q, M, L, N). Both are views of
            one projection in the dtype of the weights. `forward` rounds it to float16 where it computes in half
            precision on a GPU: to 1/256 of a pixel below 16 pixels.
        """
        q = self._heads(self.query_projection(query)).to(self.sampling_weight.dtype)
        return project(q, self.sampling_weight, self.sampling_bias, self.num_levels)

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, ..., d_model) -> (B, ..., M, d_k)."""
        return projected.unflatten(-1, (self.num_heads, -1))

    def forward(self, query: Tensor, value: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """Attend to the sampled points (Eq. 4 and 6).

        Args:
            query: (B, Q, d_model).
            value: (B, S, d_model), the L flattened maps one after another, S = sum of H_l * W_l.
            shapes: [(H_l, W_l)] of the L maps.
            reference_points: (1 or B, Q, 2), (x, y) of the queries in [0, 1].

        Returns:
            (B, Q, d_model).
        """
        q, v = self._heads(self.query_projection(query)), self._heads(self.value_projection(value))
        out = projected_sampling_attention(v, shapes, q, self.sampling_weight, self.sampling_bias, reference_points)
        return self.output_projection(out)
