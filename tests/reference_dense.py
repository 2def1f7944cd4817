"""What the dense ops compute, by plain float64 loops over pixels from the definitions, differentiable by autograd."""

import math

import torch
from torch import Tensor


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
