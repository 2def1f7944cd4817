"""The ops in plain PyTorch: the equations in code. What the fused ops compute, and what exported models compute.

Each function has the signature of the op of its name and equals it for finite inputs, but holds what the op never
holds: all samples, or the logits at full size. They compute in the dtype that they are given, in any floating-point
one; call `.float()` first, as the exporter does, or `.double()` for a reference. All of them but `upsample_argmax` and
`boundary_targets` are differentiable, and `torch.export` and the ONNX exporter can trace all of them.

Letters: B batch, M heads, D channels per head, Q queries, L levels, N points per level, S = sum of H_l * W_l pixels;
C channels, K classes, h x w the logits' map, H x W the full-size map.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# --- attention --------------------------------------------------------------------------------------------------------


def sparse_sampling_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
) -> Tensor:
    """Eq. 2-4 and 6: out[b, q, m] = sum over l, n of softmax(logits[b, q, m])[l, n] * value_l[b, :, m] at c_q + offset.

    value (B, S, M, D), offsets (B, Q, M, L, N, 2) in pixels of level l, logits (B, Q, M, L, N) and reference_points
    (B or 1, Q, 2), the paper's c_q in [0, 1], give out (B, Q, M * D).
    """
    offsets, logits = offsets.permute(2, 0, 1, 3, 4, 5), logits.permute(2, 0, 1, 3, 4)  # heads first
    weights = logits.flatten(3).softmax(-1).unflatten(3, logits.shape[3:])
    locations = []
    for (height, width), offset in zip(spatial_shapes, offsets.unbind(3), strict=True):
        dx, dy = offset.unbind(-1)
        locations.append(reference_points[:, :, None] + torch.stack([dx / width, dy / height], dim=-1))
    return weighted_samples(value, spatial_shapes, locations, weights)


def projected_sampling_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    reference_points: Tensor,
) -> Tensor:
    """Eq. 3 before them: offsets and logits are query[b, q, m] @ weight[m] + bias[m].

    query (B, Q, M, C), weight (M, C, 3 * L * N) and bias (M, 3 * L * N), 2 * L * N columns of offsets before those of
    logits, and the others as above give out (B, Q, M * D).
    """
    projected = torch.einsum("bqmc,mcn->bqmn", query, weight) + bias
    samples = weight.shape[2] // 3
    offsets, logits = projected.split([2 * samples, samples], dim=-1)
    levels = len(spatial_shapes)
    offsets, logits = offsets.unflatten(-1, (levels, -1, 2)), logits.unflatten(-1, (levels, -1))
    return sparse_sampling_attention(value, spatial_shapes, offsets, logits, reference_points)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    level_start_index: object,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Deformable DETR's op: out[b, q, m] = sum over l, n of attention_weights * value_l[b, :, m] at sampling_locations.

    value (B, S, M, D), sampling_locations (B, Q, M, L, N, 2) in [0, 1] and attention_weights (B, Q, M, L, N) give out
    (B, Q, M * D). level_start_index is not used: the levels lie one after another.
    """
    locations, weights = sampling_locations.permute(2, 0, 1, 3, 4, 5), attention_weights.permute(2, 0, 1, 3, 4)
    return weighted_samples(value, spatial_shapes, locations.unbind(3), weights)


def weighted_samples(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """Sum the samples of all levels: value (B, S, M, D), L locations (M, B, Q, N, 2) and weights (M, B, Q, L, N).

    In an image at [0, 1] x [0, 1], as here, pixel centres lie at (i + 1/2) / size; samples outside are zero.
    """
    maps = value.permute(2, 0, 3, 1).split([height * width for height, width in spatial_shapes], dim=3)
    out = value.new_zeros(())
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[level].flatten(0, 1).unflatten(2, (height, width))  # (M * B, D, height, width)
        grid = (2 * locations[level] - 1).flatten(0, 1).to(value.dtype)  # (M * B, Q, N, 2), in [-1, 1]
        samples = F.grid_sample(image, grid, align_corners=False)  # (M * B, D, Q, N)
        out = out + (samples * weights[:, :, :, level].flatten(0, 1)[:, None]).sum(-1)
    return out.unflatten(0, locations[0].shape[:2]).permute(1, 3, 0, 2).flatten(2)  # (B, Q, M * D)


# --- interpolation ----------------------------------------------------------------------------------------------------


def bilinear_gather(features: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """The interpolation of Eq. 2: out[b, c, p] = features[b, c] at points[b, p], bilinear.

    features (B, C, H, W) and points (B, ..., 2), (x, y) in pixels, give out (B, C, ...).
    """
    H, W = features.shape[2:]
    x, y = points.flatten(1, -2).unbind(-1)
    grid = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], dim=-1)  # pixels -0.5 and W - 0.5 become -1 and 1
    out = F.grid_sample(features, grid[:, None].to(features.dtype), padding_mode=padding, align_corners=False)
    return out.reshape(*features.shape[:2], *points.shape[1:-1])


def shifted(maps: Tensor, offset: Tensor) -> Tensor:
    """maps (B, K, H, W) read at p + offset(p), clamped to the map; offset (B, 2, H, W), (dx, dy) in whole pixels."""
    H, W = maps.shape[2:]
    x = (torch.arange(W, device=maps.device) + offset[:, 0].long()).clamp(0, W - 1)
    y = (torch.arange(H, device=maps.device)[:, None] + offset[:, 1].long()).clamp(0, H - 1)
    index = (y * W + x).flatten(1)[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, index).unflatten(2, (H, W))


def upsampled(logits: Tensor, size: tuple[int, int], offset: Tensor | None = None) -> Tensor:
    """The up-sampling of Sec. 3.2: z[k, p] = logits[k] up-sampled bilinearly to `size` and read at p + offset(p).

    logits (B, K, h, w) and offset (B, 2, H, W), (dx, dy) in pixels, give z (B, K, H, W). An offset between pixels is
    read from the logits themselves: z[k, p] = logits[k] at (s + 1/2) * (w / W, h / H) - 1/2, s = clamp(p + offset(p)).
    """
    if offset is None or not offset.is_floating_point():
        z = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return z if offset is None else shifted(z, offset)
    (h, w), (H, W) = logits.shape[2:], size
    dx, dy = torch.where(offset.isnan(), 0, offset).to(logits.dtype).unbind(1)
    x = (torch.arange(W, device=offset.device) + dx).clamp(0, W - 1)
    y = (torch.arange(H, device=offset.device)[:, None] + dy).clamp(0, H - 1)
    source = torch.stack([(x + 0.5) * (w / W) - 0.5, (y + 0.5) * (h / H) - 0.5], dim=-1)
    return bilinear_gather(logits, source, padding="border")


# --- losses and predictions -------------------------------------------------------------------------------------------


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None = None,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The segmentation losses of Eq. 7: loss(p) = class_weights[t] * -log softmax(z[:, p])[t], t = target(p).

    logits (B, K, h, w), target (B, H, W), offset (B, 2, H, W) and class_weights (K,) give the mean over the pixels that
    are not ignored, each counted by its weight and zero if there is none; their sum; or (B, H, W).
    """
    z, target = upsampled(logits, (target.shape[1], target.shape[2]), offset), target.long()
    summed = "none" if reduction == "none" else "sum"
    loss = F.cross_entropy(z, target, class_weights, ignore_index=ignore_index, reduction=summed)
    if reduction != "mean":
        return loss
    valid = target != ignore_index
    weights = z.new_ones(z.shape[1]) if class_weights is None else class_weights
    total = (weights[torch.where(valid, target, 0)] * valid).sum()
    return loss / torch.where(total == 0, 1, total)


def upsample_argmax(logits: Tensor, size: tuple[int, int], offset: Tensor | None = None) -> Tensor:
    """The refined prediction of Sec. 3.2: ids(p) = argmax_k z[k, p]; (B, K, h, w) to (B, H, W)."""
    return upsampled(logits, size, offset).argmax(1)


# --- targets ----------------------------------------------------------------------------------------------------------


def boundary_targets(
    labels: Tensor, *, radius: float = 5, num_directions: int = 8, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """The targets of Sec. 3.2: the distance to the nearest pixel of another class, and the direction of its gradient.

    labels (B, H, W) give distance (B, H, W) float32, saturated, and direction (B, H, W), bin k of n centred on the
    angle -180 + k * 360 / n degrees, 255 where the distance is over the radius or the label ignored.
    """

    def windows(maps: Tensor, reach: int, outside: float) -> tuple[Tensor, Tensor, Tensor]:
        """The pixels q around each p, (B, H, W, 2 reach + 1, 2 reach + 1), and (dx, dy) = q - p."""
        step = torch.arange(-reach, reach + 1, device=maps.device)
        padded = F.pad(maps, (reach, reach, reach, reach), value=outside)
        return padded.unfold(1, len(step), 1).unfold(2, len(step), 1), step, step[:, None]

    saturation = math.floor((radius + 2 * math.sqrt(2)) ** 2) + 1
    label, own = labels.long(), labels.long()[:, :, :, None, None]
    q_label, dx, dy = windows(label, math.isqrt(saturation), ignore_index)
    of_another_class = (q_label != own) & (q_label != ignore_index) & (own != ignore_index)
    squared = torch.where(of_another_class, dx**2 + dy**2, saturation).amin((-2, -1)).clamp(max=saturation)
    distance = squared.double().sqrt().float()

    # g(p) = sum over q in 5x5 of (q - p) / |q - p|^2 * (v(q) - distance(p)); v(q) = 0 at pixels of another class.
    q_label, _, _ = windows(label, 2, ignore_index)
    q_distance, dx, dy = windows(distance, 2, 0.0)
    v = torch.where(q_label == own, q_distance, 0.0)
    rise = torch.where(q_label == ignore_index, 0.0, v - distance[:, :, :, None, None])
    rise = rise / (dx**2 + dy**2).clamp(min=1)
    angle = torch.atan2((dy * rise).sum((-2, -1)), (dx * rise).sum((-2, -1)))
    direction = ((angle + math.pi) * (num_directions / (2 * math.pi))).round().long() % num_directions
    return distance, torch.where((distance <= radius) & (label != ignore_index), direction, 255)
