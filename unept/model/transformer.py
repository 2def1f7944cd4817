"""The context branch: encoder, decoder, position and scale encoding (Eq. 5, Sec. 3.1)."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import requested_backend, use_backend
from .attention_variants import build_attention
from .dropout import Dropout
from .encoding import Shapes, reference_grid, sine_position_encoding


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear, dropout.

    Dropout comes before the ReLU. As it scales by a number >= 0, the result is the same, but what ReLU and the second
    linear layer keep for the backward is one tensor instead of two.
    """

    def __init__(self, d_model: int, hidden: int, dropout: float):
        super().__init__(
            nn.Linear(d_model, hidden), Dropout(dropout), nn.ReLU(), nn.Linear(hidden, d_model), Dropout(dropout)
        )
        for linear in (self[0], self[3]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


@dataclass(frozen=True)
class LayerSize:
    """The size of the layers of encoder and decoder, and their attention."""

    d_model: int
    """Channels of queries, values and output, a multiple of `num_heads` and of 4."""
    num_heads: int
    """Attention heads, M."""
    num_levels: int
    """Levels of the feature pyramid, L."""
    num_points: int
    """Sampled points per head and level, N."""
    ffn_dim: int
    """Hidden channels of the feed-forward network."""
    dropout: float
    """Dropout probability after each attention and in the feed-forward network."""
    attention: str = "sparse_sampling"
    """Which attention, one of `unept.model.attention_variants.ATTENTIONS`."""
    decoder_self_attention: str | None = None
    """The one of the context queries among themselves; None means `attention`."""
    zero_init_residual: bool = False
    """Start with attentions and feed-forward networks that give zero: a layer at first normalises what it is given."""

    def build_attention(self, num_levels: int, *, name: str | None = None, cross: bool = False) -> nn.Module:
        """A new attention of this size over `num_levels` levels; `cross` if queries and values are different tokens."""
        name = name or self.attention
        attention = build_attention(name, self.d_model, self.num_heads, num_levels, self.num_points, cross=cross)
        if self.zero_init_residual:
            nn.init.zeros_(attention.get_submodule("output_projection").get_parameter("weight"))
        return attention

    def build_feed_forward(self) -> FeedForward:
        """A new feed-forward network of this size."""
        feed_forward = FeedForward(self.d_model, self.ffn_dim, self.dropout)
        if self.zero_init_residual:
            nn.init.zeros_(feed_forward[3].weight)
        return feed_forward


class EncoderLayer(nn.Module):
    """Sparse self-attention over the pyramid, then a feed-forward network, each with residual and LayerNorm."""

    def __init__(self, size: LayerSize):
        super().__init__()
        self.self_attention = size.build_attention(size.num_levels)
        self.dropout = Dropout(size.dropout)
        self.norm1 = nn.LayerNorm(size.d_model)
        self.feed_forward = size.build_feed_forward()
        self.norm2 = nn.LayerNorm(size.d_model)

    def forward(self, x: Tensor, encoding: Tensor, shapes: Shapes, reference_points: Tensor) -> Tensor:
        """Update the pyramid's tokens.

        Args:
            x: (B, S, d_model), the levels one after another.
            encoding: (1, S, d_model), position and scale; added to the queries only.
            shapes: [(H_l, W_l)] of the levels.
            reference_points: (1, S, 2), (x, y) of the tokens in [0, 1].

        Returns:
            (B, S, d_model).
        """
        x = self.norm1(x + self.dropout(self.self_attention(x + encoding, x, shapes, reference_points)))
        return self.norm2(x + self.feed_forward(x))


class DecoderLayer(nn.Module):
    """Sparse self-attention on the context queries (Eq. 4), cross-attention into X_enc (Eq. 6), feed-forward."""

    def __init__(self, size: LayerSize):
        super().__init__()
        self.self_attention = size.build_attention(num_levels=1, name=size.decoder_self_attention)
        self.cross_attention = size.build_attention(size.num_levels, cross=True)
        self.dropout = Dropout(size.dropout)
        self.norm1 = nn.LayerNorm(size.d_model)
        self.norm2 = nn.LayerNorm(size.d_model)
        self.feed_forward = size.build_feed_forward()
        self.norm3 = nn.LayerNorm(size.d_model)

    def forward(
        self,
        c: Tensor,
        encoding: Tensor,
        shape: tuple[int, int],
        reference_points: Tensor,
        memory: Tensor,
        shapes: Shapes,
    ) -> Tensor:
        """Update the context queries.

        Args:
            c: (B, Q, d_model), the context queries.
            encoding: (1, Q, d_model), their position; added to the queries only.
            shape: (h, w) of the map that the queries form, Q = h * w.
            reference_points: (1, Q, 2), (x, y) of the queries in [0, 1].
            memory: (B, S, d_model), X_enc.
            shapes: [(H_l, W_l)] of its levels.

        Returns:
            (B, Q, d_model).
        """
        c = self.norm1(c + self.dropout(self.self_attention(c + encoding, c, [shape], reference_points)))
        c = self.norm2(c + self.dropout(self.cross_attention(c + encoding, memory, shapes, reference_points)))
        return self.norm3(c + self.feed_forward(c))


def _same_backend() -> Callable[[], tuple[Any, Any]]:
    """Contexts of `checkpoint`, whose second forward runs in a thread of autograd: on the backend of the first one."""
    backend = requested_backend()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with use_backend(backend):
            yield

    return lambda: (contextlib.nullcontext(), again())


class LayerStack(nn.Module):
    """The layers of encoder or decoder, one after another.

    Attributes:
        grad_checkpointing: compute each layer again in the backward instead of keeping what it computed.
    """

    grad_checkpointing = False
    layers: nn.ModuleList

    def run_layers(self, x: Tensor, *args: object) -> Tensor:
        """Pass x through all layers, each of which is given `args` too."""
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                options = {} if torch.compiler.is_compiling() else {"context_fn": _same_backend()}
                x = checkpoint(layer, x, *args, use_reentrant=False, **options)
            else:
                x = layer(x, *args)
        return x


def upsampled_levels(tokens: Tensor, shapes: Shapes, size: tuple[int, int]) -> Tensor:
    """The sum of all levels of a pyramid, each up-sampled bilinearly to one map.

    Args:
        tokens: (B, S, C), the levels one after another.
        shapes: [(H_l, W_l)] of the levels.
        size: (h, w) of the map.

    Returns:
        (B, C, h, w), of the dtype of the tokens.
    """
    levels = tokens.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
    maps = [level.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
    maps = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
    return functools.reduce(torch.add, maps)


class Encoder(LayerStack):
    """X_ms to X_enc (Eq. 5, Phi_enc): a stack of `EncoderLayer`.

    Args:
        num_layers: number of layers.
        size: of each layer.
        scale_encoding_std: standard deviation of the scale encoding at the start.
    """

    def __init__(self, num_layers: int, size: LayerSize, scale_encoding_std: float = 0.02):
        super().__init__()
        encoding = torch.randn(size.num_levels, size.d_model) * scale_encoding_std
        self.scale_encoding = nn.Parameter(encoding, requires_grad=num_layers > 0)  # without a layer nothing reads it
        self.layers = nn.ModuleList(EncoderLayer(size) for _ in range(num_layers))

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Encode the pyramid.

        Args:
            x: (B, S, d_model), X_ms, the levels one after another.
            shapes: [(H_l, W_l)] of the levels.

        Returns:
            (B, S, d_model), X_enc.
        """
        reference_points = reference_grid(shapes, x.device)
        sizes = [height * width for height, width in shapes]
        scale = torch.cat([e.expand(n, -1) for e, n in zip(self.scale_encoding, sizes, strict=True)])
        encoding = (sine_position_encoding(reference_points, x.shape[-1]) + scale).to(x.dtype)
        return self.run_layers(x, encoding, shapes, reference_points)


class Decoder(LayerStack):
    """Context queries and X_enc to the features of the prediction (Eq. 5, Phi_dec): a stack of `DecoderLayer`.

    Args:
        num_layers: number of layers.
        size: of each layer.
    """

    def __init__(self, num_layers: int, size: LayerSize):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(num_layers))

    def forward(self, queries: Tensor, memory: Tensor, shapes: Shapes) -> Tensor:
        """Decode the context queries.

        Args:
            queries: (B, d_model, h, w).
            memory: (B, S, d_model), X_enc.
            shapes: [(H_l, W_l)] of its levels.

        Returns:
            (B, d_model, h, w), channels-last in memory.
        """
        shape = (queries.shape[2], queries.shape[3])
        reference_points = reference_grid([shape], queries.device)
        encoding = sine_position_encoding(reference_points, queries.shape[1]).to(queries.dtype)
        c = queries.flatten(2).transpose(1, 2)
        c = self.run_layers(c, encoding, shape, reference_points, memory, shapes)
        return c.transpose(1, 2).unflatten(2, shape)
