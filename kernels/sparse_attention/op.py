"""Sparse sampling attention over one or many scales: Eq. 2-4 and 6 of the paper.

    out[b, q, m] = sum over l, n of  softmax(logits[b, q, m])[l, n] * value_l[b, :, m] at (c_q + offset[b, q, m, l, n])

Letters: B batch, S = sum of H_l * W_l, M heads, D channels per head, Q queries, L levels, N points per level.

    value      (B, S, M, D)        the levels one after another, each in row-major order
    points     (B, Q, M, L, N, 2)  (x, y): offsets in pixels of level l, or locations in [0, 1]
    scores     (B, Q, M, L, N)     logits, normalised inside over L * N, or weights that are used as they are
    reference  (B or 1, Q, 2)      (x, y) in [0, 1], the paper's c_q; None: points are locations, scores are weights
    out        (B, Q, M * D)

Pixel centres lie at (i + 0.5) / size, so a sample is at x = reference_x * W_l - 0.5 + offset_x pixels, counted from the
centre of pixel 0. Between centres values are interpolated bilinearly; what lies outside the map counts as zero, so a
sample reads something only where -1 < x < W_l and -1 < y < H_l. Comparisons with NaN are false: NaN is outside, and so
is infinity.

On a GPU the op runs `triton_forward` and `triton_backward`, elsewhere `torch_backend`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import chosen_backend, run_on, runs_on_triton
from ..checks import check_count, check_floating, check_integer, check_same_device, check_shape, check_sides
from . import torch_backend, triton_backward, triton_forward
from .levels import levels

# --- custom ops -------------------------------------------------------------------------------------------------------


# Not in a CUDA graph of torch.compile: the first call of a size makes tables that outlive it.
@torch.library.custom_op("unept::sparse_sampling", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _sparse_sampling(
    value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None
) -> Tensor:
    if value.numel() == 0 or points.numel() == 0:
        return value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))
    run = (triton_forward if runs_on_triton(value) else torch_backend).forward
    return run(value, shapes, points, scores, reference)


@_sparse_sampling.register_fake
def _(value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None) -> Tensor:
    return value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))


@torch.library.custom_op("unept::sparse_sampling_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _sparse_sampling_backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    needs_value: bool,
    needs_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, points, scores and reference; empty tensors for value and reference if not needed."""
    if grad_out.numel() == 0:
        grad_value, grad_points, grad_scores = (t.new_zeros(t.shape) for t in (value, points, scores))
        grad_reference = None if reference is None else reference.new_zeros(reference.shape)
    else:
        run = (triton_backward if runs_on_triton(value) else torch_backend).backward
        grad_value, grad_points, grad_scores, grad_reference = run(
            grad_out, value, shapes, points, scores, reference, needs_value, needs_reference
        )
        if reference is not None and grad_reference is not None:
            shared = reference.shape[0] != value.shape[0]
            grad_reference = (grad_reference.sum(0, keepdim=True) if shared else grad_reference).to(reference.dtype)
    # A custom op returns no None.
    grad_value = grad_value if needs_value else value.new_empty(0)
    grad_reference = grad_reference if needs_reference else value.new_empty(0)
    return grad_value, grad_points, grad_scores, grad_reference


@_sparse_sampling_backward.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    needs_value: bool,
    needs_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape if needs_value else (0,)),
        points.new_empty(points.shape),
        scores.new_empty(scores.shape),
        reference.new_empty(reference.shape) if reference is not None and needs_reference else value.new_empty(0),
    )


class _SparseSampling(torch.autograd.Function):
    """The op with its gradient; it saves its inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: list[int], points: Tensor, scores: Tensor, reference: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(value, points, scores, reference)
        ctx.shapes, ctx.backend = shapes, chosen_backend()
        return _sparse_sampling(value, shapes, points, scores, reference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, points, scores, reference = ctx.saved_tensors
        needs_value, _, needs_points, needs_scores, needs_reference = ctx.needs_input_grad
        grads = run_on(
            ctx.backend,
            _sparse_sampling_backward,
            grad_out,
            value,
            ctx.shapes,
            points,
            scores,
            reference,
            needs_value,
            needs_reference,
        )
        return (
            grads[0] if needs_value else None,
            None,
            grads[1] if needs_points else None,
            grads[2] if needs_scores else None,
            grads[3] if needs_reference else None,
        )


# --- argument checks --------------------------------------------------------------------------------------------------


def _flat_shapes(spatial_shapes: Sequence[Sequence[int]], value: Tensor) -> list[int]:
    """[(H_0, W_0), ...] -> [H_0, W_0, ...], checked against `value`."""
    is_sequence = isinstance(spatial_shapes, Sequence)
    pairs = is_sequence and all(isinstance(shape, Sequence) and len(shape) == 2 for shape in spatial_shapes)
    shapes = [size for shape in spatial_shapes for size in shape] if pairs else []
    if not (is_sequence and all(isinstance(size, (int, torch.SymInt)) for size in shapes)):
        raise TypeError(
            f"spatial_shapes is {spatial_shapes}; it must hold Python ints, so that the host need not wait for the "
            "device: convert it once, outside the training loop, with spatial_shapes.tolist()"
        )
    if not shapes or any(size < 1 for size in shapes):
        raise ValueError(
            f"spatial_shapes is {spatial_shapes}; it must hold one (height, width), each >= 1, for every level: "
            "[(height, width)] for a single one"
        )
    check_shape("value", value, ("B", "S", "M", "D"))
    length = sum(height * width for height, width in spatial_shapes)
    check_count("pixels in spatial_shapes", length)
    check_sides("a level of spatial_shapes", *shapes)
    if value.shape[1] != length:
        raise ValueError(
            f"spatial_shapes {spatial_shapes} make S = {length} pixels, but value has {value.shape[1]} (shape "
            f"{tuple(value.shape)}): flatten each level's height and width and concatenate the levels along dimension 1"
        )
    return shapes


def _check_samples(value: Tensor, L: int, **named: Tensor) -> None:
    """Raise ValueError unless two tensors, points and scores in this order, fit `value`, L and each other."""
    (points_name, points), (scores_name, scores) = named.items()
    B, _, M, _ = value.shape
    check_shape(
        points_name, points, (B, "Q", M, L, "N", 2), "B and M must be those of value, L the length of spatial_shapes"
    )
    check_shape(
        scores_name, scores, tuple(points.shape[:-1]), f"it has the shape of {points_name} without the last dimension"
    )
    check_count("queries", points.shape[1])
    if points.shape[4] == 0:
        raise ValueError(
            f"{points_name} has shape {tuple(points.shape)}; there must be at least one point per level (N >= 1)"
        )


# --- public functions -------------------------------------------------------------------------------------------------


def sparse_sampling_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
) -> Tensor:
    """Attend from each query to N sampled points on each of L feature maps (Eq. 2-4 and 6 of the paper).

    The tensors may differ in dtype; coordinates and sums are float32, or float64 if value is float64.

    Args:
        value: (B, S, M, D) floating point, S = sum of H_l * W_l, the levels one after another, each in row-major order.
        spatial_shapes: [(H_0, W_0), ...], the height and width of each of the L levels as Python ints.
        offsets: (B, Q, M, L, N, 2) floating point, (x, y) in pixels of level l, from the query's reference point. Views
            with any strides are read in place.
        logits: (B, Q, M, L, N) floating point; the softmax over L * N is taken inside.
        reference_points: (B or 1, Q, 2) floating point, (x, y) in [0, 1], pixel centres at (i + 0.5) / size.

    Returns:
        (B, Q, M * D) in value's dtype. Samples outside a map, at NaN and at infinity count as zero.

    Raises:
        TypeError: if a tensor is not floating point, or spatial_shapes holds anything but Python ints.
        ValueError: if shapes do not fit together, an image has more than 2**30 pixels or queries, or the tensors are
            on several devices.
    """
    shapes = _flat_shapes(spatial_shapes, value)
    check_floating(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    check_same_device(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    _check_samples(value, len(spatial_shapes), offsets=offsets, logits=logits)
    B, Q = offsets.shape[:2]
    images = 1 if reference_points.dim() and reference_points.shape[0] == 1 else B
    check_shape(
        "reference_points", reference_points, (images, Q, 2), "it has one point per query; the first dimension may be 1"
    )
    return _SparseSampling.apply(value, shapes, offsets, logits, reference_points)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """Sparse sampling attention under the signature of Deformable DETR's MSDeformAttn: the same op, softmax outside.

    Args:
        value: (B, S, M, D) floating point, S = sum of H_l * W_l, the levels one after another, each in row-major order.
        spatial_shapes: (L, 2), (height, width) of each level. A tensor on a GPU is read to the host, which waits for
            the GPU; a list of pairs of ints avoids that, and is required under `torch.compile`.
        level_start_index: (L,), the first row of each level in value. It follows from spatial_shapes, so it is checked
            where that needs no read of a device and otherwise unused; it may be None.
        sampling_locations: (B, Q, M, L, N, 2) floating point, (x, y) in [0, 1], pixel centres at (i + 0.5) / size.
        attention_weights: (B, Q, M, L, N) floating point, used as they are.
        im2col_step: unused, part of the signature only: batches are not split.

    Returns:
        (B, Q, M * D) in value's dtype. Samples outside a map, at NaN and at infinity count as zero.

    Raises:
        TypeError: if a tensor is not floating point, or spatial_shapes does not hold integers.
        ValueError: as `sparse_sampling_attention`, and if level_start_index says that levels are not consecutive.
    """
    starts = None if isinstance(level_start_index, Tensor) else level_start_index
    if isinstance(spatial_shapes, Tensor):
        check_integer(spatial_shapes=spatial_shapes)
        check_shape("spatial_shapes", spatial_shapes, ("L", 2))
        spatial_shapes = spatial_shapes.tolist()
        if isinstance(level_start_index, Tensor) and level_start_index.device.type == "cpu":
            starts = level_start_index.tolist()
    shapes = _flat_shapes(spatial_shapes, value)
    consecutive = [start for _, start, _, _ in levels(shapes)]
    if starts is not None and list(starts) != consecutive:
        raise ValueError(
            f"level_start_index is {list(starts)}; the levels must lie one after another in value, which makes it "
            f"{consecutive} for spatial_shapes {spatial_shapes}: pass None"
        )
    check_floating(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    check_same_device(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    _check_samples(
        value, len(spatial_shapes), sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    return _SparseSampling.apply(value, shapes, sampling_locations, attention_weights, None)


class MSDeformAttnFunction:
    """`ms_deform_attn` under the name and calling convention that models written for Deformable DETR's op expect."""

    apply = staticmethod(ms_deform_attn)
