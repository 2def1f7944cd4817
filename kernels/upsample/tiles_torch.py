"""Up-sampled logits read pixel by pixel, never held: what the cross-entropy and the argmax of them share.

    s(p)     = clamp(p + offset(p), 0, (W - 1, H - 1))         position on the full-size map; offset is 0 without one
    src(s)   = clamp((s + 1/2) * (w / W, h / H) - 1/2, 0, (w - 1, h - 1))       the same position on the logits' map
    z[k, p]  = bilinear(logits[k], src(s(p)))

Without an offset z is `interpolate(logits, (H, W), mode="bilinear", align_corners=False)`; with an integer offset it
is that map read at p + offset. z exists for one tile of pixels at a time.

Legend
    B batch, K classes, h x w the logits' map, H x W the full-size map; K, h, w, H, W are any positive numbers.
    logits    (B, K, h, w)
    offset    (B, 2, H, W), (dx, dy) in pixels of the full-size map
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count, check_floating, check_same_device, check_shape, check_sides, compute_dtype

# The tiles of the PyTorch path: columns, and bytes of up-sampled logits (one row at the least). On a CPU these should
# stay in the cache, on a GPU they should fill it.
TILE_COLUMNS = 128
SLAB_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}

# On a CPU a tile with offsets of whole pixels, none longer than this, is read from itself and a margin around it.
MAX_MARGIN = 8


def check_maps(logits: Tensor, offset: Tensor | None, size: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless logits (B, K, h, w) and offset (B, 2, *size) or None fit."""
    check_floating(logits=logits)
    check_shape("logits", logits, ("B", "K", "h", "w"))
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it needs at least one class and one pixel")
    check_count("pixels in logits", logits.shape[2] * logits.shape[3])
    check_count("pixels in the output", size[0] * size[1])
    check_sides("logits", *logits.shape[2:])
    check_sides("the output", *size)
    if offset is not None:
        if offset.is_complex() or offset.dtype == torch.bool:
            raise TypeError(f"offset has dtype {offset.dtype}; it must hold integers or floating-point numbers")
        check_same_device(logits=logits, offset=offset)
        check_shape("offset", offset, (logits.shape[0], 2, *size), "one (dx, dy) for each pixel of the output")


# --- PyTorch ----------------------------------------------------------------------------------------------------------
# Tiles of pixels, whose z is read from a table and whose gradient is added into one, both by embedding_bag. Without an
# offset the table is interpolated along one axis after the other. Short offsets of whole pixels, those of the refined
# prediction, move z on the full-size map after that; others look up four corners per pixel.

# Where a tile lies in (B, H, W): image, rows, columns.
Where = tuple[int, slice, slice]


class Bags(NamedTuple):
    """A sparse matrix with as many entries in each row: out[i] = sum_j weight[i, j] * table[index[i, j]]."""

    index: Tensor  # (n, entries) int64
    weight: Tensor  # (n, entries) in the table's dtype

    def read(self, table: Tensor) -> Tensor:
        """(rows, width) -> (n, width). A NaN in the table reaches only the rows that read it, unlike in a matmul."""
        return F.embedding_bag(self.index, table, per_sample_weights=self.weight, mode="sum")

    def add_transposed(self, grad: Tensor, grad_table: Tensor) -> None:
        """grad_table (rows, width) += transposed matrix times grad (n, width), in an order that repeats."""
        read, order = self.index.flatten().sort(stable=True)
        # On a GPU, to count the rows that were read would be to wait for it.
        rows = read.unique_consecutive() if read.is_cpu else torch.arange(len(grad_table), device=read.device)
        sums = F.embedding_bag(
            order // self.index.shape[1],
            grad,
            torch.searchsorted(read, rows),
            per_sample_weights=self.weight.flatten()[order],
            mode="sum",
        )
        grad_table.index_add_(0, rows, sums)


def _axis(position: Tensor, size: int, low_size: int) -> tuple[Tensor, Tensor]:
    """Index (2, n) on the logits' map and weight (2, n) of the two corners of full-size positions (n,)."""
    source = (position.clamp(0, size - 1) + 0.5) * (low_size / size) - 0.5
    source = source.clamp_(0, low_size - 1)
    lower = source.floor()
    fraction = source.sub_(lower)
    index = lower.long()
    # A corner without weight is not read, since infinity times 0 is NaN: the other one is, twice by half.
    between = fraction > 0
    fraction = torch.where(between, fraction, 0.5)
    return torch.stack([index, index + between]), torch.stack([1 - fraction, fraction])


def _axis_bags(position: Tensor, size: int, low_size: int) -> Bags:
    index, weight = _axis(position, size, low_size)
    return Bags(index.t().contiguous(), weight.t().contiguous())


def _shifted_bags(shift: Tensor, where: Where, size: tuple[int, int], low_size: tuple[int, int]) -> Bags:
    """The four corners, among h * w low-size pixels, of each pixel of a tile with the offset (2, rows, columns)."""
    _, rows, columns = where
    y = torch.arange(rows.start, rows.stop, dtype=shift.dtype, device=shift.device)[:, None]
    x = torch.arange(columns.start, columns.stop, dtype=shift.dtype, device=shift.device)
    # A NaN means no offset; infinities are for the clamp.
    shift = shift.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    x_index, x_weight = _axis((x + shift[0]).flatten(), size[1], low_size[1])
    y_index, y_weight = _axis((y + shift[1]).flatten(), size[0], low_size[0])
    # Pixels last until the end: arithmetic along an axis of 2 or 4 is slow.
    index = (y_index * low_size[1])[:, None] + x_index
    weight = y_weight[:, None] * x_weight
    return Bags(torch.stack(tuple(index.view(4, -1)), -1), torch.stack(tuple(weight.view(4, -1)), -1))


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, total)) for first in range(0, total, size))


def visit_tiles(
    logits: Tensor,
    size: tuple[int, int],
    offset: Tensor | None,
    visit: Callable[[Where, Tensor], Tensor | None],
    with_gradient: bool = False,
) -> Tensor:
    """Show `visit` the up-sampled logits, tile by tile.

    Args:
        logits: (B, K, h, w).
        size: (H, W).
        offset: (B, 2, H, W) or None.
        visit: takes where a tile lies and its z (n, K, m), n * m pixels in row-major order; classes are not last, since
            a softmax along a short last axis is 20 times slower on a CPU. May overwrite z. With with_gradient it
            returns the gradient of z.
        with_gradient: whether to add these up.

    Returns:
        The gradient of logits in the compute dtype, or an empty tensor.
    """
    B, K, h, w = logits.shape
    dtype = compute_dtype(logits)
    budget = SLAB_BYTES.get(logits.device.type, SLAB_BYTES["cuda"])
    tile_rows = max(1, budget // (K * min(size[1], TILE_COLUMNS) * dtype.itemsize or 1))
    grad_logits = logits.new_empty((B, K, h, w) if with_gradient else (0,), dtype=dtype)
    for b in range(B):
        margin = (0, 0) if offset is None else _margin(offset[b])
        if margin is not None:
            # Rows of the table: columns of the map, (w, h, K).
            table = logits[b].permute(2, 1, 0).to(dtype).reshape(w, h * K)
        else:
            table = logits[b].permute(1, 2, 0).to(dtype).reshape(h * w, K)
        grad_table = torch.zeros_like(table) if with_gradient else None
        for columns in _blocks(size[1], TILE_COLUMNS):
            tiles = [(b, rows, columns) for rows in _blocks(size[0], tile_rows)]
            if not tiles:
                continue
            if margin is not None:
                _visit_columns(table, grad_table, (h, w), size, tiles, visit, offset, margin)
            else:
                assert offset is not None
                _visit_shifted(table, grad_table, (h, w), size, tiles, offset, visit)
        if grad_table is not None:
            per_pixel = (
                grad_table.view(w, h, K).permute(2, 1, 0) if margin is not None else grad_table.t().view(K, h, w)
            )
            grad_logits[b] = per_pixel
    return grad_logits


def _margin(offset: Tensor) -> tuple[int, int] | None:
    """How far an image's offsets (2, H, W) reach along y and x; None unless all are short and of whole pixels."""
    if not offset.is_cpu or offset.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        return None
    if offset.numel() == 0:
        return 0, 0
    x, y = (max(-int(low), int(high)) for low, high in zip(*offset.flatten(1).aminmax(dim=1), strict=True))
    return (y, x) if max(x, y) <= MAX_MARGIN else None


def _widen(pixels: slice, margin: int, size: int) -> slice:
    return slice(max(pixels.start - margin, 0), min(pixels.stop + margin, size))


def _moved_pixels(offset: Tensor, where: Where, rows: slice, columns: slice, size: tuple[int, int]) -> Tensor:
    """For each pixel of a tile the one that it reads, counted in row-major order in `rows` x `columns` around it."""
    b, *tile = where
    y = torch.arange(tile[0].start, tile[0].stop)[:, None] + offset[b, 1, tile[0], tile[1]]
    x = torch.arange(tile[1].start, tile[1].stop) + offset[b, 0, tile[0], tile[1]]
    y, x = y.clamp_(0, size[0] - 1).sub_(rows.start), x.clamp_(0, size[1] - 1).sub_(columns.start)
    return y.mul_(columns.stop - columns.start).add_(x).flatten()


def _visit_columns(
    table: Tensor,  # (w, h * K)
    grad_table: Tensor | None,
    low_size: tuple[int, int],
    size: tuple[int, int],
    tiles: list[Where],
    visit: Callable[[Where, Tensor], Tensor | None],
    offset: Tensor | None,
    margin: tuple[int, int],
) -> None:
    """Tiles of the same columns: these are interpolated for all low-size rows first, then the rows of each tile.

    With an offset, whose length is at most `margin`, this is done for a tile and what is around it.
    """
    h, w = low_size
    H, W = size
    columns = _widen(tiles[0][2], margin[1], W)
    positions = torch.arange(max(size), dtype=table.dtype, device=table.device)
    across = _axis_bags(positions[columns], W, w)
    n = len(across.index)
    wide = across.read(table).view(n, h, -1).permute(1, 2, 0).reshape(h, -1)  # (h, K * n)
    grad_wide = None if grad_table is None else torch.zeros_like(wide)
    for where in tiles:
        rows = _widen(where[1], margin[0], H)
        down = _axis_bags(positions[rows], H, h)
        z = down.read(wide).view(rows.stop - rows.start, -1, n)
        if offset is None:
            grad = visit(where, z)
        else:
            grad = _visit_moved(z, _moved_pixels(offset, where, rows, columns, size), where, visit)
        if grad_wide is not None and grad is not None:
            down.add_transposed(grad.reshape(len(z), -1), grad_wide)
    if grad_table is not None and grad_wide is not None:
        across.add_transposed(grad_wide.view(h, -1, n).permute(2, 0, 1).reshape(n, -1), grad_table)


def _visit_moved(
    z: Tensor,  # (rows, K, columns)
    pixels: Tensor,  # (m,)
    where: Where,
    visit: Callable[[Where, Tensor], Tensor | None],
) -> Tensor | None:
    """Visit a tile whose m pixels read these of z; the gradient is that of z."""
    rows, K, columns = z.shape
    grad = visit(where, z.transpose(0, 1).reshape(K, -1).index_select(1, pixels)[None])
    if grad is None:
        return None
    grad_z = grad.new_zeros(K, rows * columns).index_add_(1, pixels, grad[0])
    return grad_z.view(K, rows, columns).transpose(0, 1)


def _visit_shifted(
    table: Tensor,  # (h * w, K)
    grad_table: Tensor | None,
    low_size: tuple[int, int],
    size: tuple[int, int],
    tiles: list[Where],
    offset: Tensor,
    visit: Callable[[Where, Tensor], Tensor | None],
) -> None:
    """Tiles whose pixels look anywhere: four corners each."""
    for where in tiles:
        b, rows, columns = where
        corners = _shifted_bags(offset[b, :, rows, columns].to(table.dtype), where, size, low_size)
        grad = visit(where, corners.read(table).t().contiguous()[None])
        if grad_table is not None and grad is not None:
            corners.add_transposed(grad[0].t().contiguous(), grad_table)
