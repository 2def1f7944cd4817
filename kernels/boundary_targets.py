"""Targets of the boundary and direction heads (Sec. 3.2), from a label map, by distance transform.

    distance(p)  = |p - q| to the nearest pixel q of another class
    g(p)         = sum over q in the 5x5 pixels around p of (q - p) / |q - p|^2 * (v(q) - distance(p)),
                   v(q) = distance(q) where q has p's class, 0 where it has another; ignored and outside pixels omitted
    direction(p) = the bin of atan2(g_y, g_x): bin k of n is centred on -180 + k * 360 / n degrees (y points down)

Ignored pixels and what lies outside the image belong to no class: they are not "another class", or void regions and
the padding of a crop would make boundaries. Distances are exact up to radius + 2 sqrt(2), as far as a 5x5 neighbourhood
of a pixel within the radius reaches; beyond, and at ignored pixels, they saturate.

The distance is separable, also for any number of classes at once. Each pixel keeps the nearest class of its column, and
how far off that and any other class are; a pixel then asks each column at hand for what is not of its own class:

    distance^2(y, x) = min over dx of dx^2 + (second if nearest is the class of (y, x) else first)(y, x + dx)

Both backends do the same operations in the same order, products and sums rounded apart, and agree to the bit.

Legend
    B batch, H x W map, n directions.
    labels     (B, H, W), integers
    nearest    (B, H, W), the class of the nearest pixel in the column that is not ignored
    first      (B, H, W), squared distance to that pixel: 0 unless ignored itself
    second     (B, H, W), squared distance to the nearest pixel in the column of any other class
    squared    (B, H, W), distance^2; like first and second at most `saturation`, the first integer beyond
               (radius + 2 sqrt(2))^2
    distance   (B, H, W) float32
    direction  (B, H, W) int64
Kernels: `boundary_targets_triton`.
"""

import math

import torch
from torch import Tensor

from . import boundary_targets_triton
from ._registration import register_vmap
from .backend import runs_on_triton
from .checks import check_count, check_integer, check_shape

NO_DIRECTION = 255

# Twice the saturation has to fit int16; the time grows with the radius.
MAX_RADIUS = 100


def saturation_of(radius: float) -> int:
    """The largest squared distance: the first integer beyond (radius + 2 sqrt(2))^2."""
    return math.floor((radius + 2 * math.sqrt(2)) ** 2) + 1


def largest_square(radius: float) -> int:
    """The square of the largest distance within the radius. Roots are compared: the square of sqrt(13) is below 13."""
    return max(square for square in range(saturation_of(radius)) if math.sqrt(square) <= radius)


def bin_centres(num_directions: int) -> tuple[float, ...]:
    """x and y of the unit vector at the centre of each bin, one after the other: 2 n numbers."""
    angles = [2 * math.pi * k / num_directions - math.pi for k in range(num_directions)]
    return tuple(part for angle in angles for part in (math.cos(angle), math.sin(angle)))


# --- PyTorch ----------------------------------------------------------------------------------------------------------
# Maps in the smallest integers that hold them, padded with ignored pixels and flattened to (P,), so that all neighbours
# in one direction are one contiguous slice. On a CPU, comparisons into the type compared and modular arithmetic are
# vectorised; torch.where, masked_fill_ and comparisons into bool are not, and take 20 times as long.


def _map_dtype(labels: Tensor, ignore_index: int, saturation: int) -> torch.dtype:
    """Of the labels and of sums of two squared distances."""
    low, high = (int(label) for label in labels.aminmax())
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"labels holds ids from {low} to {high}; they must fit int32: number the classes anew")
    low, high = min(low, ignore_index), max(high, ignore_index, 2 * saturation)
    fitting = (t for t in (torch.uint8, torch.int16) if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
    return next(fitting, torch.int32)


def _shifted(size: int, shift: int) -> tuple[slice, slice]:
    """Slices of one axis: pixels p for which p + shift is inside, and the pixels p + shift."""
    return slice(max(0, -shift), size - max(0, shift)), slice(max(0, shift), size + min(0, shift))


def _nearest_in_column(ids: Tensor, width: int, ignore_index: int, saturation: int) -> tuple[Tensor, Tensor, Tensor]:
    """nearest, first and second, (P,) each, of padded labels (P,), rows of `width`."""
    ignored = torch.eq(ids, ignore_index, out=torch.empty_like(ids))
    unmet = ignored * saturation
    nearest = ids.clone()
    first = torch.full_like(ids, saturation)
    second = torch.full_like(ids, saturation)
    old_buffer, buffer = torch.empty_like(ids), torch.empty_like(ids)
    # From far to near: what is met later is nearer and takes the first place.
    for reach in range(math.isqrt(saturation - 1), -1, -1):
        for shift in {reach, -reach}:
            here, there = _shifted(len(ids), shift * width)
            met, old, work = ids[there], old_buffer[here], buffer[here]
            # 1 where no other class is met; there, second stays at most what it is, and nearest what it was.
            torch.eq(met, nearest[here], out=old).bitwise_or_(ignored[there])
            torch.mul(old, saturation, out=work).add_(first[here])
            torch.minimum(second[here], work, out=second[here])
            torch.sub(nearest[here], met, out=work).mul_(old)
            torch.add(met, work, out=nearest[here])
            torch.add(unmet[there], reach * reach, out=work)
            torch.minimum(first[here], work, out=first[here])
    return nearest, first, second


def _squared_distance(ids: Tensor, width: int, ignore_index: int, saturation: int) -> Tensor:
    """Squared distance to the nearest pixel of another class, (P,), of padded labels (P,), rows of `width`."""
    nearest, first, second = _nearest_in_column(ids, width, ignore_index, saturation)
    second -= first
    squared = torch.full_like(ids, saturation)
    buffer = torch.empty_like(ids)
    reach = math.isqrt(saturation - 1)
    for shift in range(-reach, reach + 1):
        here, there = _shifted(len(ids), shift)
        candidate = torch.eq(nearest[there], ids[here], out=buffer[here])
        candidate.mul_(second[there]).add_(first[there]).add_(shift * shift)
        torch.minimum(squared[here], candidate, out=squared[here])
    ignored = torch.eq(ids, ignore_index, out=buffer)
    return torch.maximum(squared, ignored.mul_(saturation))


def _gradient(
    ids: Tensor, squared: Tensor, roots: Tensor, pixels: Tensor, width: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """g_x and g_y at some pixels, (N,) each, from padded labels and squared distances (P,), rows of `width`.

    Opposite neighbours are subtracted first, so that where all of them cancel (in the middle of a line, say) the sum is
    exactly zero, in any floating-point arithmetic.
    """
    centre, own = ids.index_select(0, pixels), squared.index_select(0, pixels)
    corners = pixels - (2 * width + 2)
    buffer = torch.empty_like(centre)

    def v(dy: int, dx: int) -> Tensor:
        offset = (2 + dy) * width + 2 + dx
        label = ids[offset:].index_select(0, corners)
        near = squared[offset:].index_select(0, corners)
        near.mul_(torch.eq(label, centre, out=buffer))
        # v(q) is 0 at another class; distance(p) in its place leaves an ignored pixel out.
        near.add_(torch.eq(label, ignore_index, out=buffer).mul_(own))
        return roots.index_select(0, near.int())

    g_x, g_y = roots.new_zeros(len(pixels)), roots.new_zeros(len(pixels))
    for i in range(13, 25):  # the second half of the 5x5 neighbourhood, row by row
        dy, dx = i // 5 - 2, i % 5 - 2
        difference = v(dy, dx) - v(-dy, -dx)
        # Not add_(alpha=...), which may fuse and then rounds otherwise.
        g_x += difference * (dx / (dx * dx + dy * dy))
        g_y += difference * (dy / (dx * dx + dy * dy))
    return g_x, g_y


def _direction(g_x: Tensor, g_y: Tensor, num_directions: int) -> Tensor:
    """The bin whose centre is nearest in angle, (N,) uint8; no gradient has the angle 0, as of atan2."""
    direction = torch.full(g_x.shape, num_directions // 2, dtype=torch.uint8, device=g_x.device)
    largest = torch.zeros_like(g_x)
    centres = bin_centres(num_directions)
    for k in range(num_directions):
        cosine = g_x * centres[2 * k] + g_y * centres[2 * k + 1]
        direction.masked_fill_(cosine > largest, k)
        torch.maximum(largest, cosine, out=largest)
    return direction


def _boundary_targets_torch(
    labels: Tensor, radius: float, num_directions: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    B, H, W = labels.shape
    if labels.numel() == 0:
        return labels.new_empty(labels.shape, dtype=torch.float32), labels.new_empty(labels.shape, dtype=torch.int64)
    saturation = saturation_of(radius)
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):
        labels = labels.long()  # PyTorch computes little with these
    # As far as the distance looks, shared by what comes before and after; the gradient looks 2 pixels each way.
    after = max(math.isqrt(saturation - 1) - 2, 2)
    labels = labels.to(_map_dtype(labels, ignore_index, saturation))
    padded = torch.nn.functional.pad(labels, (2, after, 2, after), value=ignore_index)
    width, ids = padded.shape[2], padded.flatten()

    def unpadded(flat: Tensor) -> Tensor:
        return flat.view(padded.shape)[:, 2 : 2 + H, 2 : 2 + W]

    squared = _squared_distance(ids, width, ignore_index, saturation)
    # By table, from float64: PyTorch's float32 square root may be an ulp off on a CPU, and the backends should agree.
    roots = torch.arange(saturation + 1, dtype=torch.float64, device=labels.device).sqrt().float()
    distance = roots.index_select(0, unpadded(squared).flatten().int()).view(B, H, W)
    pixels = (squared <= largest_square(radius)).nonzero()[:, 0]
    bins = _direction(*_gradient(ids, squared, roots, pixels, width, ignore_index), num_directions)
    direction = torch.full_like(ids, NO_DIRECTION, dtype=torch.uint8).index_copy_(0, pixels, bins)
    return distance, unpadded(direction).to(torch.int64)


# --- custom op --------------------------------------------------------------------------------------------------------


# Not in a CUDA graph of torch.compile: the first call with more than 16 directions makes a table that outlives it.
@torch.library.custom_op("unept::boundary_targets", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _boundary_targets(labels: Tensor, radius: float, num_directions: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    if not runs_on_triton(labels):
        return _boundary_targets_torch(labels, radius, num_directions, ignore_index)
    return boundary_targets_triton.forward(
        labels,
        saturation=saturation_of(radius),
        largest_distance=math.sqrt(largest_square(radius)),
        centres=bin_centres(num_directions),
        ignore_index=ignore_index,
    )


@_boundary_targets.register_fake
def _(labels: Tensor, radius: float, num_directions: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape, dtype=torch.float32), labels.new_empty(labels.shape, dtype=torch.int64)


register_vmap(_boundary_targets)


# --- public function --------------------------------------------------------------------------------------------------


def boundary_targets(
    labels: Tensor, *, radius: float = 5, num_directions: int = 8, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Distance to the boundary and direction away from it, the targets of the boundary and direction heads (Sec. 3.2).

    Args:
        labels: (B, H, W), class ids that fit int32, of any integer dtype.
        radius: of the boundary's neighbourhood, in pixels, above 0 and at most 100; the time grows with it.
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
        ValueError: labels are not (B, H, W), an image has more than 2**30 pixels, radius or num_directions is out of
            range, or, on the torch backend, an id does not fit int32.
    """
    check_shape("labels", labels, ("B", "H", "W"), "add a batch axis with labels[None]" if labels.dim() == 2 else "")
    check_integer(labels=labels)
    check_count("pixels in labels", labels.shape[1] * labels.shape[2])
    if not (0 < radius <= MAX_RADIUS):
        raise ValueError(f"radius is {radius}; it must be above 0 and at most {MAX_RADIUS} pixels")
    if not (1 <= num_directions <= NO_DIRECTION):
        raise ValueError(f"num_directions is {num_directions}; it must be 1 to {NO_DIRECTION}")
    return _boundary_targets(labels, float(radius), num_directions, ignore_index)
