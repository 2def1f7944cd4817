"""Sparse sampling attention in PyTorch's own differentiable operators: derivatives of any order and in either mode.

It is `op`'s equation with every sample in memory, four corners of each. It serves where the op itself cannot: second
derivatives, forward mode (`torch.func.jvp`), and graphs whose spatial shapes are tensors that nothing may read. The
letters and the conventions are those of `op`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import compute_dtype


def shapes_tensor(shapes: Sequence[int], device: torch.device) -> Tensor:
    """H_0, W_0, H_1, W_1, ... as a tensor (L, 2)."""
    return torch.tensor(shapes, device=device).view(-1, 2)


def sample(
    value: Tensor, spatial_shapes: Tensor, points: Tensor, scores: Tensor, reference: Tensor | None = None
) -> Tensor:
    """The op; spatial_shapes (L, 2), (height, width) of each level, is a tensor that is not read to the host."""
    dtype = compute_dtype(value)
    points, weights = points.to(dtype), scores.to(dtype)
    spatial_shapes = spatial_shapes.to(value.device)
    size = spatial_shapes.flip(1)[:, None]  # (L, 1, 2), (width, height)
    if reference is None:
        position = points * size - 0.5
    else:
        position = reference.to(dtype)[:, :, None, None, None] * size - 0.5 + points
        weights = weights.flatten(3).softmax(-1).unflatten(3, scores.shape[3:])
    valid = ((position > -1) & (position < size)).all(-1)  # not at NaN
    position = torch.where(valid[..., None], position, 0)
    low = position.detach().floor()
    x0, y0 = low.long().unbind(-1)
    fx, fy = (position - low).unbind(-1)
    height, width = spatial_shapes.long()[:, :, None].unbind(1)  # (L, 1) each
    area = height * width
    start = area.cumsum(0) - area
    out: Any = 0
    for x, wx in ((x0, 1 - fx), (x0 + 1, fx)):
        for y, wy in ((y0, 1 - fy), (y0 + 1, fy)):
            in_bounds = valid & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            row = torch.where(in_bounds, start + y * width + x, 0)
            out = out + _weighted_rows(value.to(dtype), row, in_bounds, weights * wx * wy)
    return out.flatten(2).to(value.dtype)


def _weighted_rows(value: Tensor, row: Tensor, in_bounds: Tensor, weights: Tensor) -> Tensor:
    """Sum of the rows of value (B, S, M, D) that are in bounds; row and the others (B, Q, M, L, N). (B, Q, M, D)."""
    B, Q, M, _, _ = row.shape
    index = row.transpose(2, 3).transpose(3, 4).reshape(B, -1, M, 1).expand(-1, -1, -1, value.shape[3])
    rows = value.gather(1, index).view(B, Q, -1, M, value.shape[3]).transpose(2, 3)  # (B, Q, M, L * N, D)
    rows = torch.where(in_bounds.flatten(3)[..., None], rows, 0)
    return (rows * weights.flatten(3)[..., None]).sum(3)


def backward_derivatives(
    grad_grads: Sequence[Tensor],
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
) -> tuple[Tensor, ...]:
    """What comes back through the op's backward.

    Args:
        grad_grads: into the gradients of value, points, scores and reference; of any other shape where the backward did
            not compute one.
        grad_out: the gradient that the backward was given.
        value, spatial_shapes, points, scores, reference: see `sample`.

    Returns:
        The gradients of grad_out, value, points, scores and, unless it is None, reference.
    """
    tensors = [tensor for tensor in (value, points, scores, reference) if tensor is not None]

    def run(value: Tensor, *others: Tensor) -> Tensor:
        return sample(value, spatial_shapes, *others)

    def backward(grad_out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(run, *tensors)[1](grad_out)

    wanted = [
        grad if grad.shape == tensor.shape else torch.zeros_like(tensor)
        for grad, tensor in zip(grad_grads, tensors, strict=False)
    ]
    return torch.func.vjp(backward, grad_out, *tensors)[1](tuple(wanted))
