"""Sparse sampling attention in Triton, backward: the gradient of the value, in two ways.

Every sample adds weight * grad_out to its four corners.

    atomic   A program a tile of queries, as in the forward, that adds float32 (integers where results must repeat)
             into a buffer, which other programs add to at the same time.
    binned   The samples are sorted by the bilinear cell that they lie in: counted, given a place, written there as
             records of 16 bytes. A program then owns a window of 16 pixels x some rows, reads the records of its cells
             and adds tent_weights[16, records] @ grad_out[records, D] by the tensor cores. Every pixel is written
             once, in its final dtype. A cell is the square between four pixel centres; (H + 1) * (W + 1) of them, the
             outermost half outside, hold all samples of a level that read anything. NaN and infinity in grad_out
             reach all pixels of a window.

Which is faster depends on the GPU and on how many samples a pixel gets: `fastest` measures. Images are binned a few at
a time, to bound the memory of the records.

Legend (see `triton_common` for the rest)
    starts    (images * M * cells + 1,) int32   where each cell's records begin
    records   (samples, 2) int64                x and y - floor(y); weight and query: float32, float32; float32, int32
    windows   (windows, 3) int32                level, first column and first row of each window
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .._autotune import autotune_pool, autotuned, fastest
from .._scatter import ScatterBuffer, scatter_add
from .._triton import PRECISION, operand, tl, triton
from .triton_common import (
    fewer_queries,
    geometry,
    load_positions,
    load_scores,
    load_weights,
    of_query,
    origin,
    program_work,
    sample_offset,
    split_position,
)

WINDOW_ROWS = 4
WINDOW_COLUMNS = tl.constexpr(16)  # what a tensor core multiplies at a time

# Bytes of the records that are held at a time; one image's at the least.
MAX_RECORD_BYTES = 1 << 28

# Those of `sample_arguments` whose first dimension is the image.
PER_IMAGE = ("pairs_ptr", "scores_ptr", "reference_ptr")

SCATTER_POOL = autotune_pool(
    triton.Config({"BLOCK_Q": 32, "BLOCK_N": 1}, num_warps=4),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 2}, num_warps=4),
    triton.Config({"BLOCK_Q": 16, "BLOCK_N": 1}, num_warps=2),
)
WINDOW_POOL = autotune_pool(
    triton.Config({"BLOCK_R": 32}, num_warps=1),
    triton.Config({"BLOCK_R": 64}, num_warps=2),
    triton.Config({"BLOCK_R": 16}, num_warps=1),
)


@triton.jit
def load_sample(
    pairs_ptr,  # [1, BLOCK_Q]
    pairs_strides,
    scores_ptr,  # [1, BLOCK_Q]
    scores_strides,
    reference_ptr,
    reference_strides,
    normaliser_ptr,  # [1, BLOCK_Q]
    level,
    n,  # [BLOCK_N, 1]
    counts,  # [1, BLOCK_Q]
    width,
    height,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x, y, weight and whether the sample reads anything, each [BLOCK_N, BLOCK_Q]."""
    origin_x, origin_y = origin(reference_ptr, reference_strides, width, height, LOCATIONS)
    x, y = load_positions(
        pairs_ptr, pairs_strides, level, n, origin_x, origin_y, width, height, N, BLOCK_N, POINT_TYPE, LOCATIONS, WIDE
    )
    score_ptrs = scores_ptr + sample_offset(level, n, scores_strides, WIDE)
    if LOCATIONS:
        weight = load_scores(score_ptrs, n, 0.0, N, BLOCK_N)
    else:
        weight = load_weights(score_ptrs, n, tl.load(normaliser_ptr), N, BLOCK_N, False) * tl.load(normaliser_ptr + 1)
    inside = (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
    return x, y, weight, inside & (n < N) & counts


def more_warps(config: triton.Config, arguments: Mapping[str, Any]) -> triton.Config:
    """The configuration for rows of any length: its sums stay in registers, of more threads."""
    factor = max(1, arguments["BLOCK_D"] // 32)
    return triton.Config(config.kwargs, num_warps=min(8, config.num_warps * factor))


# --- atomic -----------------------------------------------------------------------------------------------------------


@autotuned(
    SCATTER_POOL,
    key=["N", "D", "LOCATIONS"],
    adds_into=["grad_value_ptr"],
    unspecialised=["num_pixels", "num_levels", "num_queries"],
    fit=fewer_queries,
)
def scatter_backward_kernel(
    grad_value_ptr,  # (B, S, M, D), contiguous, the data of a ScatterBuffer
    scale_ptr,  # its scale, or None
    grad_out_ptr,  # (B, Q, M, D), contiguous
    normaliser_ptr,  # (B, Q, M, 2), or None
    pairs_ptr,
    pairs_strides,
    scores_ptr,
    scores_strides,
    reference_ptr,
    reference_strides,
    order_ptr,
    geometry_ptr,
    num_pixels,  # S
    num_levels,
    num_heads,
    num_queries,
    size_bucket,
    N: tl.constexpr,
    D: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, head, queries, counts = program_work(order_ptr, num_heads, num_queries, BLOCK_Q)
    query, counts = queries[None, :], counts[None, :]  # [1, BLOCK_Q]
    pairs_ptr = of_query(pairs_ptr, pairs_strides, batch, query, head)
    scores_ptr = of_query(scores_ptr, scores_strides, batch, query, head)
    rows = (batch * num_queries + queries) * num_heads + head  # [BLOCK_Q]
    channel = tl.arange(0, BLOCK_D)[None, :]
    grad_out = tl.load(grad_out_ptr + rows[:, None] * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    if not LOCATIONS:
        reference_ptr += batch * reference_strides[0] + query * reference_strides[1]
        normaliser_ptr += rows[None, :] * 2

    for level in tl.range(num_levels):
        height = tl.load(geometry_ptr + 5 * level)
        width = tl.load(geometry_ptr + 5 * level + 1)
        first = batch * num_pixels + tl.load(geometry_ptr + 5 * level + 3)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            x, y, weight, usable = load_sample(
                pairs_ptr, pairs_strides, scores_ptr, scores_strides, reference_ptr, reference_strides, normaliser_ptr,
                level, n, counts, width, height, N, BLOCK_N, POINT_TYPE, LOCATIONS, WIDE,
            )  # fmt: skip
            x0, y0, fx, fy = split_position(x, y, width, height, False)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    along_x = fx if dx == 1 else 1 - fx
                    along_y = fy if dy == 1 else 1 - fy
                    part = (weight * along_y * along_x)[:, :, None] * grad_out[None, :, :]
                    pixel_x = x0 + dx
                    pixel_y = y0 + dy
                    adds = usable & (pixel_x >= 0) & (pixel_x < width) & (pixel_y >= 0) & (pixel_y < height)
                    row = (first + pixel_y * width + pixel_x) * num_heads + head  # int64
                    mask = adds[:, :, None] & (channel < D)[None, :, :] if D != BLOCK_D else adds[:, :, None]
                    pointers = grad_value_ptr + (row * D)[:, :, None] + channel[None, :, :]
                    scatter_add(pointers, part, mask, scale_ptr, DETERMINISTIC)


def grad_by_atomics(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    scores: Tensor,
    samples: dict[str, Any],
    normaliser: Tensor | None,
) -> Tensor:
    """The gradient of value, (B, S, M, D)."""
    batch, pixels, heads, channels = value.shape
    queries = samples["num_queries"]

    def largest_contribution() -> Tensor:
        largest = torch.linalg.vector_norm(grad_out, float("inf"), dtype=torch.float32)
        if normaliser is not None:
            return largest  # a softmax's weights are at most 1
        return largest * torch.linalg.vector_norm(scores, float("inf"), dtype=torch.float32)

    buffer = ScatterBuffer(value.shape, value.device, largest_contribution)
    grid = lambda config: (triton.cdiv(queries, config["BLOCK_Q"]) * batch * heads,)
    scatter_backward_kernel[grid](
        grad_value_ptr=buffer.data,
        scale_ptr=buffer.scale,
        grad_out_ptr=grad_out,
        normaliser_ptr=normaliser,
        geometry_ptr=geometry(tuple(shapes), False, value.device),
        num_pixels=pixels,
        D=channels,
        DETERMINISTIC=buffer.deterministic,
        BLOCK_D=triton.next_power_of_2(channels),
        **samples,
    )
    return buffer.result(value.dtype)


# --- binned -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_cells", "num_levels", "num_queries"])
def bin_backward_kernel(
    cursor_ptr,  # (images, M, cells) int32: COUNT adds the samples of each cell; otherwise the next free record
    records_ptr,  # (samples, 2) int64; None if COUNT
    normaliser_ptr,  # (images, Q, M, 2), or None
    pairs_ptr,
    pairs_strides,
    scores_ptr,
    scores_strides,
    reference_ptr,
    reference_strides,
    order_ptr,
    geometry_ptr,
    num_cells,
    num_levels,
    num_heads,
    num_queries,
    N: tl.constexpr,
    POINT_TYPE: tl.constexpr,
    LOCATIONS: tl.constexpr,
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, head, queries, counts = program_work(order_ptr, num_heads, num_queries, BLOCK_Q)
    query, counts = queries[None, :], counts[None, :]  # [1, BLOCK_Q]
    pairs_ptr = of_query(pairs_ptr, pairs_strides, batch, query, head)
    scores_ptr = of_query(scores_ptr, scores_strides, batch, query, head)
    cursor_ptr += (batch * num_heads + head) * num_cells
    if not LOCATIONS:
        reference_ptr += batch * reference_strides[0] + query * reference_strides[1]
        normaliser_ptr += ((batch * num_queries + query) * num_heads + head) * 2

    for level in tl.range(num_levels):
        height = tl.load(geometry_ptr + 5 * level)
        width = tl.load(geometry_ptr + 5 * level + 1)
        first_cell = tl.load(geometry_ptr + 5 * level + 4)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[:, None]
            x, y, weight, usable = load_sample(
                pairs_ptr, pairs_strides, scores_ptr, scores_strides, reference_ptr, reference_strides, normaliser_ptr,
                level, n, counts, width, height, N, BLOCK_N, POINT_TYPE, LOCATIONS, WIDE,
            )  # fmt: skip
            x0, y0, _, fy = split_position(x, y, width, height, False)
            cells = cursor_ptr + (first_cell + (y0 + 1) * (width + 1) + (x0 + 1))
            place = tl.atomic_add(cells, 1, mask=usable, sem="relaxed").to(tl.int64)
            if not COUNT:
                position = (x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (
                    fy.to(tl.int32, bitcast=True).to(tl.int64) << 32
                )
                share = (weight.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (query << 32)
                words = tl.join(position, share)  # [BLOCK_N, BLOCK_Q, 2]
                pointers = records_ptr + (place * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
                tl.store(pointers, words, mask=usable[:, :, None])


@autotuned(
    WINDOW_POOL, key=["D"], unspecialised=["num_windows", "num_pixels", "num_cells", "num_queries"], fit=more_warps
)
def window_backward_kernel(
    grad_value_ptr,  # (images, S, M, D), contiguous
    grad_out_ptr,  # (images, Q, M, D), contiguous
    starts_ptr,  # (images * M * cells + 1,)
    records_ptr,  # (samples, 2)
    windows_ptr,  # (windows, 3)
    geometry_ptr,
    num_windows,
    num_pixels,  # S
    num_cells,
    num_heads,
    num_queries,
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
    image_head = (tl.program_id(0) // num_windows).to(tl.int64)
    windows_ptr += tl.program_id(0) % num_windows * 3
    level = tl.load(windows_ptr)
    first_x = tl.load(windows_ptr + 1)
    first_y = tl.load(windows_ptr + 2)
    height = tl.load(geometry_ptr + 5 * level)
    width = tl.load(geometry_ptr + 5 * level + 1)
    first_pixel = tl.load(geometry_ptr + 5 * level + 3)
    starts_ptr += image_head * num_cells + tl.load(geometry_ptr + 5 * level + 4)

    batch, head = image_head // num_heads, image_head % num_heads
    pixel_x = first_x + tl.arange(0, WINDOW_COLUMNS)
    channel = tl.arange(0, BLOCK_D)[None, :]
    grad_out_ptr += (batch * num_queries * num_heads + head) * D + channel
    grad_value_ptr += (batch * num_pixels * num_heads + head) * D + channel
    end_x = tl.minimum(first_x + WINDOW_COLUMNS, width)
    above = tl.zeros([WINDOW_COLUMNS, BLOCK_D], tl.float32)
    for row in tl.range(first_y, tl.minimum(first_y + ROWS, height) + 1):
        # Row `row` of cells lies between the rows of pixels row - 1 and row.
        below = tl.zeros([WINDOW_COLUMNS, BLOCK_D], tl.float32)
        start = tl.load(starts_ptr + row * (width + 1) + first_x)
        end = tl.load(starts_ptr + row * (width + 1) + end_x + 1)
        for k in tl.range(start, end, BLOCK_R):
            record = k + tl.arange(0, BLOCK_R)
            usable = record < end
            record_ptrs = records_ptr + (record.to(tl.int64) * 2)[:, None] + tl.arange(0, 2)[None, :]
            position, share = tl.split(tl.load(record_ptrs, mask=usable[:, None], other=0))
            x = position.to(tl.int32).to(tl.float32, bitcast=True)
            fy = (position >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            weight = share.to(tl.int32).to(tl.float32, bitcast=True)
            query = share >> 32
            grad_ptrs = grad_out_ptr + (query * num_heads * D)[:, None]
            grad = tl.load(grad_ptrs, mask=usable[:, None] & (channel < D), other=0.0).to(DOT_TYPE)
            tent = tl.maximum(1.0 - tl.abs(pixel_x.to(tl.float32)[:, None] - x[None, :]), 0.0)
            lower = (weight * fy)[None, :]
            upper = (weight - weight * fy)[None, :]
            above = tl.dot((tent * upper).to(DOT_TYPE), grad, above, input_precision=PRECISION)
            below = tl.dot((tent * lower).to(DOT_TYPE), grad, below, input_precision=PRECISION)
        pixel = first_pixel + (row - 1) * width + pixel_x
        pointers = grad_value_ptr + (pixel.to(tl.int64) * num_heads * D)[:, None]
        # Above the window's first row is another's.
        mask = (tl.where(row > first_y, pixel_x, width) < width)[:, None] & (channel < D)
        tl.store(pointers, above.to(grad_value_ptr.dtype.element_ty), mask=mask)
        above = below


@cache
def window_table(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(windows, 3) int32, as in the legend."""
    levels = enumerate(zip(shapes[::2], shapes[1::2], strict=True))
    table = [
        (level, x, y)
        for level, (height, width) in levels
        for y in range(0, height, WINDOW_ROWS)
        for x in range(0, width, WINDOW_COLUMNS.value)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


def count_cells(shapes: Sequence[int]) -> int:
    """Bilinear cells of all levels."""
    return sum((height + 1) * (width + 1) for height, width in zip(shapes[::2], shapes[1::2], strict=True))


def bin_samples(
    images: int, num_cells: int, table: Tensor, samples: dict[str, Any], normaliser: Tensor | None
) -> tuple[Tensor, Tensor]:
    """starts and records of a few images, whose geometry, `samples` and normaliser are given."""
    queries, heads, device = samples["num_queries"], samples["num_heads"], table.device
    arguments = {name: argument for name, argument in samples.items() if name != "size_bucket"}
    arguments |= {"normaliser_ptr": normaliser, "geometry_ptr": table, "num_cells": num_cells}
    # At least one sample a thread: were there fewer, several threads would share what an atomic gives back.
    block_n = min(4, triton.next_power_of_2(samples["N"]))
    arguments |= {"BLOCK_Q": 256 // block_n, "BLOCK_N": block_n, "num_warps": 4}
    # Both passes must find each sample in the same cell: no multiply-adds, which one of them might form and one not.
    arguments["enable_fp_fusion"] = False
    grid = (triton.cdiv(queries, arguments["BLOCK_Q"]) * images * heads,)
    counts = torch.zeros(images * heads * num_cells, dtype=torch.int32, device=device)
    bin_backward_kernel[grid](cursor_ptr=counts, records_ptr=None, COUNT=True, **arguments)
    # The cursors move from where a cell begins to where it ends, which is where the next one begins.
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
    torch.sub(counts.cumsum(0, dtype=torch.int32), counts, out=starts[1:])
    records = torch.empty((images * samples_per_image(samples), 2), dtype=torch.int64, device=device)
    bin_backward_kernel[grid](cursor_ptr=starts[1:], records_ptr=records, COUNT=False, **arguments)
    return starts, records


def samples_per_image(samples: dict[str, Any]) -> int:
    return math.prod(samples[name] for name in ("num_queries", "num_heads", "num_levels", "N"))


def images_at_a_time(batch: int, samples: dict[str, Any]) -> int:
    return max(1, min(batch, MAX_RECORD_BYTES // (16 * samples_per_image(samples))))


def fits_bins(batch: int, num_cells: int, samples: dict[str, Any]) -> bool:
    """Whether cells and records of the images that are taken at a time can be counted in 32 bits."""
    images, heads = images_at_a_time(batch, samples), samples["num_heads"]
    return images * max(samples_per_image(samples), heads * num_cells) < 2**31


def grad_by_bins(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    samples: dict[str, Any],
    normaliser: Tensor | None,
) -> Tensor:
    """The gradient of value, (B, S, M, D)."""
    batch, pixels, heads, channels = value.shape
    table = geometry(tuple(shapes), False, value.device)
    windows = window_table(tuple(shapes), value.device)
    num_cells = count_cells(shapes)
    grad_value = value.new_empty(value.shape)
    images = images_at_a_time(batch, samples)
    for first in range(0, batch, images):
        part = slice(first, min(first + images, batch))
        own = {name: samples[name] if samples[name] is None else samples[name][part] for name in PER_IMAGE}
        own_normaliser = None if normaliser is None else normaliser[part]
        starts, records = bin_samples(part.stop - first, num_cells, table, {**samples, **own}, own_normaliser)
        window_backward_kernel[(len(windows) * (part.stop - first) * heads,)](
            grad_value_ptr=grad_value[part],
            grad_out_ptr=grad_out[part],
            starts_ptr=starts,
            records_ptr=records,
            windows_ptr=windows,
            geometry_ptr=table,
            num_windows=len(windows),
            num_pixels=pixels,
            num_cells=num_cells,
            num_heads=heads,
            num_queries=samples["num_queries"],
            size_bucket=samples["size_bucket"],
            D=channels,
            BLOCK_D=max(16, triton.next_power_of_2(channels)),
            ROWS=WINDOW_ROWS,
            DOT_TYPE=operand(value.dtype),
            PRECISION=PRECISION,
            enable_fp_fusion=True,
        )
    return grad_value


# --- the choice -------------------------------------------------------------------------------------------------------


def grad_of_value(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    scores: Tensor,
    samples: dict[str, Any],
    normaliser: Tensor | None,
) -> Tensor:
    """The gradient of value, (B, S, M, D).

    Args:
        grad_out: (B, Q, M * D), contiguous.
        value, shapes, scores: as in `sparse_attention`.
        samples: `sample_arguments`.
        normaliser: (B, Q, M, 2) float32, each softmax's largest logit and 1 / (sum of exponentials); None if scores
            are weights.
    """
    methods = {
        "binned": partial(grad_by_bins, grad_out, value, shapes, samples, normaliser),
        "atomic": partial(grad_by_atomics, grad_out, value, shapes, scores, samples, normaliser),
    }
    if torch.are_deterministic_algorithms_enabled() or not fits_bins(len(value), count_cells(shapes), samples):
        return methods["atomic"]()
    # Samples a pixel decide: records share the work of a window, atomics don't.
    density = samples["num_queries"] * samples["num_levels"] * samples["N"] // value.shape[1]
    key = (str(value.dtype), value.shape[3], samples["N"], samples["size_bucket"], density.bit_length())
    return fastest("grad_of_value", methods, key)()
