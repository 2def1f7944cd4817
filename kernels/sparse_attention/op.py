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
from torch.autograd import forward_ad

from .. import reference as plain
from .._registration import register_autograd, register_vmap
from ..backend import backend_argument, runs_on_triton
from ..checks import check_count, check_floating, check_same_device, check_shape, compute_dtype
from . import differentiable, torch_backend, triton_backward, triton_forward
from . import shapes as spatial

# --- custom ops -------------------------------------------------------------------------------------------------------


# Not in a CUDA graph of torch.compile: the first call of a size makes tables that outlive it.
@torch.library.custom_op("unept::sparse_sampling", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _sparse_sampling(
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    spatial_shapes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The output. A graph that was captured with spatial_shapes (L, 2) as a tensor has no shapes: it is read here."""
    if value.numel() == 0 or points.numel() == 0:
        return value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))
    if spatial_shapes is not None:
        shapes = spatial.flat_shapes(spatial_shapes.tolist(), value)
    run = (triton_forward if runs_on_triton(value, backend) else torch_backend).forward
    return run(value, shapes, points, scores, reference)


@_sparse_sampling.register_fake
def _sparse_sampling_fake(
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    spatial_shapes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
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
    spatial_shapes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, points, scores and reference; empty tensors for value and reference if not needed."""
    if grad_out.numel() == 0:
        grad_value, grad_points, grad_scores = (t.new_zeros(t.shape) for t in (value, points, scores))
        grad_reference = None if reference is None else reference.new_zeros(reference.shape)
    else:
        if spatial_shapes is not None:
            shapes = spatial_shapes.flatten().tolist()
        run = (triton_backward if runs_on_triton(value, backend) else torch_backend).backward
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
    spatial_shapes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape if needs_value else (0,)),
        points.new_empty(points.shape),
        scores.new_empty(scores.shape),
        reference.new_empty(reference.shape) if reference is not None and needs_reference else value.new_empty(0),
    )


# --- autograd and vmap ------------------------------------------------------------------------------------------------


def _save_inputs_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_out, value, ctx.shapes, points, scores, reference, _, _, spatial_shapes, _ = inputs
    ctx.save_for_backward(grad_out, value, points, scores, reference, spatial_shapes)


def _second_backward(ctx: Any, *grad_grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivatives; on every backend by PyTorch's own operators."""
    grad_out, value, points, scores, reference, spatial_shapes = ctx.saved_tensors
    if spatial_shapes is None:
        spatial_shapes = differentiable.shapes_tensor(ctx.shapes, value.device)
    of_grad_out, of_value, of_points, of_scores, *of_reference = differentiable.backward_derivatives(
        grad_grads, grad_out, value, spatial_shapes, points, scores, reference
    )
    return of_grad_out, of_value, None, of_points, of_scores, *(of_reference or [None]), None, None, None, None


_run_backward = register_autograd(_sparse_sampling_backward, _save_inputs_of_backward, _second_backward)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The forward saves its inputs and nothing else."""
    value, ctx.shapes, points, scores, reference, spatial_shapes, ctx.backend = inputs
    ctx.save_for_backward(value, points, scores, reference, spatial_shapes)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, points, scores, reference, spatial_shapes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_value, needs_reference = needs[0], reference is not None and needs[4]
    inputs = (grad_out, value, ctx.shapes, points, scores, reference)
    grads = _run_backward(*inputs, needs_value, needs_reference, spatial_shapes, ctx.backend)
    return (
        grads[0] if needs_value else None,
        None,
        grads[1] if needs[2] else None,
        grads[2] if needs[3] else None,
        grads[3] if needs_reference else None,
        None,
        None,
    )


_run = register_autograd(_sparse_sampling, _save_inputs, _backward)
register_vmap(_sparse_sampling, unbatched=(5,))
register_vmap(_sparse_sampling_backward, unbatched=(8,), summed={3: 5})


# --- argument checks --------------------------------------------------------------------------------------------------


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
        spatial_shapes: [(H_0, W_0), ...], the height and width of each of the L levels as ints, Python's or NumPy's.
        offsets: (B, Q, M, L, N, 2) floating point, (x, y) in pixels of level l, from the query's reference point. Views
            with any strides are read in place.
        logits: (B, Q, M, L, N) floating point; the softmax over L * N is taken inside.
        reference_points: (B or 1, Q, 2) floating point, (x, y) in [0, 1], pixel centres at (i + 0.5) / size.

    Returns:
        (B, Q, M * D) in value's dtype. Samples outside a map, at NaN and at infinity count as zero.

    Raises:
        TypeError: if a tensor is not floating point, or spatial_shapes holds anything but ints.
        ValueError: if shapes do not fit together, an image has more than 2**30 pixels or queries, or the tensors are
            on several devices.
    """
    if torch.jit.is_tracing():  # sizes may be tensors now, which no check may read
        tensors = (t.to(compute_dtype(value)) for t in (offsets, logits, reference_points))
        maps = value.to(compute_dtype(value))
        return plain.sparse_sampling_attention(maps, spatial_shapes, *tensors).to(value.dtype)
    shapes = spatial.flat_shapes(spatial_shapes, value)
    check_floating(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    check_same_device(value=value, offsets=offsets, logits=logits, reference_points=reference_points)
    _check_samples(value, len(spatial_shapes), offsets=offsets, logits=logits)
    B, Q = offsets.shape[:2]
    images = 1 if reference_points.dim() and reference_points.shape[0] == 1 else B
    check_shape(
        "reference_points", reference_points, (images, Q, 2), "it has one point per query; the first dimension may be 1"
    )
    return _attend(value, shapes, offsets, logits, reference_points, None)


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
            the GPU; a list of pairs of ints avoids that. Under `torch.compile` and `torch.export` a tensor is read when
            the graph runs, once in the forward and once in the backward.
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
    if torch.jit.is_tracing():
        return _traced_ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
    shapes, unread = spatial.read(spatial_shapes, level_start_index, value)
    check_floating(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    check_same_device(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    _check_samples(
        value, len(spatial_shapes), sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    return _attend(value, shapes, sampling_locations, attention_weights, None, unread)


def _attend(
    value: Tensor,
    shapes: list[int],
    points: Tensor,
    scores: Tensor,
    reference: Tensor | None,
    spatial_shapes: Tensor | None,
) -> Tensor:
    """The op on checked arguments; in forward mode, for which it has no formula, by PyTorch's own operators."""
    if forward_ad._current_level < 0:
        return _run(value, shapes, points, scores, reference, spatial_shapes, backend_argument())
    if spatial_shapes is None:
        spatial_shapes = differentiable.shapes_tensor(shapes, value.device)
    return differentiable.sample(value, spatial_shapes, points, scores, reference)


def _traced_ms_deform_attn(value: Tensor, spatial_shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """What torch.jit.trace records: PyTorch's own operators, which neither a saved trace nor ONNX has to look up."""
    if isinstance(spatial_shapes, Tensor):
        return differentiable.sample(value, spatial_shapes, locations, weights)
    maps, locations, weights = (t.to(compute_dtype(value)) for t in (value, locations, weights))
    return plain.ms_deform_attn(maps, spatial_shapes, None, locations, weights).to(value.dtype)


class MSDeformAttnFunction(torch.autograd.Function):
    """`ms_deform_attn` under the name and calling convention that models written for Deformable DETR's op expect.

    `apply` takes the arguments of `ms_deform_attn` and is the same; forward and backward are there for Dynamo, which
    traces them in its place.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Tensor:
        """See `ms_deform_attn`."""
        return ms_deform_attn(*args, **kwargs)

    @staticmethod
    def forward(
        value: Tensor,
        spatial_shapes: Any,
        level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """See `ms_deform_attn`."""
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs and nothing else."""
        value, spatial_shapes, _, locations, weights = inputs[:5]
        ctx.num_inputs, ctx.backend = len(inputs), backend_argument()
        ctx.shapes, unread = spatial.read(spatial_shapes, None, value)
        ctx.save_for_backward(value, locations, weights, unread)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of value, locations and weights."""
        value, locations, weights, unread = ctx.saved_tensors
        needs = ctx.needs_input_grad
        shapes, backend = ctx.shapes, ctx.backend
        grads = _run_backward(grad_out, value, shapes, locations, weights, None, needs[0], False, unread, backend)
        wanted = [
            grads[0] if needs[0] else None,
            None,
            None,
            *(g if n else None for g, n in zip(grads[1:3], needs[3:5], strict=True)),
        ]
        return tuple(wanted + [None] * (ctx.num_inputs - 5))
