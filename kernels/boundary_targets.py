"""Targets of the boundary and direction heads (Sec. 3.2), from a label map, by distance transform.

    distance(p)  = |p - q| to the nearest pixel q of another class
    g(p)         = sum over q in the 5x5 pixels around p of (q - p) / |q - p|^2 * (v(q) - distance(p)),
                   v(q) = distance(q) where q has p's class, 0 where it has another; ignored and outside pixels left out
    direction(p) = the bin of atan2(g_y, g_x): bin k of n is centred on -180 + k * 360 / n degrees (y points down)

Ignored pixels and what lies outside the image belong to no class: they are not "another class", or void regions and
the padding of a crop would make boundaries. Distances are exact up to radius + 2 sqrt(2), as far as a 5x5 neighbourhood
of a pixel within the radius reaches; beyond, and at ignored pixels, they saturate.

Legend
    B batch, H x W map, n directions.
    labels     (B, H, W), integers
    squared    (B, H, W) int32, distance^2, at most `saturation`, the first integer beyond (radius + 2 sqrt(2))^2
    distance   (B, H, W) float32
    direction  (B, H, W) int64
"""

import math

import torch
from torch import Tensor

from ._triton import autotune_pool, autotuned, device_guard, size_class, tl, triton
from .backend import runs_on_triton
from .checks import check_count, check_integer, check_shape

NO_DIRECTION = 255

# The Triton kernel looks at (2 radius + 7)^2 pixels around each: a larger radius would seem to hang.
MAX_RADIUS = 32


def _saturation(radius: float) -> int:
    return math.floor((radius + 2 * math.sqrt(2)) ** 2) + 1


def _bin_centres(num_directions: int, device: torch.device) -> Tensor:
    """(n, 2) float32, (x, y) of the unit vector at the centre of each bin; made on the device, without a copy to it."""
    angle = torch.arange(num_directions, dtype=torch.float32, device=device) * (2 * math.pi / num_directions) - math.pi
    return torch.stack([angle.cos(), angle.sin()], 1)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch
# ---------------------------------------------------------------------------------------------------------------------


def _shifted(size: int, shift: int) -> tuple[slice, slice]:
    """Slices of one axis: pixels p for which p + shift is inside, and the pixels p + shift."""
    return slice(max(0, -shift), size - max(0, shift)), slice(max(0, shift), size + min(0, shift))


def _nearest_in_column(labels: Tensor, ignore_index: int, saturation: int) -> tuple[Tensor, Tensor, Tensor]:
    """What lies above, at and below each pixel, (B, H, W) each.

    Returns:
        the class of the nearest pixel that isn't ignored, the squared distance to it, and the squared distance to the
        nearest pixel of a class other than that one.
    """
    H = labels.shape[1]
    valid = labels != ignore_index
    nearest = labels.clone()
    first = torch.full_like(labels, saturation)
    second = torch.full_like(labels, saturation)
    # From far to near: what is met later is nearer and takes the first place.
    for reach in range(min(math.isqrt(saturation - 1), H - 1), -1, -1):
        for shift in {reach, -reach}:
            here, there = _shifted(H, shift)
            met, counts = labels[:, there], valid[:, there]
            other = (met != nearest[:, here]) & counts
            torch.where(other, first[:, here], second[:, here], out=second[:, here])
            torch.where(other, met, nearest[:, here], out=nearest[:, here])
            first[:, here].masked_fill_(counts, reach * reach)
    return nearest, first, second


def _squared_distance(labels: Tensor, ignore_index: int, saturation: int) -> Tensor:
    """Squared distance to the nearest pixel of another class: the nearest in each column, then over columns."""
    W = labels.shape[2]
    nearest, first, second = _nearest_in_column(labels, ignore_index, saturation)
    squared = torch.full_like(labels, saturation)
    reach = min(math.isqrt(saturation - 1), W - 1)
    for shift in range(-reach, reach + 1):
        here, there = _shifted(W, shift)
        same = nearest[:, :, there] == labels[:, :, here]
        candidate = torch.where(same, second[:, :, there], first[:, :, there]).add_(shift * shift)
        torch.minimum(squared[:, :, here], candidate, out=squared[:, :, here])
    return squared.masked_fill_(labels == ignore_index, saturation)


def _gradient(labels: Tensor, distance: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """g_x and g_y, (B, H, W) each.

    Opposite neighbours are subtracted first, so that where all of them cancel (in the middle of a line, say) the sum is
    exactly zero, in any floating-point arithmetic.
    """
    _, H, W = labels.shape
    labels = torch.nn.functional.pad(labels, (2, 2, 2, 2), value=ignore_index)
    padded = torch.nn.functional.pad(distance, (2, 2, 2, 2))
    # v(q) is 0 at another class; distance(p) in its place leaves an ignored pixel out.
    keep = (labels == ignore_index).float()
    centre = labels[:, 2:-2, 2:-2]

    def v(dy: int, dx: int) -> Tensor:
        window = (slice(None), slice(2 + dy, 2 + dy + H), slice(2 + dx, 2 + dx + W))
        return torch.where(labels[window] == centre, padded[window], keep[window] * distance)

    g_x, g_y = torch.zeros_like(distance), torch.zeros_like(distance)
    for i in range(13, 25):  # the second half of the 5x5 neighbourhood, row by row
        dy, dx = i // 5 - 2, i % 5 - 2
        difference = v(dy, dx) - v(-dy, -dx)
        g_x.add_(difference, alpha=dx / (dx * dx + dy * dy))
        g_y.add_(difference, alpha=dy / (dx * dx + dy * dy))
    return g_x, g_y


def _direction(g_x: Tensor, g_y: Tensor, num_directions: int) -> Tensor:
    """The bin whose centre is nearest in angle, (B, H, W) int64; no gradient has the angle 0, as of atan2."""
    direction = torch.full(g_x.shape, num_directions // 2, dtype=torch.int64, device=g_x.device)
    largest = torch.zeros_like(g_x)
    for k, (x, y) in enumerate(_bin_centres(num_directions, g_x.device)):
        cosine = g_x * x + g_y * y
        direction.masked_fill_(cosine > largest, k)
        torch.maximum(largest, cosine, out=largest)
    return direction


def _boundary_targets_torch(
    labels: Tensor, radius: float, num_directions: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    labels = labels.to(torch.int32)
    saturation = _saturation(radius)
    # By table, from float64: PyTorch's float32 square root may be an ulp off on a CPU, and the backends should agree.
    roots = torch.arange(saturation + 1, dtype=torch.float64, device=labels.device).sqrt().float()
    distance = roots[_squared_distance(labels, ignore_index, saturation)]
    direction = _direction(*_gradient(labels, distance, ignore_index), num_directions)
    nowhere = (distance > radius) | (labels == ignore_index)
    return distance, direction.masked_fill_(nowhere, NO_DIRECTION)


# ---------------------------------------------------------------------------------------------------------------------
# Triton: lanes are the pixels of one image, row by row; program axis 0 = (image, tile of BLOCK_P pixels)
# ---------------------------------------------------------------------------------------------------------------------

PIXEL_CONFIGS = autotune_pool(
    triton.Config({"BLOCK_P": 512}, num_warps=8),
    triton.Config({"BLOCK_P": 256}, num_warps=8),
    triton.Config({"BLOCK_P": 512}, num_warps=4),
)


@triton.jit
def _load_labels(labels_ptr, stride_h, stride_w, y, x, H, W, ignore_index):
    """Labels (int32) at the pixels (y, x) of one image, ignore_index outside."""
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    pointers = labels_ptr + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return tl.where(inside, tl.load(pointers, mask=inside, other=0).to(tl.int32), ignore_index)


@autotuned(PIXEL_CONFIGS, key=["REACH"])
def distance_kernel(
    labels_ptr,  # (B, H, W)
    distance_ptr,  # (B, H, W), contiguous float32
    stride_b,
    stride_h,
    stride_w,
    ignore_index,
    H,
    W,
    size_class,
    SATURATION: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Looks at every pixel of the (2 REACH + 1)^2 around each: exact integers, whatever the order."""
    tiles = tl.cdiv(H * W, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    y, x = p // W, p % W
    labels_ptr += b * stride_b
    centre = _load_labels(labels_ptr, stride_h, stride_w, y, x, H, W, ignore_index)
    squared = tl.full((BLOCK_P,), SATURATION, tl.int32)
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            label = _load_labels(labels_ptr, stride_h, stride_w, y + dy, x + dx, H, W, ignore_index)
            other = (label != centre) & (label != ignore_index) & (centre != ignore_index)
            squared = tl.where(other, tl.minimum(squared, dy * dy + dx * dx), squared)
    tl.store(distance_ptr + b * H * W + p, tl.sqrt_rn(squared.to(tl.float32)), mask=p < H * W)


@triton.jit
def _neighbour(labels_ptr, distance_ptr, stride_h, stride_w, y, x, H, W, ignore_index, centre, distance):
    """v of the pixels (y, x) seen from a pixel of class centre at this distance, which stands for an ignored pixel."""
    label = _load_labels(labels_ptr, stride_h, stride_w, y, x, H, W, ignore_index)
    same = (label == centre) & (label != ignore_index)
    near = tl.load(distance_ptr + y * W + x, mask=same, other=0.0)
    return tl.where(label == ignore_index, distance, near)


@autotuned(PIXEL_CONFIGS, key=["NUM_DIRECTIONS"])
def direction_kernel(
    labels_ptr,  # (B, H, W)
    distance_ptr,  # (B, H, W), contiguous float32
    centres_ptr,  # (n, 2) float32
    direction_ptr,  # (B, H, W), contiguous int64
    stride_b,
    stride_h,
    stride_w,
    ignore_index,
    H,
    W,
    radius,
    size_class,
    NUM_DIRECTIONS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """As `_gradient` and `_direction`, with their order of arithmetic."""
    tiles = tl.cdiv(H * W, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    y, x = p // W, p % W
    labels_ptr += b * stride_b
    distance_ptr += b * H * W
    centre = _load_labels(labels_ptr, stride_h, stride_w, y, x, H, W, ignore_index)
    distance = tl.load(distance_ptr + p, mask=p < H * W, other=0.0)

    g_x = tl.zeros((BLOCK_P,), tl.float32)
    g_y = tl.zeros((BLOCK_P,), tl.float32)
    for i in tl.static_range(13, 25):  # the second half of the 5x5 neighbourhood, row by row
        dy = i // 5 - 2
        dx = i % 5 - 2
        ahead = _neighbour(
            labels_ptr, distance_ptr, stride_h, stride_w, y + dy, x + dx, H, W, ignore_index, centre, distance
        )
        behind = _neighbour(
            labels_ptr, distance_ptr, stride_h, stride_w, y - dy, x - dx, H, W, ignore_index, centre, distance
        )
        g_x += (ahead - behind) * (dx / (dx * dx + dy * dy))
        g_y += (ahead - behind) * (dy / (dx * dx + dy * dy))

    direction = tl.full((BLOCK_P,), NUM_DIRECTIONS // 2, tl.int64)
    largest = tl.zeros((BLOCK_P,), tl.float32)
    for k in range(0, NUM_DIRECTIONS):
        cosine = g_x * tl.load(centres_ptr + 2 * k) + g_y * tl.load(centres_ptr + 2 * k + 1)
        direction = tl.where(cosine > largest, k, direction)
        largest = tl.maximum(largest, cosine)
    direction = tl.where((distance > radius) | (centre == ignore_index), 255, direction)
    tl.store(direction_ptr + b * H * W + p, direction, mask=p < H * W)


def _boundary_targets_triton(
    labels: Tensor, radius: float, num_directions: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    B, H, W = labels.shape
    distance = labels.new_empty(labels.shape, dtype=torch.float32)
    direction = labels.new_empty(labels.shape, dtype=torch.int64)
    if labels.numel() == 0:
        return distance, direction
    saturation = _saturation(radius)
    grid = lambda meta: (B * triton.cdiv(H * W, meta["BLOCK_P"]),)
    with device_guard(labels):
        distance_kernel[grid](
            labels,
            distance,
            *labels.stride(),
            ignore_index,
            H,
            W,
            size_class=size_class(labels.numel()),
            SATURATION=saturation,
            REACH=math.isqrt(saturation - 1),
        )
        direction_kernel[grid](
            labels,
            distance,
            _bin_centres(num_directions, labels.device),
            direction,
            *labels.stride(),
            ignore_index,
            H,
            W,
            radius,
            size_class=size_class(labels.numel()),
            NUM_DIRECTIONS=num_directions,
        )
    return distance, direction


# ---------------------------------------------------------------------------------------------------------------------
# The op
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("unept::boundary_targets", mutates_args=())
def _boundary_targets(labels: Tensor, radius: float, num_directions: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    run = _boundary_targets_triton if runs_on_triton(labels) else _boundary_targets_torch
    return run(labels, radius, num_directions, ignore_index)


@_boundary_targets.register_fake
def _(labels: Tensor, radius: float, num_directions: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape, dtype=torch.float32), labels.new_empty(labels.shape, dtype=torch.int64)


def boundary_targets(
    labels: Tensor, *, radius: float = 5, num_directions: int = 8, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Distance to the boundary and direction away from it, the targets of the boundary and direction heads (Sec. 3.2).

    Args:
        labels: (B, H, W), class ids that fit int32, of any integer dtype.
        radius: of the boundary's neighbourhood, in pixels, above 0 and at most 32: the time grows with its square.
        num_directions: 1 to 255 bins of the full circle.
        ignore_index: the id of pixels that belong to no class.

    Returns:
        distance: (B, H, W) float32, in pixels: Euclidean distance between pixel centres to the nearest pixel of another
            class (1 right at a boundary). Ignored pixels and the outside are not another class. Saturates at
            sqrt(floor((radius + 2 sqrt(2))^2) + 1), 7.874 for the default radius, which ignored pixels have as well.
        direction: (B, H, W) int64: bin of the angle of the distance's gradient, which points into the segment. For 8
            bins, 0..7 stand for (dx, dy) = (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1). 255
            where distance > radius or the label is ignored: a target for `upsample_cross_entropy` as it is. Where the
            gradient vanishes, its angle counts as 0.

    Raises:
        TypeError: labels are not integers.
        ValueError: labels are not (B, H, W) or have more than 2**30 pixels an image, or radius or num_directions is
            out of range.
    """
    check_shape("labels", labels, ("B", "H", "W"), "add a batch axis with labels[None]" if labels.dim() == 2 else "")
    check_integer(labels=labels)
    check_count("pixels in labels", labels.shape[1] * labels.shape[2])
    if not (0 < radius <= MAX_RADIUS):
        raise ValueError(f"radius is {radius}; it must be above 0 and at most {MAX_RADIUS} pixels")
    if not (1 <= num_directions <= NO_DIRECTION):
        raise ValueError(f"num_directions is {num_directions}; it must be 1 to {NO_DIRECTION}")
    return _boundary_targets(labels, float(radius), num_directions, ignore_index)
