"""The attentions that Table 8 compares with sparse sampling, each in its place in our encoder and decoder.

Legend: B batch, M heads, Q queries, S tokens of all L maps, D channels per head (D = d_model / M), J keys per query.

| name                 | a query attends to                                         | keys per query J         |
|----------------------|------------------------------------------------------------|--------------------------|
| `sparse_sampling`    | N learned points of each map (Eq. 6)                       | L N                      |
| `full`               | all tokens of all maps (Eq. 1)                             | S                        |
| `sparse_transformer` | its row and its column of each map                         | sum of H_l + W_l - 1     |
| `longformer`         | a window of each map, and a few global tokens              | L window^2 + global      |
| `reformer`           | tokens with similar hashes, in several rounds              | rounds * 2 * chunk       |

All but the first compare queries with keys (Eq. 1), so that one question is to be settled for each: what the keys are.
In self-attention they are projected from the same tokens as the queries, position and scale encoding included. In the
decoder's cross-attention they are projected from X_enc plus the sine encoding of its pixels and a learned scale
encoding of this layer. Values carry no encoding, as in sparse sampling. The patterns of Sparse Transformer and
Longformer follow from the queries' reference points, so that they mean the same for self- and cross-attention and for
maps of any size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SparseSamplingAttention
from .encoding import Shapes, reference_grid, sine_position_encoding
from .lsh_attention import lsh_attention
from .neighbour_attention import neighbour_attention


class KeyedAttention(nn.Module):
    """What the attentions with keys share: projections, keys, heads. A subclass says which keys a query attends to.

    Args:
        d_model: channels of queries, values and output.
        num_heads: M; d_model must be a multiple of it.
        num_levels: L.
        cross: whether queries and values are different tokens; see the module's text.

    Raises:
        ValueError: d_model is not a multiple of num_heads.
    """

    shared_query_key = False

    def __init__(self, d_model: int = 256, num_heads: int = 8, num_levels: int = 3, *, cross: bool = False):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model is {d_model} and num_heads {num_heads}: d_model must be a multiple of num_heads")
        self.num_heads, self.cross = num_heads, cross
        self.query_projection = nn.Linear(d_model, d_model)  # W^Q
        self.key_projection = None if self.shared_query_key else nn.Linear(d_model, d_model)  # W^K
        self.value_projection = nn.Linear(d_model, d_model)  # W^V
        self.output_projection = nn.Linear(d_model, d_model)  # W^O
        self.scale_encoding = nn.Parameter(torch.randn(num_levels, d_model) * 0.02) if cross else None
        for projection in self.children():
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, value: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """Attend (Eq. 1), with the signature of `SparseSamplingAttention.forward`.

        Args:
            query: (B, Q, d_model).
            value: (B, S, d_model), the L flattened maps one after another.
            shapes: [(H_l, W_l)] of the L maps.
            reference_points: (1, Q, 2), the queries' (x, y) in [0, 1].

        Returns:
            (B, Q, d_model).
        """
        key = query
        if self.scale_encoding is not None:
            position = sine_position_encoding(reference_grid(shapes, value.device), value.shape[-1])
            sizes = torch.tensor([height * width for height, width in shapes], device=value.device)
            scale = self.scale_encoding.repeat_interleave(sizes, dim=0, output_size=value.shape[1])
            key = value + (position + scale).to(value.dtype)
        project_key = self.query_projection if self.key_projection is None else self.key_projection
        q = self._split_heads(self.query_projection(query))
        k = q if self.shared_query_key and not self.cross else self._split_heads(project_key(key))
        v = self._split_heads(self.value_projection(value))
        out = self.attend(q, k, v, shapes, reference_points)
        return self.output_projection(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """q (B, M, Q, D), k and v (B, M, S, D) to (B, M, Q, D)."""
        raise NotImplementedError

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, n, d_model) to (B, M, n, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FullAttention(KeyedAttention):
    """Every query attends to all S tokens (Eq. 1).

    The cost is O(Q S) multiplications, the O(n^2) of Sec. 3.1.1. `scaled_dot_product_attention` chooses the
    implementation: a fused kernel keeps O(Q + S) for the backward pass, the plain one all B M Q S weights. Scores are
    divided by sqrt(D), as in "Attention is all you need"; Eq. 1 writes sqrt(d_model), but multiplies d_k channels.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """See `KeyedAttention`."""
        return F.scaled_dot_product_attention(q, k, v)


class StridedAttention(KeyedAttention):
    """Each query attends to its row and its column of each map: Sparse Transformer's strided pattern.

    Child et al., "Generating long sequences with sparse transformers" (2019): with the row's width as stride, one head
    of the factorised attention sees the row and the other one the column. Here every head sees both (their "merged
    head"), and not only what comes earlier, since there is no order of generation. The cost is O(Q J), where J grows
    with the square root of S.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """See `KeyedAttention`."""
        return neighbour_attention(q, k, v, *cross_neighbours(shapes, reference_points[0]))


class WindowedAttention(KeyedAttention):
    """Each query attends to a window of each map and to global tokens, which attend to everything: Longformer.

    Beltagy et al., "Longformer: the long-document transformer" (2020): sliding window and symmetric global
    attention. The window is a square of pixels around the query's reference point. The global tokens are evenly spaced
    in the sequence of the keys; as many queries, evenly spaced likewise, attend to all keys. Longformer's second set of
    projections for global tokens is omitted. The cost is O(Q (L window^2 + G) + G S) for G global tokens.

    Args:
        d_model, num_heads, num_levels, cross: see `KeyedAttention`.
        window: side of the square in pixels, odd.
        num_global: G.
    """

    def __init__(
        self,
        d_model: int = 256,
        num_heads: int = 8,
        num_levels: int = 3,
        *,
        cross: bool = False,
        window: int = 9,
        num_global: int = 16,
    ):
        super().__init__(d_model, num_heads, num_levels, cross=cross)
        if window % 2 == 0:
            raise ValueError(f"window is {window}: it must be odd, so that it has a centre")
        self.window, self.num_global = window, num_global

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """See `KeyedAttention`."""
        near, valid = window_neighbours(shapes, reference_points[0], self.window)
        shared = evenly_spaced(k.shape[2], self.num_global, k.device)
        seen = (near[:, :, None] == shared) & valid[:, :, None]  # a global token inside the window counts once
        index = torch.cat([near, shared.expand(len(near), -1)], dim=1)
        out = neighbour_attention(q, k, v, index, torch.cat([valid, ~seen.any(dim=1)], dim=1))
        everywhere = evenly_spaced(q.shape[2], self.num_global, q.device)
        attended = F.scaled_dot_product_attention(q.index_select(2, everywhere), k, v)
        return out.index_copy(2, everywhere, attended.to(out.dtype))


class LSHAttention(KeyedAttention):
    """Each query attends to tokens with similar hashes: Reformer.

    Kitaev et al., "Reformer: the efficient transformer" (2020), Sec. 2: queries and keys share one projection, keys are
    normalised, tokens are sorted by a locality-sensitive hash, and each chunk of the sorted sequence attends to itself
    and to the chunk before it; several rounds with different hashes are merged by their softmax denominators. See
    `unept.model.lsh_attention`. The cost is O(rounds (Q + S) 2 chunk), and so many weights per head are kept.

    Queries and keys are one sequence in the paper. The decoder's cross-attention is read as one sequence too: context
    queries and X_enc are hashed and sorted together, and only X_enc's tokens can be attended to.

    Args:
        d_model, num_heads, num_levels, cross: see `KeyedAttention`.
        rounds: of hashing.
        chunk: tokens per chunk.

    Attributes:
        rotations: (rounds, D, 256), the random directions of the hashes, drawn once and saved with the weights, so that
            a model predicts the same each time. (The paper draws them anew for each batch.)
    """

    shared_query_key = True
    rotations: Tensor

    def __init__(
        self,
        d_model: int = 256,
        num_heads: int = 8,
        num_levels: int = 3,
        *,
        cross: bool = False,
        rounds: int = 4,
        chunk: int = 64,
    ):
        super().__init__(d_model, num_heads, num_levels, cross=cross)
        self.chunk = chunk
        self.register_buffer("rotations", torch.randn(rounds, d_model // num_heads, 256))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """See `KeyedAttention`."""
        if not self.cross:
            return lsh_attention(q, v, self.rotations, self.chunk)
        queries = q.shape[2]
        joint = torch.cat([q, k], dim=2)
        value = torch.cat([torch.zeros_like(q), v], dim=2)
        return lsh_attention(joint, value, self.rotations, self.chunk, num_queries=queries)[:, :, :queries]


def nearest_pixels(shape: tuple[int, int], points: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row (Q,), int64, of the pixel of a map (H, W) in which each point (Q, 2), (x, y) in [0, 1], lies."""
    height, width = shape
    x = (points[:, 0] * width).floor().long().clamp(0, width - 1)
    y = (points[:, 1] * height).floor().long().clamp(0, height - 1)
    return x, y


def cross_neighbours(shapes: Shapes, points: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column of each map through each point (Q, 2): index (Q, J) and valid (Q, J).

    J = sum of H_l + W_l; the pixel where row and column meet is valid once.
    """
    index, valid, start = [], [], 0
    for height, width in shapes:
        x, y = nearest_pixels((height, width), points)
        columns, rows = (torch.arange(n, device=points.device) for n in (width, height))
        index += [start + y[:, None] * width + columns, start + rows * width + x[:, None]]
        valid += [torch.ones_like(index[-2], dtype=torch.bool), rows != y[:, None]]
        start += height * width
    return torch.cat(index, dim=1), torch.cat(valid, dim=1)


def window_neighbours(shapes: Shapes, points: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """A square of each map around each point (Q, 2): index (Q, J) and valid (Q, J), J = L * window^2."""
    index, valid, start = [], [], 0
    step = torch.arange(window, device=points.device) - window // 2
    for height, width in shapes:
        x, y = nearest_pixels((height, width), points)
        columns = (x[:, None] + step)[:, None, :]  # (Q, 1, window)
        rows = (y[:, None] + step)[:, :, None]  # (Q, window, 1)
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        pixel = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
        index.append(start + pixel.flatten(1))
        valid.append(inside.flatten(1))
        start += height * width
    return torch.cat(index, dim=1), torch.cat(valid, dim=1)


def evenly_spaced(length: int, count: int, device: torch.device) -> Tensor:
    """At most `count` different positions in the middle of equal parts of [0, length): (min(count, length),) int64."""
    count = min(count, length)
    return (2 * torch.arange(count, device=device) + 1) * length // (2 * count)


VARIANTS: dict[str, Callable[..., KeyedAttention]] = {
    "full": FullAttention,
    "sparse_transformer": StridedAttention,
    "longformer": WindowedAttention,
    "reformer": LSHAttention,
}
ATTENTIONS = ("sparse_sampling", *VARIANTS)


def build_attention(
    name: str, d_model: int, num_heads: int, num_levels: int, num_points: int, *, cross: bool = False
) -> nn.Module:
    """The attention of one layer; all have the `forward` of `SparseSamplingAttention`.

    Args:
        name: one of `ATTENTIONS`.
        d_model, num_heads, num_levels: of the layer.
        num_points: N of sparse sampling; the others have no such number.
        cross: whether queries and values are different tokens.

    Raises:
        ValueError: an unknown name.
    """
    if name == "sparse_sampling":
        return SparseSamplingAttention(d_model, num_heads, num_levels, num_points)
    if name not in VARIANTS:
        raise ValueError(f"attention is {name!r}; it must be one of {', '.join(ATTENTIONS)}")
    return VARIANTS[name](d_model, num_heads, num_levels, cross=cross)
