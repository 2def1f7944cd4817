"""Sparse sampling attention in Triton: what its kernels share, and the forward. `sparse_attention` has the equation.

A program takes one image, one head and BLOCK_Q queries. Images and heads are the slow program axes, and queries are
taken in small blocks of neighbouring pixels (`query_order`), so that programs that run together read the same rows.
Tiles are [BLOCK_N, BLOCK_Q, WORDS], points first: a sum over points stays within a thread.

The maps are read in one of two forms:
    padded   a copy (B, M, rows, BLOCK_D) whose levels have two pixels of zeros around them. Positions are clipped into
             the border, nothing is masked, and whatever strides or odd D the value had are gone. Where the channels are
             bfloat16 they are read two at a time, as int32 words. With two pixels, not one, a clipped sample touches
             zeros only: 0 * infinity at the map's edge cannot leak into samples outside.
    masked   value itself, through its strides, each corner masked. For few samples: no copy.

Legend (see `sparse_attention` for the other letters; strides are those of the shapes there)
    pairs      (B, Q, M, L, N)      points as integers: x in the lower half, y in the upper
    geometry   (L, 5) int32         a level's height, width, rows from one pixel to the one below, row of pixel (0, 0),
                                    and the number of bilinear cells in the levels before it
    order      (Q,) int32           a permutation of the queries
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._autotune import autotune_pool, autotuned, size_bucket
from .._triton import LOWEST, device_guard, tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)

# Pixels of zeros around each level of the padded copy.
BORDER = 2

FORWARD_POOL = autotune_pool(
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 2}, num_warps=4),
    triton.Config({"BLOCK_Q": 64, "BLOCK_N": 4}, num_warps=8),
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 2}, num_warps=2),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 2}, num_warps=1),
)


def fewer_queries(config: triton.Config, arguments: Mapping[str, Any]) -> triton.Config:
    """The configuration for rows of any length: a tile keeps the size that it has with 32 channels."""
    words = arguments.get("WORDS") or arguments["BLOCK_D"]
    factor = max(1, words * (2 if arguments.get("PACKED") else 1) // 32)
    return triton.Config(
        {**config.kwargs, "BLOCK_Q": max(1, config.kwargs["BLOCK_Q"] // factor)}, num_warps=config.num_warps
    )


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def program_work(order_ptr, num_heads, num_queries, BLOCK_Q: tl.constexpr):
    """The program's image, head, queries [BLOCK_Q] and their mask: past the end the last query repeats, masked."""
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0)
    index = program % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = tl.load(order_ptr + tl.minimum(index, num_queries - 1)).to(tl.int64)
    program = program // tiles
    return (program // num_heads).to(tl.int64), (program % num_heads).to(tl.int64), query, index < num_queries


@triton.jit
def of_query(pointer, strides, batch, query, head):
    """The first point of the queries in one image and head; strides of (B, Q, M, ...)."""
    return pointer + batch * strides[0] + head * strides[2] + query * strides[1]


@triton.jit
def sample_offset(level, n, strides, WIDE: tl.constexpr):
    """How far the points n [BLOCK_N, 1] of a level lie from the query's first."""
    if WIDE:
        return tl.cast(level, tl.int64) * strides[3] + n.to(tl.int64) * strides[4]
    else:
        return level * strides[3] + n * strides[4]


@triton.jit
def load_scores(pointers, n, other, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """float32 [BLOCK_N, BLOCK_Q]; `other` past the last point."""
    if N % BLOCK_N == 0:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=n < N, other=other).to(tl.float32)


@triton.jit
def largest_score(scores_ptr, strides, num_levels, N: tl.constexpr, BLOCK_Q: tl.constexpr, WIDE: tl.constexpr):
    """Each query's largest logit, [1, BLOCK_Q]; scores_ptr [1, BLOCK_Q]."""
    BLOCK_N: tl.constexpr = 4 if N >= 4 else 1
    # Finite from the start: a query whose logits are all -inf must not turn the others into NaN.
    largest = tl.full([BLOCK_N, BLOCK_Q], LOWEST, tl.float32)
    for level in tl.range(num_levels):
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            pointers = scores_ptr + sample_offset(level, n, strides, WIDE)
            largest = tl.maximum(largest, load_scores(pointers, n, float("-inf"), N, BLOCK_N))
    return tl.max(largest, 0)[None, :]


@triton.jit
def load_weights(pointers, n, largest, N: tl.constexpr, BLOCK_N: tl.constexpr, LOCATIONS: tl.constexpr):
    """[BLOCK_N, BLOCK_Q]: attention weights, of logits not yet divided by their sum; zero past the last point."""
    if LOCATIONS:
        return load_scores(pointers, n, 0.0, N, BLOCK_N)
    else:
        # Subtracted before the change of base, which would round: logits may be large.
        return tl.exp2((load_scores(pointers, n, float("-inf"), N, BLOCK_N) - largest) * LOG2_E)


@triton.jit
def unpaired(pairs, POINT_TYPE: tl.constexpr):
    """x and y, float32, of points that are stored as one integer."""
    if tl.float32 == POINT_TYPE:
        x = pairs.to(tl.int32).to(tl.float32, bitcast=True)
        y = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        x = pairs.to(tl.int16).to(POINT_TYPE, bitcast=True).to(tl.float32)
        y = (pairs >> 16).to(tl.int16).to(POINT_TYPE, bitcast=True).to(tl.float32)
    return x, y


@triton.jit
def load_positions(
    pairs_ptr,  # [1, BLOCK_Q]
    pairs_strides,
    level,
    n,  # [BLOCK_N, 1]
    origin_x,  # [1, BLOCK_Q]: where an offset of zero lies, in pixels; unused if LOCATIONS
    origin_y,
    width,
    height,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x and y of the samples in pixels of the level, [BLOCK_N, BLOCK_Q]; past the last point they are outside."""
    pointers = pairs_ptr + sample_offset(level, n, pairs_strides, WIDE)
    if N % BLOCK_N == 0:
        x, y = unpaired(tl.load(pointers), POINT_TYPE)
    else:
        x, y = unpaired(tl.load(pointers, mask=n < N, other=0), POINT_TYPE)
    if LOCATIONS:
        x = x * width - 0.5
        y = y * height - 0.5
    else:
        x += origin_x
        y += origin_y
    if N % BLOCK_N != 0:
        # Their weight is zero, but what they read might be infinite.
        x = tl.where(n < N, x, -2.0)
    return x, y


@triton.jit
def split_position(x, y, width, height, PADDED: tl.constexpr):
    """Pixel (x0, y0) at the upper left of each sample and the fractions fx, fy past it.

    A sample that reads nothing, at NaN for one, moves to where all four corners are outside.
    """
    if PADDED:
        x = tl.minimum(tl.where(x > -1.0, x, -2.0), width.to(tl.float32))
        y = tl.minimum(tl.where(y > -1.0, y, -2.0), height.to(tl.float32))
    else:
        inside = (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
        x = tl.where(inside, x, -2.0)
        y = tl.where(inside, y, -2.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def corner_pointers(
    value_ptr, stride_s, stride_d, geometry_ptr, level, x0, y0, pitch, WORDS: tl.constexpr, WIDE: tl.constexpr
):
    """[BLOCK_N, BLOCK_Q, WORDS], of the corner at the upper left."""
    row = tl.load(geometry_ptr + 5 * level + 3) + y0 * pitch + x0
    word = tl.arange(0, WORDS)[None, None, :]
    if WIDE:
        return value_ptr + (row.to(tl.int64) * stride_s)[:, :, None] + word.to(tl.int64) * stride_d
    else:
        return value_ptr + (row * stride_s)[:, :, None] + word * stride_d


@triton.jit
def load_corner(pointers, x, y, width, height, D: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr):
    """The words of the corner at pixels (x, y) [BLOCK_N, BLOCK_Q]."""
    if PADDED:
        return tl.load(pointers)
    else:
        inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, :, None]
        if D != WORDS:
            inside = inside & (tl.arange(0, WORDS)[None, None, :] < D)
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def channels(words, PACKED: tl.constexpr):
    """float32 channels: the even and the odd ones of packed bfloat16; otherwise all, twice."""
    if PACKED:
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
        return even, odd
    else:
        value = words.to(tl.float32)
        return value, value


@triton.jit
def origin(reference_ptr, strides, size_x, size_y, LOCATIONS: tl.constexpr):
    """Where an offset of zero lies, in pixels, [1, BLOCK_Q]; reference_ptr [1, BLOCK_Q]."""
    if LOCATIONS:
        return 0.0, 0.0
    else:
        x = tl.load(reference_ptr).to(tl.float32)
        y = tl.load(reference_ptr + strides[2]).to(tl.float32)
        return x * size_x - 0.5, y * size_y - 0.5


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def pad_kernel(
    padded_ptr,  # (B, M, rows, BLOCK_D), contiguous
    value_ptr,  # (B, S, M, D)
    value_strides,
    source_ptr,  # (rows,) int32: the row of value that each row copies, -1 for zeros
    num_rows,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tiles = tl.cdiv(num_rows, BLOCK_S)
    image_head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    source = tl.load(source_ptr + row, mask=row < num_rows, other=-1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)[None, :]
    value_ptr += image_head // num_heads * value_strides[0] + image_head % num_heads * value_strides[2]
    pointers = value_ptr + source[:, None] * value_strides[1] + channel.to(tl.int64) * value_strides[3]
    words = tl.load(pointers, mask=(source >= 0)[:, None] & (channel < D), other=0.0)
    out_ptrs = padded_ptr + (image_head * num_rows + row)[:, None] * BLOCK_D + channel
    tl.store(out_ptrs, words, mask=(row < num_rows)[:, None])


@autotuned(
    FORWARD_POOL, key=["N", "D", "LOCATIONS", "PADDED"], unspecialised=["num_levels", "num_queries"], fit=fewer_queries
)
def forward_kernel(
    out_ptr,  # (B, Q, M, D), contiguous
    value_ptr,  # (B, M, rows, WORDS), or (B, S, M, D) with strides in this order: B, M, S, D
    value_strides,
    pairs_ptr,  # (B, Q, M, L, N)
    pairs_strides,
    scores_ptr,  # (B, Q, M, L, N)
    scores_strides,
    reference_ptr,  # (B, Q, 2), or None
    reference_strides,
    order_ptr,  # (Q,)
    geometry_ptr,  # (L, 5)
    num_levels,
    num_heads,
    num_queries,
    size_bucket,
    N: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,  # no reference: points are in [0, 1] and scores are weights
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, head, queries, counts = program_work(order_ptr, num_heads, num_queries, BLOCK_Q)
    query = queries[None, :]  # [1, BLOCK_Q]
    pairs_ptr = of_query(pairs_ptr, pairs_strides, batch, query, head)
    scores_ptr = of_query(scores_ptr, scores_strides, batch, query, head)
    value_ptr += batch * value_strides[0] + head * value_strides[1]
    stride_s = WORDS if PADDED else value_strides[2]
    stride_d = 1 if PADDED else value_strides[3]
    if not LOCATIONS:
        reference_ptr += batch * reference_strides[0] + query * reference_strides[1]
        largest = largest_score(scores_ptr, scores_strides, num_levels, N, BLOCK_Q, WIDE)
    else:
        largest = 0.0

    even = tl.zeros([BLOCK_N, BLOCK_Q, WORDS], tl.float32)
    odd = tl.zeros([BLOCK_N, BLOCK_Q, WORDS], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for level in tl.range(num_levels):
        height = tl.load(geometry_ptr + 5 * level)
        width = tl.load(geometry_ptr + 5 * level + 1)
        pitch = tl.load(geometry_ptr + 5 * level + 2)
        origin_x, origin_y = origin(reference_ptr, reference_strides, width, height, LOCATIONS)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            x, y = load_positions(
                pairs_ptr, pairs_strides, level, n, origin_x, origin_y, width, height, N, BLOCK_N, POINT_TYPE,
                LOCATIONS, WIDE,
            )  # fmt: skip
            x0, y0, fx, fy = split_position(x, y, width, height, PADDED)
            score_ptrs = scores_ptr + sample_offset(level, n, scores_strides, WIDE)
            weight = load_weights(score_ptrs, n, largest, N, BLOCK_N, LOCATIONS)
            total += weight
            pointers = corner_pointers(value_ptr, stride_s, stride_d, geometry_ptr, level, x0, y0, pitch, WORDS, WIDE)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    step = (dy * pitch + dx) * stride_s
                    words = load_corner(pointers + step, x0 + dx, y0 + dy, width, height, D, WORDS, PADDED)
                    along_y = weight * fy if dy == 1 else weight - weight * fy
                    share = (along_y * fx if dx == 1 else along_y - along_y * fx)[:, :, None]
                    first, second = channels(words, PACKED)
                    even += first * share
                    if PACKED:
                        odd += second * share

    out = tl.sum(even, 0)
    if PACKED:
        out = tl.join(out, tl.sum(odd, 0)).reshape(BLOCK_Q, 2 * WORDS)
    if not LOCATIONS:
        out = out / tl.sum(total, 0)[:, None]
    BLOCK_D: tl.constexpr = 2 * WORDS if PACKED else WORDS
    channel = tl.arange(0, BLOCK_D)[None, :]
    rows = (batch * num_queries + queries) * num_heads + head
    mask = counts[:, None] & (channel < D)
    tl.store(out_ptr + rows[:, None] * D + channel, out.to(out_ptr.dtype.element_ty), mask=mask)


# --- tables -----------------------------------------------------------------------------------------------------------
# A copy to a GPU waits for it, so that each list of shapes is copied once. Tables and not constants: every size of
# image then runs the same compiled kernels. Never dropped, since a CUDA graph may hold their addresses; and copied even
# where they could be filled on the device, so that no stream finds one unwritten.


@cache
def geometry(shapes: tuple[int, ...], padded: bool, device: torch.device) -> Tensor:
    """(L, 5) int32, as in the legend."""
    heights, widths = shapes[::2], shapes[1::2]
    border = BORDER if padded else 0
    pitches = [width + 2 * border for width in widths]
    rows = [(height + 2 * border) * pitch for height, pitch in zip(heights, pitches, strict=True)]
    starts = accumulate(rows[:-1], initial=0)
    firsts = [start + border * pitch + border for start, pitch in zip(starts, pitches, strict=True)]
    cells = accumulate(((h + 1) * (w + 1) for h, w in zip(heights[:-1], widths[:-1], strict=True)), initial=0)
    table = list(zip(heights, widths, pitches, firsts, cells, strict=True))
    return torch.tensor(table, dtype=torch.int32, device=device)


@cache
def padded_source(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(rows,) int32: which row of value each row of the padded copy holds, -1 for the zeros around a level."""
    parts, start = [], 0
    for height, width in zip(shapes[::2], shapes[1::2], strict=True):
        rows = torch.arange(start, start + height * width, dtype=torch.int32).view(height, width)
        parts.append(torch.nn.functional.pad(rows, [BORDER] * 4, value=-1).flatten())
        start += height * width
    return torch.cat(parts).to(device)


@cache
def query_order(shapes: tuple[int, ...], queries: int, device: torch.device) -> Tensor:
    """(Q,) int32: the queries in strips of 8 rows of pixels, column by column, so that 64 in a row are a block of 8x8.

    Queries that are as many as the pixels of all levels, or of one, are taken to be those pixels. If they are not, the
    order is still a permutation: it changes the speed and not the result.
    """
    sizes = list(zip(shapes[::2], shapes[1::2], strict=True))
    if queries != sum(height * width for height, width in sizes):
        sizes = [size for size in sizes if size[0] * size[1] == queries][:1]
    if not sizes:
        return torch.arange(queries, dtype=torch.int32).to(device)
    parts, start = [], 0
    for height, width in sizes:
        rows = torch.arange(start, start + height * width, dtype=torch.int32).view(height, width)
        parts += [strip.t().flatten() for strip in rows.split(8)]
        start += height * width
    return torch.cat(parts).to(device)


# --- launchers --------------------------------------------------------------------------------------------------------


def paired(points: Tensor) -> Tensor:
    """(..., 2) -> (...): x and y side by side in one integer; a copy only where they don't lie so."""
    if points.dtype == torch.float64:
        points = points.float()
    even = all(stride % 2 == 0 for stride in points.stride()[:-1]) and points.storage_offset() % 2 == 0
    aligned = points.data_ptr() % (2 * points.element_size()) == 0
    if points.stride(-1) != 1 or not (even and aligned):
        points = points.clone(memory_format=torch.contiguous_format)
    return points.view(torch.int64 if points.dtype == torch.float32 else torch.int32).squeeze(-1)


def copy_pays(value: Tensor, points: Tensor) -> bool:
    """Whether a padded copy of value is worth its making: it costs time for each byte of the maps, masks do for each
    sample. Predicted from instruction counts and the bandwidth of an H200, not measured."""
    samples = points.shape[1] * points.shape[3] * points.shape[4]
    return 8 * samples > value.shape[1] * value.shape[3] * value.itemsize


def pad_value(value: Tensor, shapes: tuple[int, ...]) -> Tensor:
    """(B, S, M, D) -> (B, M, rows, BLOCK_D), the padded copy."""
    batch, _, heads, channel_count = value.shape
    source = padded_source(shapes, value.device)
    block_d = max(2, triton.next_power_of_2(channel_count))
    padded = value.new_empty((batch, heads, len(source), block_d))
    block_s = max(1, 4096 // block_d)
    pad_kernel[(triton.cdiv(len(source), block_s) * batch * heads,)](
        padded,
        value,
        value.stride(),
        source,
        len(source),
        heads,
        D=channel_count,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        num_warps=4,
    )
    return padded


def extent(tensor: Tensor, dimensions: Sequence[int]) -> int:
    """The largest distance, in elements, between two along these dimensions."""
    return sum((tensor.shape[i] - 1) * abs(tensor.stride(i)) for i in dimensions)


def map_arguments(value: Tensor, shapes: Sequence[int], points: Tensor) -> dict[str, Any]:
    """What kernels that read maps take of them."""
    flat, channel_count = tuple(shapes), value.shape[3]
    padded = copy_pays(value, points)
    packed = padded and value.dtype == torch.bfloat16
    if padded:
        value = pad_value(value, flat)
        value = value.view(torch.int32) if packed else value
    else:
        value = value.transpose(1, 2)
    return {
        "value_ptr": value,
        "value_strides": value.stride(),
        "geometry_ptr": geometry(flat, padded, value.device),
        "D": channel_count,
        "WORDS": value.shape[3] if padded else triton.next_power_of_2(channel_count),
        "PADDED": padded,
        "PACKED": packed,
        # Masked corners lie up to a row and two pixels outside, whose addresses are computed all the same.
        "WIDE": extent(value, (2, 3)) + 2 * (max(shapes[1::2]) + 2) * abs(value.stride(2)) >= 2**31,
    }


def sample_arguments(shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> dict[str, Any]:
    """What all kernels that walk over the samples take of them."""
    batch, queries, heads, num_levels, num_points, _ = points.shape
    pairs = paired(points)
    if reference is not None:
        reference = reference.expand(batch, -1, -1)
    return {
        "pairs_ptr": pairs,
        "pairs_strides": pairs.stride(),
        "scores_ptr": scores,
        "scores_strides": scores.stride(),
        "reference_ptr": reference,
        "reference_strides": (0, 0, 0) if reference is None else reference.stride(),
        "order_ptr": query_order(tuple(shapes), queries, points.device),
        "num_levels": num_levels,
        "num_heads": heads,
        "num_queries": queries,
        "size_bucket": size_bucket(batch * heads * queries),
        "N": num_points,
        "POINT_TYPE": {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(points.dtype, tl.float32),
        "LOCATIONS": reference is None,
        "WIDE": max(extent(pairs, (3, 4)), extent(scores, (3, 4))) >= 2**31,
        "enable_fp_fusion": True,
    }


def merged(*arguments: dict[str, Any]) -> dict[str, Any]:
    """One dictionary; WIDE if any says so."""
    result = {name: value for part in arguments for name, value in part.items()}
    result["WIDE"] = any(part.get("WIDE", False) for part in arguments)
    return result


def tile_grid(points: Tensor) -> Callable[[dict[str, int]], tuple[int]]:
    """A program for every BLOCK_Q queries of an image and a head."""
    batch, queries, heads = points.shape[:3]
    return lambda config: (triton.cdiv(queries, config["BLOCK_Q"]) * batch * heads,)


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    """The output (B, Q, M * D)."""
    out = value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))
    with device_guard(value):
        arguments = merged(map_arguments(value, shapes, points), sample_arguments(shapes, points, scores, reference))
        forward_kernel[tile_grid(points)](out_ptr=out, **arguments)
    return out
