"""Sparse sampling attention in Triton: how the kernels work, and the device functions that they share.

A program takes one image, one head and BLOCK_Q queries. Images and heads are the slow program axes, and queries are
taken in small blocks of neighbouring pixels (`query_order`), so that programs that run together read the same rows.
Tiles are [BLOCK_N, BLOCK_Q, WORDS], points first: a sum over points stays within a thread.

The maps are read in one of two forms:
    padded   a copy (B, M, R, BLOCK_D) whose levels have two pixels of zeros around them. Positions are clipped into
             the border, nothing is masked, and whatever strides or odd D the value had are gone. Where the channels are
             bfloat16 they are read two at a time, as int32 words. With two pixels, not one, a clipped sample touches
             zeros only: 0 * infinity at the map's edge cannot leak into samples outside.
    masked   value itself, through its strides, each corner masked. For few samples: no copy.

Legend (`op` has the equation and the letters B, S, M, D, Q, L, N)
    R          rows of one head's padded maps
    WORDS      loads per pixel: D up to a power of two, half of that where two channels make one word (PACKED)
    pairs      (B, Q, M, L, N)      points as integers: x in the lower half, y in the upper
    UNIT       a power of two that divides the strides of points and scores, but for the last: what Triton may know of
               them whatever Q is. Strides are passed as multiples of it
    geometry   (L, 5) int32         the columns height, width, pitch, first_row, first_cell of each `Level`
    order      (Q,) int32           a permutation of the queries
"""

from typing import Any, NamedTuple

from .._triton import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)


# --- device tuples ----------------------------------------------------------------------------------------------------
# What device functions pass to each other: tensors of a kernel, scalars where no shape is given.


class Level(NamedTuple):
    """One level and its row in `geometry`, all int32."""

    index: Any
    height: Any
    width: Any
    pitch: Any
    """Rows of the maps from one pixel to the one below it."""
    first_row: Any
    """Row of pixel (0, 0)."""
    first_cell: Any
    """Number of bilinear cells in the levels before."""


class QueryPoints(NamedTuple):
    """Where the points of some queries lie in a tensor (B, Q, M, L, N)."""

    pointers: Any
    """[1, BLOCK_Q], of each query's first point."""
    stride_l: Any
    stride_n: Any


class Tile(NamedTuple):
    """The work of one program."""

    batch: Any
    head: Any
    query: Any
    """[BLOCK_Q] int64; past the end the last query repeats, masked."""
    mask: Any
    """[BLOCK_Q]"""
    row: Any
    """[BLOCK_Q] int64, the query's row in a contiguous tensor (B, Q, M, ...)."""
    pairs: QueryPoints
    scores: QueryPoints


class HeadMaps(NamedTuple):
    """The maps of one image and head."""

    pointer: Any
    stride_s: Any
    stride_d: Any


# --- device functions: queries, points and scores ---------------------------------------------------------------------


@triton.jit
def program_ids(order_ptr, M, Q, BLOCK_Q: tl.constexpr):
    """The program's image, head, queries [BLOCK_Q] and their mask: past the end the last query repeats, masked."""
    tiles = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
    index = program % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = tl.load(order_ptr + tl.minimum(index, Q - 1)).to(tl.int64)
    program = program // tiles
    return (program // M).to(tl.int64), (program % M).to(tl.int64), query, index < Q


@triton.jit
def query_points(pointer, strides, batch, query, head, UNIT: tl.constexpr, INT64_INDEX: tl.constexpr):
    """The points of queries [1, BLOCK_Q] in a tensor (B, Q, M, L, N); strides but the last are in UNITs."""
    pointers = pointer + (batch * strides[0] + head * strides[2] + query * strides[1]) * UNIT
    stride_l = tl.cast(strides[3], tl.int64 if INT64_INDEX else tl.int32) * UNIT
    return QueryPoints(pointers=pointers, stride_l=stride_l, stride_n=strides[4])


@triton.jit
def load_tile(order_ptr, pairs, scores, M, Q, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, INT64_INDEX: tl.constexpr):
    """The program's work; pairs and scores are (pointer, strides)."""
    batch, head, query, mask = program_ids(order_ptr, M, Q, BLOCK_Q)
    return Tile(
        batch=batch,
        head=head,
        query=query,
        mask=mask,
        row=(batch * Q + query) * M + head,
        pairs=query_points(pairs[0], pairs[1], batch, query[None, :], head, UNIT, INT64_INDEX),
        scores=query_points(scores[0], scores[1], batch, query[None, :], head, UNIT, INT64_INDEX),
    )


@triton.jit
def load_level(geometry_ptr, index):
    """The level with this index."""
    row_ptr = geometry_ptr + 5 * index
    return Level(
        index=index,
        height=tl.load(row_ptr),
        width=tl.load(row_ptr + 1),
        pitch=tl.load(row_ptr + 2),
        first_row=tl.load(row_ptr + 3),
        first_cell=tl.load(row_ptr + 4),
    )


@triton.jit
def load_origin(reference, tile, level, LOCATIONS: tl.constexpr):
    """x and y of an offset of zero in pixels of a level, [1, BLOCK_Q] each; reference is (pointer, strides)."""
    if LOCATIONS:
        return 0.0, 0.0
    else:
        pointer, strides = reference
        pointers = pointer + tile.batch * strides[0] + tile.query[None, :] * strides[1]
        x = tl.load(pointers).to(tl.float32)
        y = tl.load(pointers + strides[2]).to(tl.float32)
        return x * level.width - 0.5, y * level.height - 0.5


@triton.jit
def point_pointers(points, index, n, INT64_INDEX: tl.constexpr):
    """[BLOCK_N, BLOCK_Q], of the points n [BLOCK_N, 1] of the level with this index; `points` are QueryPoints."""
    if INT64_INDEX:
        return points.pointers + (tl.cast(index, tl.int64) * points.stride_l + n.to(tl.int64) * points.stride_n)
    else:
        return points.pointers + (index * points.stride_l + n * points.stride_n)


@triton.jit
def load_scores(pointers, n, other, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """float32 [BLOCK_N, BLOCK_Q]; `other` past the last point."""
    if N % BLOCK_N == 0:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=n < N, other=other).to(tl.float32)


@triton.jit
def load_weights(pointers, n, largest, N: tl.constexpr, BLOCK_N: tl.constexpr, LOCATIONS: tl.constexpr):
    """[BLOCK_N, BLOCK_Q]: attention weights, of logits not yet divided by their sum; zero past the last point."""
    if LOCATIONS:
        return load_scores(pointers, n, 0.0, N, BLOCK_N)
    else:
        # Subtracted before the change of base, which would round: logits may be large.
        return tl.exp2((load_scores(pointers, n, float("-inf"), N, BLOCK_N) - largest) * LOG2_E)


@triton.jit
def unpack_xy(pairs, POINT_TYPE: tl.constexpr):
    """x and y, float32, of points that are stored as one integer."""
    if tl.float32 == POINT_TYPE:
        x = pairs.to(tl.int32).to(tl.float32, bitcast=True)
        y = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        x = pairs.to(tl.int16).to(POINT_TYPE, bitcast=True).to(tl.float32)
        y = (pairs >> 16).to(tl.int16).to(POINT_TYPE, bitcast=True).to(tl.float32)
    return x, y


@triton.jit
def pack_xy(x, y, POINT_TYPE: tl.constexpr):
    """The inverse of `unpack_xy`."""
    if tl.float32 == POINT_TYPE:
        low = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        return low | (y.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    else:
        low = x.to(POINT_TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (y.to(POINT_TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def load_positions(
    pairs,
    origin,
    level,
    n,  # [BLOCK_N, 1]
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    INT64_INDEX: tl.constexpr,
):
    """x and y of the samples in pixels of a level, [BLOCK_N, BLOCK_Q]; past the last point they are outside."""
    pointers = point_pointers(pairs, level.index, n, INT64_INDEX)
    if N % BLOCK_N == 0:
        x, y = unpack_xy(tl.load(pointers), POINT_TYPE)
    else:
        x, y = unpack_xy(tl.load(pointers, mask=n < N, other=0), POINT_TYPE)
    if LOCATIONS:
        x = x * level.width - 0.5
        y = y * level.height - 0.5
    else:
        x += origin[0]
        y += origin[1]
    if N % BLOCK_N != 0:
        # Their weight is zero, but what they read might be infinite.
        x = tl.where(n < N, x, -2.0)
    return x, y


@triton.jit
def load_sample(
    tile,
    reference,  # pointer and strides
    normaliser_ptr,  # (B, Q, M, 2), or None
    level,
    n,  # [BLOCK_N, 1]
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    INT64_INDEX: tl.constexpr,
):
    """x, y, weight and whether the sample reads anything, each [BLOCK_N, BLOCK_Q]."""
    origin = load_origin(reference, tile, level, LOCATIONS)
    x, y = load_positions(tile.pairs, origin, level, n, N, BLOCK_N, POINT_TYPE, LOCATIONS, INT64_INDEX)
    score_pointers = point_pointers(tile.scores, level.index, n, INT64_INDEX)
    if LOCATIONS:
        weight = load_scores(score_pointers, n, 0.0, N, BLOCK_N)
    else:
        pointers = normaliser_ptr + tile.row[None, :] * 2
        largest, inverse_total = tl.load(pointers), tl.load(pointers + 1)
        weight = load_weights(score_pointers, n, largest, N, BLOCK_N, False) * inverse_total
    in_bounds = (x > -1.0) & (x < level.width) & (y > -1.0) & (y < level.height)
    return x, y, weight, in_bounds & (n < N) & tile.mask[None, :]


# --- device functions: maps -------------------------------------------------------------------------------------------


@triton.jit
def split_position(x, y, level, PADDED: tl.constexpr):
    """Pixel (x0, y0) at the upper left of each sample and the fractions fx, fy past it.

    A sample that reads nothing, at NaN for one, moves to where all four corners are outside.
    """
    if PADDED:
        x = tl.minimum(tl.where(x > -1.0, x, -2.0), level.width.to(tl.float32))
        y = tl.minimum(tl.where(y > -1.0, y, -2.0), level.height.to(tl.float32))
    else:
        in_bounds = (x > -1.0) & (x < level.width) & (y > -1.0) & (y < level.height)
        x = tl.where(in_bounds, x, -2.0)
        y = tl.where(in_bounds, y, -2.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def head_maps(value_ptr, strides, batch, head, WORDS: tl.constexpr, PADDED: tl.constexpr):
    """The maps of one image and head; strides of B, M, S, D."""
    pointer = value_ptr + batch * strides[0] + head * strides[1]
    if PADDED:
        return HeadMaps(pointer=pointer, stride_s=WORDS, stride_d=1)
    else:
        return HeadMaps(pointer=pointer, stride_s=strides[2], stride_d=strides[3])


@triton.jit
def corner_pointers(maps, level, x0, y0, WORDS: tl.constexpr, INT64_INDEX: tl.constexpr):
    """[BLOCK_N, BLOCK_Q, WORDS], of the pixels (x0, y0) [BLOCK_N, BLOCK_Q]."""
    row = level.first_row + y0 * level.pitch + x0
    word = tl.arange(0, WORDS)[None, None, :]
    if INT64_INDEX:
        return maps.pointer + (row.to(tl.int64) * maps.stride_s)[:, :, None] + word.to(tl.int64) * maps.stride_d
    else:
        return maps.pointer + (row * maps.stride_s)[:, :, None] + word * maps.stride_d


@triton.jit
def corner_step(maps, level, dx: tl.constexpr, dy: tl.constexpr, INT64_INDEX: tl.constexpr):
    """Elements from a pixel to the one dx to its right and dy below."""
    rows = dy * level.pitch + dx
    if INT64_INDEX:
        return rows.to(tl.int64) * maps.stride_s
    else:
        return rows * maps.stride_s


@triton.jit
def load_corner(pointers, x, y, level, D: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr):
    """The words [BLOCK_N, BLOCK_Q, WORDS] of the pixels (x, y) [BLOCK_N, BLOCK_Q]; zero outside the map."""
    if PADDED:
        return tl.load(pointers)
    else:
        in_bounds = ((x >= 0) & (x < level.width) & (y >= 0) & (y < level.height))[:, :, None]
        if D != WORDS:
            in_bounds = in_bounds & (tl.arange(0, WORDS)[None, None, :] < D)
        return tl.load(pointers, mask=in_bounds, other=0.0)


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
