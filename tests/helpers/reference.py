"""What each op computes: plain float64 loops straight from the paper.

Nothing here uses grid_sample, interpolate or a backend of the project. The attention's gradients are written by hand;
the dense ops' references are differentiable by autograd.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


# --- sparse sampling attention (Eq. 2-4, 6) ---------------------------------------------------------------------------


def _tent(position: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight max(0, 1 - |position - i|) that linear interpolation gives pixel i = 0 .. size - 1, and its slope."""
    distance = position - np.arange(size)
    near = np.abs(distance) < 1  # false for NaN
    return np.where(near, 1 - np.abs(distance), 0.0), np.where(near, -np.sign(distance), 0.0)


def sparse_sampling(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    points: Tensor,
    weights: Tensor,
    reference: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted sums of bilinear samples, one sample at a time: `sum(w * v_<c + delta>)`.

    Args:
        value: (B, S, M, D).
        spatial_shapes: [(H_0, W_0), ...].
        points: (B, Q, M, L, N, 2), (x, y) in pixels from the reference.
        weights: (B, Q, M, L, N), used as they are.
        reference: (B or 1, Q, 2) in [0, 1], pixel i's centre at (i + 0.5) / size.
        grad_out: (B, Q, M * D), the gradient of some loss with respect to the output.

    Returns:
        out and that loss's gradients of value, points, weights and reference, float64.
    """
    v, p, w, c, g = (_float64(t) for t in (value, points, weights, reference, grad_out))
    batch, queries, heads, _, num_points, _ = p.shape
    g = g.reshape(batch, queries, heads, -1)
    out, grad_v, grad_p, grad_w, grad_c = (np.zeros_like(a) for a in (g, v, p, w, c))
    for b, q, m in np.ndindex(batch, queries, heads):
        shared = b if c.shape[0] > 1 else 0
        start = 0
        for level, (height, width) in enumerate(spatial_shapes):
            pixels = slice(start, start + height * width)
            start += height * width
            image = v[b, pixels, m].reshape(height, width, -1)
            for n in range(num_points):
                delta_x, delta_y = p[b, q, m, level, n]
                along_x, slope_x = _tent(c[shared, q, 0] * width - 0.5 + delta_x, width)
                along_y, slope_y = _tent(c[shared, q, 1] * height - 0.5 + delta_y, height)
                weight = w[b, q, m, level, n]
                sample = np.einsum("y,x,yxd->d", along_y, along_x, image)
                out[b, q, m] += weight * sample
                grad_w[b, q, m, level, n] = sample @ g[b, q, m]
                bilinear = np.outer(along_y, along_x).reshape(-1, 1)
                grad_v[b, pixels, m] += weight * bilinear * g[b, q, m]
                upstream = weight * (image @ g[b, q, m])
                grad_x, grad_y = along_y @ upstream @ slope_x, slope_y @ upstream @ along_x
                grad_p[b, q, m, level, n] = grad_x, grad_y
                grad_c[shared, q] += grad_x * width, grad_y * height
    out, grad_v, grad_p, grad_w, grad_c = (
        torch.from_numpy(a) for a in (out.reshape(grad_out.shape), grad_v, grad_p, grad_w, grad_c)
    )
    return out, grad_v, grad_p, grad_w, grad_c


def sparse_sampling_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eq. 6: `softmax` over all levels and points, then the weighted sum. Returns as `sparse_sampling` does."""
    z = _float64(logits)
    weights = np.zeros_like(z)
    for b, q, m in np.ndindex(*z.shape[:3]):
        shifted = np.exp(z[b, q, m] - z[b, q, m].max())
        weights[b, q, m] = shifted / math.fsum(shifted.flat)
    out, grad_value, grad_offsets, grad_weights, grad_reference = sparse_sampling(
        value, spatial_shapes, offsets, torch.from_numpy(weights), reference_points, grad_out
    )
    grad_logits = np.zeros_like(z)
    for b, q, m in np.ndindex(*z.shape[:3]):
        w, grad_w = weights[b, q, m], grad_weights[b, q, m].numpy()
        grad_logits[b, q, m] = w * (grad_w - math.fsum((w * grad_w).flat))
    return out, grad_value, grad_offsets, torch.from_numpy(grad_logits), grad_reference


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Locations (B, Q, M, L, N, 2) in [0, 1] instead of offsets, weights as given: out and the three gradients."""
    sizes = torch.tensor([(width, height) for height, width in spatial_shapes], dtype=torch.float64)[:, None]
    pixels = sampling_locations.detach().cpu().double() * sizes
    origin = torch.zeros(1, sampling_locations.shape[1], 2)
    out, grad_value, grad_pixels, grad_weights, _ = sparse_sampling(
        value, spatial_shapes, pixels, attention_weights, origin, grad_out
    )
    return out, grad_value, grad_pixels * sizes, grad_weights


# --- dense ops (Eq. 5, 7, Sec. 3.2): torch scalars, pixel by pixel ------------------------------------------------


def read_bilinear(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(C,): the (C, H, W) image at (x, y) in pixels, 0-dim tensors; pixels outside count as zero."""
    C, H, W = image.shape
    value = image.new_zeros(C)
    lower_x, lower_y = math.floor(x.item()), math.floor(y.item())
    for j in (lower_y, lower_y + 1):
        for i in (lower_x, lower_x + 1):
            if 0 <= i < W and 0 <= j < H:
                value = value + (1 - (x - i).abs()) * (1 - (y - j).abs()) * image[:, j, i]
    return value


def bilinear_gather(features: Tensor, points: Tensor, padding: str) -> Tensor:
    """features (B, C, H, W), points (B, P, 2) -> (B, C, P)."""
    B, C, H, W = features.shape
    columns = []
    for b in range(B):
        for x, y in points[b]:
            nothing = x.isnan() or y.isnan() or (padding == "zeros" and not (-1 < x < W and -1 < y < H))
            if padding == "border":
                x, y = x.clamp(0, W - 1), y.clamp(0, H - 1)
            columns.append(features.new_zeros(C) if nothing else read_bilinear(features[b], x, y))
    return torch.stack(columns).view(B, -1, C).transpose(1, 2)


def upsampled(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    """(B, H, W, K): the up-sampled logits (B, K, h, w), read at p + offset(p) if there is an offset (B, 2, H, W)."""
    B, K, h, w = logits.shape
    H, W = size
    pixels = []
    for b in range(B):
        for Y in range(H):
            for X in range(W):
                dx, dy = (0.0, 0.0) if offset is None else offset[b, :, Y, X].tolist()
                x = min(max(X + (0.0 if math.isnan(dx) else dx), 0), W - 1)
                y = min(max(Y + (0.0 if math.isnan(dy) else dy), 0), H - 1)
                x = min(max((x + 0.5) * w / W - 0.5, 0), w - 1)
                y = min(max((y + 0.5) * h / H - 0.5, 0), h - 1)
                pixels.append(read_bilinear(logits[b], *torch.tensor([x, y], dtype=torch.float64)))
    return torch.stack(pixels).view(B, H, W, K)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None = None,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = 255,
) -> Tensor:
    B, H, W = target.shape
    z = upsampled(logits, (H, W), offset)
    losses, total = [], 0.0
    for b in range(B):
        for y in range(H):
            for x in range(W):
                label = int(target[b, y, x])
                if label == ignore_index:
                    losses.append(logits.new_zeros(()))
                    continue
                weight = 1.0 if class_weights is None else float(class_weights[label])
                losses.append(weight * (z[b, y, x].exp().sum().log() - z[b, y, x, label]))
                total += weight
    losses = torch.stack(losses).view(B, H, W)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (total or 1.0)


def squared_distance(labels: Tensor, radius: float, ignore_index: int = 255) -> Tensor:
    """(H, W) int64, from one (H, W) label map."""
    H, W = labels.shape
    saturation = math.floor((radius + 2 * math.sqrt(2)) ** 2) + 1
    found = labels.tolist()
    squared = torch.full((H, W), saturation)
    for y in range(H):
        for x in range(W):
            for j in range(H):
                for i in range(W):
                    if found[j][i] != found[y][x] and ignore_index not in (found[j][i], found[y][x]):
                        squared[y, x] = min(int(squared[y, x]), (j - y) ** 2 + (i - x) ** 2)
    return squared


def direction_angle(labels: Tensor, distance: Tensor, ignore_index: int = 255) -> Tensor:
    """(H, W) float64, atan2(g_y, g_x) of the distance's gradient; NaN where the gradient vanishes."""
    H, W = labels.shape
    found, distances = labels.tolist(), distance.tolist()
    angle = torch.full((H, W), math.nan, dtype=torch.float64)
    for y in range(H):
        for x in range(W):
            g_x = g_y = 0.0
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    j, i = y + dy, x + dx
                    if (dx, dy) == (0, 0) or not (0 <= j < H and 0 <= i < W) or found[j][i] == ignore_index:
                        continue
                    value = distances[j][i] if found[j][i] == found[y][x] else 0.0
                    g_x += dx / (dx * dx + dy * dy) * (value - distances[y][x])
                    g_y += dy / (dx * dx + dy * dy) * (value - distances[y][x])
            if math.hypot(g_x, g_y) > 1e-9:
                angle[y, x] = math.atan2(g_y, g_x)
    return angle
