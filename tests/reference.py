"""What each op computes: plain float64 loops straight from the paper, with gradients by hand.

Nothing here uses grid_sample, interpolate or a backend of the project.
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
