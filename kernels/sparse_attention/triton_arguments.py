"""What the launchers of sparse sampling attention share: tables, the padded copy of the maps, and kernel arguments.

`triton_common` has the legend.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._autotune import size_bucket
from .._tables import cached_table
from .._triton import device_guard, jit, strides, tl, triton
from .levels import levels

# Pixels of zeros around each level of the padded copy.
BORDER = 2


# --- tables -----------------------------------------------------------------------------------------------------------
# Tables and not constants: every size of image then runs the same compiled kernels. `_tables` says how long they stay.
# They are copied even where they could be filled on the device, so that no stream finds one unwritten.


@cached_table
def geometry(shapes: tuple[int, ...], padded: bool, device: torch.device) -> Tensor:
    """(L, 5) int32, as in the legend."""
    border = BORDER if padded else 0
    heights, widths = shapes[::2], shapes[1::2]
    pitches = [width + 2 * border for width in widths]
    rows = [(height + 2 * border) * pitch for height, pitch in zip(heights, pitches, strict=True)]
    starts = accumulate(rows[:-1], initial=0)
    first_rows = [start + border * pitch + border for start, pitch in zip(starts, pitches, strict=True)]
    first_cells = accumulate(((h + 1) * (w + 1) for h, w in zip(heights[:-1], widths[:-1], strict=True)), initial=0)
    table = list(zip(heights, widths, pitches, first_rows, first_cells, strict=True))
    return torch.tensor(table, dtype=torch.int32, device=device)


@cached_table
def padded_source(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(R,) int32: which row of value each row of the padded copy holds, -1 for the zeros around a level."""
    parts = []
    for _, start, height, width in levels(shapes):
        rows = torch.arange(start, start + height * width, dtype=torch.int32).view(height, width)
        parts.append(torch.nn.functional.pad(rows, [BORDER] * 4, value=-1).flatten())
    return torch.cat(parts).to(device)


@cached_table
def query_order(shapes: tuple[int, ...], Q: int, device: torch.device) -> Tensor:
    """(Q,) int32: the queries in strips of 8 rows of pixels, column by column, so that 64 in a row are a block of 8x8.

    Queries that are as many as the pixels of all levels, or of one, are taken to be those pixels. If they are not, the
    order is still a permutation: it changes the speed and not the result.
    """
    maps = list(levels(shapes))
    if sum(height * width for _, _, height, width in maps) != Q:
        maps = [level._replace(start=0) for level in maps if level.height * level.width == Q][:1]
    if not maps:
        return torch.arange(Q, dtype=torch.int32).to(device)
    parts = []
    for _, start, height, width in maps:
        rows = torch.arange(start, start + height * width, dtype=torch.int32).view(height, width)
        parts += [strip.t().flatten() for strip in rows.split(8)]
    return torch.cat(parts).to(device)


# --- the padded copy --------------------------------------------------------------------------------------------------


@jit(unspecialised=["R"])
def pad_kernel(
    padded_ptr,  # (B, M, R, BLOCK_D), contiguous
    value_ptr,  # (B, S, M, D)
    source_ptr,  # (R,) int32: the row of value that each row copies, -1 for zeros
    value_strides,
    R,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Copy value with zeros around each level; a program takes BLOCK_S rows of one image and head."""
    tiles = tl.cdiv(R, BLOCK_S)
    image_head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    # [BLOCK_S]
    source = tl.load(source_ptr + row, mask=row < R, other=-1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)[None, :]
    value_ptr += image_head // M * value_strides[0] + image_head % M * value_strides[2]
    pointers = value_ptr + source[:, None] * value_strides[1] + channel.to(tl.int64) * value_strides[3]
    # [BLOCK_S, BLOCK_D]
    words = tl.load(pointers, mask=(source >= 0)[:, None] & (channel < D), other=0.0)
    out_pointers = padded_ptr + (image_head * R + row)[:, None] * BLOCK_D + channel
    tl.store(out_pointers, words, mask=(row < R)[:, None])


def pad_value(value: Tensor, shapes: Sequence[int]) -> Tensor:
    """(B, S, M, D) -> (B, M, R, BLOCK_D), the padded copy."""
    B, _, M, D = value.shape
    source = padded_source(tuple(shapes), value.device)
    R = len(source)
    block_d = max(2, triton.next_power_of_2(D))
    block_s = max(1, 4096 // block_d)
    padded = value.new_empty((B, M, R, block_d))
    with device_guard(value):
        pad_kernel[(triton.cdiv(R, block_s) * B * M,)](
            padded_ptr=padded,
            value_ptr=value,
            source_ptr=source,
            value_strides=value.stride(),
            R=R,
            M=M,
            D=D,
            BLOCK_D=block_d,
            BLOCK_S=block_s,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return padded


# --- arguments --------------------------------------------------------------------------------------------------------


def max_offset(tensor: Tensor, dimensions: Sequence[int]) -> int:
    """The largest distance, in elements, between two elements of a tensor along these dimensions."""
    return sum((tensor.shape[i] - 1) * abs(tensor.stride(i)) for i in dimensions)


def pack_points(points: Tensor) -> Tensor:
    """(..., 2) -> (...): x and y side by side in one integer; a copy only where they don't lie so."""
    if points.dtype == torch.float64:
        points = points.float()
    even = all(stride % 2 == 0 for stride in points.stride()[:-1]) and points.storage_offset() % 2 == 0
    aligned = points.data_ptr() % (2 * points.element_size()) == 0
    if points.stride(-1) != 1 or not (even and aligned):
        points = points.clone(memory_format=torch.contiguous_format)
    return points.view(torch.int64 if points.dtype == torch.float32 else torch.int32).squeeze(-1)


@dataclass(frozen=True)
class Samples:
    """The samples as kernels take them."""

    pairs: Tensor
    """(B, Q, M, L, N)"""
    scores: Tensor
    """(B, Q, M, L, N)"""
    reference: Tensor | None
    """(B, Q, 2); None if points are locations and scores are weights."""
    order: Tensor
    """(Q,)"""
    point_type: "tl.dtype"
    """The dtype of x and y in `pairs`."""
    size_bucket: int

    @cached_property
    def unit(self) -> int:
        """The largest power of two, up to 16, that divides the strides of points and scores, but for the last."""
        return math.gcd(16, *self.pairs.stride()[:-1], *self.scores.stride()[:-1])

    @cached_property
    def strides(self) -> dict[str, int]:
        """Strides as kernels take them, those of points and scores in units."""
        named = strides("reference", "bqi", self.reference)
        for name, tensor in (("pairs", self.pairs), ("scores", self.scores)):
            *outer, last = tensor.stride()
            in_units = [stride // self.unit for stride in outer]
            named |= {f"{name}_stride_{axis}": n for axis, n in zip("bqmln", [*in_units, last], strict=True)}
        return named

    @property
    def per_image(self) -> int:
        """The number of samples in one image."""
        return math.prod(self.pairs.shape[1:])

    @cached_property
    def int64_index(self) -> bool:
        """Whether the points of one query lie further apart than 32-bit integers count."""
        return max(max_offset(self.pairs, (3, 4)), max_offset(self.scores, (3, 4))) >= 2**31

    def images(self, part: slice) -> "Samples":
        """The samples of some of the images, in the same size bucket."""
        reference = None if self.reference is None else self.reference[part]
        return replace(self, pairs=self.pairs[part], scores=self.scores[part], reference=reference)


def make_samples(shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Samples:
    """The samples of the op's arguments."""
    B, Q, M, _, _, _ = points.shape
    return Samples(
        pairs=pack_points(points),
        scores=scores,
        reference=None if reference is None else reference.expand(B, -1, -1),
        order=query_order(tuple(shapes), Q, points.device),
        point_type={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(points.dtype, tl.float32),
        size_bucket=size_bucket(B * M * Q),
    )


@dataclass(frozen=True)
class Maps:
    """The maps as kernels take them, in one of the two forms."""

    value: Tensor
    """(B, M, R, WORDS) if padded, otherwise (B, M, S, D)."""
    geometry: Tensor
    """(L, 5)"""
    D: int
    words: int
    padded: bool
    packed: bool
    """Whether `value` holds two bfloat16 channels in each int32."""
    int64_index: bool
    """Whether two corners of one head lie further apart than 32-bit integers count."""


def make_maps(value: Tensor, padded: Tensor | None, shapes: Sequence[int]) -> Maps:
    """The maps of value (B, S, M, D): its padded copy if there is one, otherwise value itself."""
    D = value.shape[3]
    packed = padded is not None and value.dtype == torch.bfloat16
    maps = value.transpose(1, 2) if padded is None else padded.view(torch.int32) if packed else padded
    # Masked corners lie up to a row and two pixels outside, whose addresses are computed all the same.
    outside = 2 * (max(shapes[1::2]) + 2) * abs(maps.stride(2))
    # Two at least: with one word the compiler lays out the two passes of the points' gradient differently.
    words = max(2, triton.next_power_of_2(D)) if padded is None else maps.shape[3]
    return Maps(
        value=maps,
        geometry=geometry(tuple(shapes), padded is not None, value.device),
        D=D,
        words=words,
        padded=padded is not None,
        packed=packed,
        int64_index=max_offset(maps, (2, 3)) + outside >= 2**31,
    )


def query_grid(samples: Samples) -> Callable[[Mapping[str, int]], tuple[int]]:
    """The grid with one program for every BLOCK_Q queries of one image and head."""
    B, Q, M, _, _ = samples.pairs.shape
    return lambda config: (triton.cdiv(Q, config["BLOCK_Q"]) * B * M,)


def scale_block_q(config: "triton.Config", arguments: Mapping[str, Any]) -> "triton.Config":
    """The configuration for rows of any length: a tile keeps the size that it has with 32 channels.

    Tiles of twice that size, of more than 32 channels per thread, are for packed heads of 64 channels: there they take
    a fifth fewer instructions and nearly all registers. Elsewhere they are halved, and then are others of the pool.
    """
    channels = (arguments.get("WORDS") or arguments["BLOCK_D"]) * (2 if arguments.get("PACKED") else 1)
    block_q = config.kwargs["BLOCK_Q"] // max(1, channels // 32)
    is_double = config.kwargs["BLOCK_Q"] * config.kwargs["BLOCK_N"] > 32 * config.num_warps
    if is_double and not (arguments.get("PACKED") and channels == 64):
        block_q //= 2
    return triton.Config({**config.kwargs, "BLOCK_Q": max(1, block_q)}, num_warps=config.num_warps)
