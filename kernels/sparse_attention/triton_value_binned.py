"""Sparse sampling attention in Triton, backward: the gradient of the value from samples sorted by position.

The samples are sorted by the bilinear cell that they lie in: counted, given a place, written there as records of 16
bytes. A program then owns a window of 16 pixels x some rows, reads the records of its cells and adds

    grad_value[16, D] += tent_weights[16, records] @ grad_out[records, D]

by the tensor cores. Every pixel is written once, in its final dtype. A cell is the square between four pixel centres;
(H + 1) * (W + 1) of them, the outermost half outside, hold all samples of a level that read anything. NaN and infinity
in grad_out reach all pixels of a window. Images are binned a few at a time, to bound the memory of the records.

Legend (`triton_common` has the rest)
    B         here the images that are binned at a time
    C         bilinear cells of all levels, sum of (H_l + 1) * (W_l + 1)
    T         windows of all levels
    starts    (B * M * C + 1,) int32       where each cell's records begin
    records   (samples, 2) int64           x and y - floor(y); weight and query: float32, float32; float32, int32
    windows   (T, 3) int32                 level, first column and first row of each window
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autotune import autotuned
from .._tables import cached_table
from .._triton import PRECISION, dot, jit, operand, tl, triton
from .levels import levels
from .triton_arguments import Samples, geometry
from .triton_common import load_level, load_sample, load_tile, pack_xy, split_position, unpack_xy

WINDOW_ROWS = 4
WINDOW_COLUMNS = tl.constexpr(16)  # what a tensor core multiplies at a time

# Records are held of as many images at a time as take no more bytes than this, or than a part of the free memory.
MAX_RECORD_BYTES = 1 << 28
SHARE_OF_FREE_MEMORY = 4
RECORD_BYTES = 16

WINDOW_POOL = [
    triton.Config({"BLOCK_R": 32}, num_warps=1),
    triton.Config({"BLOCK_R": 64}, num_warps=2),
    triton.Config({"BLOCK_R": 16}, num_warps=1),
]


# A program holds the sums of its pixels in registers and the rows of some records in shared memory: in float32 the
# latter take 70 KB. Longer rows, of heads such as no network has, are left to atomics.
MAX_CHANNELS = 512
MAX_RECORD_ELEMENTS = 1 << 13


def fit_rows(config: "triton.Config", arguments: Mapping[str, Any]) -> "triton.Config":
    """The configuration for rows of any length: more threads for its sums, and fewer records at a time in float32."""
    block_r, block_d = config.kwargs["BLOCK_R"], arguments["BLOCK_D"]
    if arguments["DOT_TYPE"] == tl.float32:
        block_r = max(16, min(block_r, MAX_RECORD_ELEMENTS // block_d))
    return triton.Config({"BLOCK_R": block_r}, num_warps=min(8, config.num_warps * max(1, block_d // 32)))


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def load_records(records_ptr, record, valid):
    """x, y - floor(y), weight (float32) and query (int64) of the records [BLOCK_R]."""
    pointers = records_ptr + (record.to(tl.int64) * 2)[:, None] + tl.arange(0, 2)[None, :]
    position, share = tl.split(tl.load(pointers, mask=valid[:, None], other=0))
    x, fy = unpack_xy(position, tl.float32)
    return x, fy, share.to(tl.int32).to(tl.float32, bitcast=True), share >> 32


# --- kernels ----------------------------------------------------------------------------------------------------------


@jit(unspecialised=["C", "Q", "L"], unaligned=["reference_ptr"])
def bin_backward_kernel(
    cursor_ptr,  # (B, M, C) int32: COUNT adds the samples of each cell; otherwise the next free record
    records_ptr,  # (samples, 2) int64; None if COUNT
    normaliser_ptr,  # (B, Q, M, 2), or None
    pairs_ptr,  # (B, Q, M, L, N)
    scores_ptr,  # (B, Q, M, L, N)
    reference_ptr,  # (B, Q, 2), or None
    order_ptr,  # (Q,)
    geometry_ptr,  # (L, 5), of maps that are not padded
    pairs_stride_b,
    pairs_stride_q,
    pairs_stride_m,
    pairs_stride_l,
    pairs_stride_n,
    scores_stride_b,
    scores_stride_q,
    scores_stride_m,
    scores_stride_l,
    scores_stride_n,
    reference_stride_b,
    reference_stride_q,
    reference_stride_i,
    C,
    M,
    Q,
    L,
    N: tl.constexpr,
    UNIT: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    COUNT: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Count the samples of BLOCK_Q queries in each cell, or write them to the cell's records."""
    reference_strides = (reference_stride_b, reference_stride_q, reference_stride_i)
    pairs_strides = (pairs_stride_b, pairs_stride_q, pairs_stride_m, pairs_stride_l, pairs_stride_n)
    scores_strides = (scores_stride_b, scores_stride_q, scores_stride_m, scores_stride_l, scores_stride_n)
    tile = load_tile(
        order_ptr, (pairs_ptr, pairs_strides), (scores_ptr, scores_strides), M, Q, UNIT, BLOCK_Q, INT64_INDEX
    )
    reference = (reference_ptr, reference_strides)
    cursor_ptr += (tile.batch * M + tile.head) * C

    for index in tl.range(L):
        level = load_level(geometry_ptr, index)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            # [BLOCK_N, BLOCK_Q]
            x, y, weight, valid = load_sample(
                tile, reference, normaliser_ptr, level, n, N, BLOCK_N, POINT_TYPE, LOCATIONS, INT64_INDEX
            )
            x0, y0, _, fy = split_position(x, y, level, False)
            cells = cursor_ptr + (level.first_cell + (y0 + 1) * (level.width + 1) + (x0 + 1))
            place = tl.atomic_add(cells, 1, mask=valid, sem="relaxed").to(tl.int64)
            if not COUNT:
                share = (weight.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (tile.query[None, :] << 32)
                words = tl.join(pack_xy(x, fy, tl.float32), share)  # [BLOCK_N, BLOCK_Q, 2]
                pointers = records_ptr + (place * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
                tl.store(pointers, words, mask=valid[:, :, None])


@autotuned(WINDOW_POOL, key=["D"], unspecialised=["T", "C", "S", "Q"], fit=fit_rows)
def window_backward_kernel(
    grad_value_ptr,  # (B, S, M, D), contiguous
    grad_out_ptr,  # (B, Q, M, D), contiguous
    starts_ptr,  # (B * M * C + 1,)
    records_ptr,  # (samples, 2)
    windows_ptr,  # (T, 3)
    geometry_ptr,  # (L, 5), of maps that are not padded
    T,
    S,
    C,
    M,
    Q,
    size_bucket,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A window of WINDOW_COLUMNS x ROWS pixels of one image, head and level, row by row.

    The records of a row of cells belong to the pixels above and below it: read once, they are added to both.
    """
    image_head = (tl.program_id(0) // T).to(tl.int64)
    windows_ptr += tl.program_id(0) % T * 3
    index, first_x, first_y = tl.load(windows_ptr), tl.load(windows_ptr + 1), tl.load(windows_ptr + 2)
    level = load_level(geometry_ptr, index)
    starts_ptr += image_head * C + level.first_cell

    batch, head = image_head // M, image_head % M
    channel = tl.arange(0, BLOCK_D)[None, :]
    grad_out_ptr += (batch * Q * M + head) * D + channel
    grad_value_ptr += (batch * S * M + head) * D + channel
    end_x = tl.minimum(first_x + WINDOW_COLUMNS, level.width)
    # The pixels above a row of cells, and then those below it: [2 * WINDOW_COLUMNS, ...]
    i = tl.arange(0, 2 * WINDOW_COLUMNS)
    is_below = (i >= WINDOW_COLUMNS)[:, None]
    x_of_sum = (first_x + i % WINDOW_COLUMNS).to(tl.float32)[:, None]
    pixel_x = first_x + tl.arange(0, WINDOW_COLUMNS)
    sums = tl.zeros([2 * WINDOW_COLUMNS, BLOCK_D], tl.float32)
    for row in tl.range(first_y, tl.minimum(first_y + ROWS, level.height) + 1):
        # Row `row` of cells lies between the rows of pixels row - 1 and row.
        start = tl.load(starts_ptr + row * (level.width + 1) + first_x)
        end = tl.load(starts_ptr + row * (level.width + 1) + end_x + 1)
        for k in tl.range(start, end, BLOCK_R):
            record = k + tl.arange(0, BLOCK_R)
            valid = record < end
            # [BLOCK_R]
            x, fy, weight, query = load_records(records_ptr, record, valid)
            grad_pointers = grad_out_ptr + (query * M * D)[:, None]
            # [BLOCK_R, BLOCK_D]
            grad = tl.load(grad_pointers, mask=valid[:, None] & (channel < D), other=0.0).to(DOT_TYPE)
            lower = weight * fy
            # [2 * WINDOW_COLUMNS, BLOCK_R]
            share = tl.where(is_below, lower[None, :], (weight - lower)[None, :])
            tent = tl.maximum(1.0 - tl.abs(x_of_sum - x[None, :]), 0.0)
            sums = dot((tent * share).to(DOT_TYPE), grad, sums, PRECISION)
        above, below = tl.split(sums.reshape(2, WINDOW_COLUMNS, BLOCK_D).permute(1, 2, 0))
        pixel = level.first_row + (row - 1) * level.width + pixel_x
        pointers = grad_value_ptr + (pixel.to(tl.int64) * M * D)[:, None]
        # The pixels above the window's first row belong to another window.
        mask = (tl.where(row > first_y, pixel_x, level.width) < level.width)[:, None] & (channel < D)
        tl.store(pointers, above.to(grad_value_ptr.dtype.element_ty), mask=mask)
        sums = tl.join(below, tl.zeros_like(below)).permute(2, 0, 1).reshape(2 * WINDOW_COLUMNS, BLOCK_D)


# --- tables -----------------------------------------------------------------------------------------------------------


@cached_table
def window_table(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(T, 3) int32, as in the legend."""
    table = [
        (level, x, y)
        for level, _, height, width in levels(shapes)
        for y in range(0, height, WINDOW_ROWS)
        for x in range(0, width, WINDOW_COLUMNS.value)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


def count_cells(shapes: Sequence[int]) -> int:
    """The number C of bilinear cells of all levels."""
    return sum((height + 1) * (width + 1) for _, _, height, width in levels(shapes))


def free_bytes(device: torch.device) -> int:
    """The memory that can be allocated on a GPU; 0 elsewhere, and while a CUDA graph is captured."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def images_at_a_time(shapes: Sequence[int], samples: Samples) -> int:
    """How many images are binned together, at least one. Each round launches all kernels anew."""
    images, image_bytes = len(samples.pairs), RECORD_BYTES * samples.per_image
    allowed = MAX_RECORD_BYTES
    if images * image_bytes > allowed:  # otherwise nobody has to ask the driver
        allowed = max(allowed, free_bytes(samples.pairs.device) // SHARE_OF_FREE_MEMORY)
    return max(1, min(images, allowed // image_bytes, (2**31 - 1) // counted_per_image(shapes, samples)))


def counted_per_image(shapes: Sequence[int], samples: Samples) -> int:
    """The number of records or of cells of an image, whichever is larger: 32-bit integers count them."""
    return max(samples.per_image, samples.pairs.shape[2] * count_cells(shapes))


def can_bin(D: int, shapes: Sequence[int], samples: Samples) -> bool:
    """Whether a program can hold rows of D channels, and 32 bits count the cells and records of an image."""
    return D <= MAX_CHANNELS and counted_per_image(shapes, samples) < 2**31


# --- launchers --------------------------------------------------------------------------------------------------------


def bin_samples(shapes: Sequence[int], samples: Samples, normaliser: Tensor | None) -> tuple[Tensor, Tensor]:
    """The starts and records of all samples given."""
    B, Q, M, L, N = samples.pairs.shape
    C, device = count_cells(shapes), samples.pairs.device
    # At least one sample per thread: were there fewer, several threads would share what an atomic gives back.
    block_n = min(4, triton.next_power_of_2(N))
    block_q = 256 // block_n

    def launch(cursor: Tensor, records: Tensor | None) -> None:
        bin_backward_kernel[(triton.cdiv(Q, block_q) * B * M,)](
            cursor_ptr=cursor,
            records_ptr=records,
            normaliser_ptr=normaliser,
            pairs_ptr=samples.pairs,
            scores_ptr=samples.scores,
            reference_ptr=samples.reference,
            order_ptr=samples.order,
            geometry_ptr=geometry(tuple(shapes), False, device),
            **samples.strides,
            C=C,
            M=M,
            Q=Q,
            L=L,
            N=N,
            UNIT=samples.unit,
            POINT_TYPE=samples.point_type,
            LOCATIONS=samples.reference is None,
            COUNT=records is None,
            INT64_INDEX=samples.int64_index,
            BLOCK_Q=block_q,
            BLOCK_N=block_n,
            num_warps=4,
            # Both passes must find each sample in the same cell: no multiply-adds, which one of them might form and
            # one not.
            enable_fp_fusion=False,
        )

    # One zero, the counts, and their sums in place: in the second pass the cursors, where cells begin, move to where
    # they end, which is where the next ones begin. So the same memory, from one number before, is `starts` then.
    sums = torch.zeros(B * M * C + 2, dtype=torch.int32, device=device)
    counts, cursors, starts = sums[2:], sums[1:-1], sums[:-1]
    launch(counts, None)
    counts.cumsum_(0)
    records = torch.empty((B * samples.per_image, 2), dtype=torch.int64, device=device)
    launch(cursors, records)
    return starts, records


def add_records(
    grad_value: Tensor, grad_out: Tensor, starts: Tensor, records: Tensor, shapes: Sequence[int], size_bucket: int
) -> None:
    """Write the gradient (B, S, M, D) from the records and grad_out (B, Q, M * D)."""
    B, S, M, D = grad_value.shape
    windows = window_table(tuple(shapes), grad_value.device)
    window_backward_kernel[(len(windows) * B * M,)](
        grad_value_ptr=grad_value,
        grad_out_ptr=grad_out,
        starts_ptr=starts,
        records_ptr=records,
        windows_ptr=windows,
        geometry_ptr=geometry(tuple(shapes), False, grad_value.device),
        T=len(windows),
        C=count_cells(shapes),
        S=S,
        Q=grad_out.shape[1],
        M=M,
        size_bucket=size_bucket,
        D=D,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        ROWS=WINDOW_ROWS,
        DOT_TYPE=operand(grad_value.dtype),
        PRECISION=PRECISION,
        enable_fp_fusion=True,
    )


def value_gradient_binned(
    grad_out: Tensor, value: Tensor, shapes: Sequence[int], samples: Samples, normaliser: Tensor | None
) -> Tensor:
    """The gradient of value, (B, S, M, D); see `triton_value.value_gradient` for the arguments."""
    grad_value = value.new_empty(value.shape)
    step = images_at_a_time(shapes, samples)
    for first in range(0, len(value), step):
        part = slice(first, min(first + step, len(value)))
        starts, records = bin_samples(shapes, samples.images(part), None if normaliser is None else normaliser[part])
        add_records(grad_value[part], grad_out[part], starts, records, shapes, samples.size_bucket)
    return grad_value
