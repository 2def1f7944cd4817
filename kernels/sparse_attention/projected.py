"""Sparse sampling attention whose offsets and logits are projected inside: Eq. 3 with Eq. 4 and 6 of the paper.

    [offsets, logits][b, q, m] = query[b, q, m] @ weight[m] + bias[m]
    out = sparse_sampling_attention(value, shapes, offsets, logits, reference)

Letters: those of `op`, and C channels of a query per head.

    query   (B, Q, M, C)          the paper's W^Q q
    weight  (M, C, 3 * L * N)     U^pos, 2 * L * N numbers as (L, N, (x, y)), and then U^wts, L * N
    bias    (M, 3 * L * N)

At a batch of 16 the paper's encoder projects 66 million points a layer, 796 MB in float32 that are written, kept and
read by every kernel. For queries in half precision the op projects in float16 and keeps nothing: the backward projects
again. float16 has steps of 1/128 pixel below 16 pixels, bfloat16 of 1/16. Gradients are bfloat16, whose range is that
of float32; kernels write those of offsets and logits side by side, as the products for query and weight read them.
Sums are float32 everywhere. For other queries, and where graphs are exported, the parts are ops of their own.

The bias is a part of the product rather than added in float32 by the kernels: it is rounded to float16, and the sum
again, which leaves positions within 1/64 pixel at 16 pixels. That is what is asked of them, and four kernels would load
and add three more numbers per sample for less.

Why the product is not a part of the kernels, by calculation for the same encoder. Points and logits in float16 take 398
MB: written and read once in the forward, 0.19 ms at 4.3 TB/s, written once and read three times in the backward, 0.37
ms. The product is 6.4 G multiply-adds, which tensor cores do in a small part of that. But logits are needed twice, for
the largest and for the weights, and points by three kernels of the backward: at least four products instead of two. A
program of 64 queries would read 9 KB of weights for its head, 200 MB in all, from L2, and hold 64 x 144 sums, 72
registers per thread beside the 127 that the forward has: two programs on a multiprocessor instead of four, where
gathers wait for memory. In pieces of a few points it would hold less, but each piece goes through shared memory from
the layout of a product, queries over lanes and columns, to that of the samples, all points of a query in one lane.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._registration import refuse_second_derivatives, register_autograd, register_vmap
from .._triton import HAS_TRITON
from ..backend import backend_argument, runs_on_triton
from ..checks import check_floating, check_same_device, check_shape
from . import shapes as spatial
from . import torch_backend, triton_backward, triton_forward
from .op import sparse_sampling_attention

HALF = (torch.float16, torch.bfloat16)
GRADIENT = torch.bfloat16


def project(query: Tensor, weight: Tensor, bias: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Offsets (B, Q, M, L, N, 2) and logits (B, Q, M, L, N), views of one projection in the dtype of the arguments."""
    device = "cpu" if query.is_meta else query.device.type  # meta has no autocast
    with torch.autocast(device, enabled=False):  # which would change the dtype
        if torch.jit.is_tracing():  # the sizes of a reshape become constants of the trace
            projected = torch.einsum("bqmc,mcn->bqmn", query, weight) + bias
        else:
            heads = query.permute(2, 0, 1, 3).flatten(1, 2)  # (M, B * Q, C)
            projected = torch.baddbmm(bias[:, None], heads, weight)
            projected = projected.unflatten(1, query.shape[:2]).permute(1, 2, 0, 3)
    samples = weight.shape[2] // 3
    offsets, logits = projected.split([2 * samples, samples], dim=-1)
    return offsets.unflatten(-1, (levels, -1, 2)), logits.unflatten(-1, (levels, -1))


# --- custom ops -------------------------------------------------------------------------------------------------------


def _points(on_triton: bool, levels: int, *projection: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and logits as the backends take them."""
    dtype = torch.float16 if on_triton else torch.float32
    query, weight, bias = (tensor.to(dtype) for tensor in projection)
    return project(query, weight, bias, levels)


@torch.library.custom_op("unept::projected_sampling", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _projected_sampling(
    value: Tensor,
    shapes: Sequence[int],
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    reference: Tensor,
    backend: str | None = None,
) -> Tensor:
    """The output."""
    if value.numel() == 0 or query.numel() == 0:
        return value.new_empty((value.shape[0], query.shape[1], value.shape[2] * value.shape[3]))
    on_triton = runs_on_triton(value, backend)
    offsets, logits = _points(on_triton, len(shapes) // 2, query, weight, bias)
    run = (triton_forward if on_triton else torch_backend).forward
    return run(value, shapes, offsets, logits, reference)


@_projected_sampling.register_fake
def _(
    value: Tensor,
    shapes: Sequence[int],
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    reference: Tensor,
    backend: str | None = None,
) -> Tensor:
    return value.new_empty((value.shape[0], query.shape[1], value.shape[2] * value.shape[3]))


@torch.library.custom_op("unept::projected_sampling_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _projected_sampling_backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    reference: Tensor,
    needs_value: bool,
    needs_reference: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, query, weight, bias and reference; empty tensors for those that are not needed."""
    if grad_out.numel() == 0:
        return tuple(tensor.new_zeros(tensor.shape) for tensor in (value, query, weight, bias, reference))
    on_triton = runs_on_triton(value, backend)
    offsets, logits = _points(on_triton, len(shapes) // 2, query, weight, bias)
    # Triton packs x and y of a point into one word, so that rows of the joint gradient need an even length.
    joint = query.new_empty((*logits.shape[:3], weight.shape[2]), dtype=GRADIENT) if on_triton else None
    if joint is not None and logits.shape[4] % 2 == 0:
        grad_value, _, _, grad_reference = triton_backward.backward(
            grad_out, value, shapes, offsets, logits, reference, needs_value, needs_reference, joint
        )
    else:
        run = (triton_backward if on_triton else torch_backend).backward
        offsets, logits = offsets.to(torch.float32), logits.to(torch.float32)
        grad_value, grad_offsets, grad_logits, grad_reference = run(
            grad_out, value, shapes, offsets, logits, reference, needs_value, needs_reference
        )
        joint = torch.cat([grad_offsets.flatten(3), grad_logits.flatten(3)], dim=-1).to(GRADIENT)
    if grad_reference is not None:
        shared = reference.shape[0] != value.shape[0]
        grad_reference = (grad_reference.sum(0, keepdim=True) if shared else grad_reference).to(reference.dtype)
    return (
        grad_value if needs_value else value.new_empty(0),
        *_project_backward(joint, query, weight, bias),
        grad_reference if needs_reference else value.new_empty(0),
    )


def _project_backward(joint: Tensor, query: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, weight and bias, from that of the projection (B, Q, M, 3 * L * N)."""
    rows = joint.permute(2, 0, 1, 3).flatten(1, 2)  # (M, B * Q, 3 * L * N)
    heads = query.permute(2, 0, 1, 3).flatten(1, 2).to(joint.dtype)
    with torch.autocast(query.device.type, enabled=False):
        grad_query = torch.bmm(rows, weight.to(joint.dtype).mT).unflatten(1, query.shape[:2]).permute(1, 2, 0, 3)
        grad_weight = torch.bmm(heads.mT, rows).to(weight.dtype)
    grad_bias = rows.sum(1, dtype=torch.float32).to(bias.dtype)
    return grad_query.to(query.dtype).contiguous(), grad_weight, grad_bias


@_projected_sampling_backward.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    reference: Tensor,
    needs_value: bool,
    needs_reference: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape if needs_value else (0,)),
        query.new_empty(query.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        reference.new_empty(reference.shape) if needs_reference else value.new_empty(0),
    )


# --- autograd ---------------------------------------------------------------------------------------------------------

_run_backward = refuse_second_derivatives(_projected_sampling_backward, "projected_sampling_attention")


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The forward saves its inputs and nothing else."""
    value, ctx.shapes, query, weight, bias, reference, ctx.backend = inputs
    ctx.save_for_backward(value, query, weight, bias, reference)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value, *others = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_value, *grads = _run_backward(grad_out, value, ctx.shapes, *others, needs[0], needs[5], ctx.backend)
    wanted = [grad if needed else None for grad, needed in zip(grads, needs[2:6], strict=True)]
    return (grad_value if needs[0] else None, None, *wanted, None)


_run = register_autograd(_projected_sampling, _save_inputs, _backward)
register_vmap(_projected_sampling, unbatched=(3, 4))
register_vmap(_projected_sampling_backward, unbatched=(4, 5), summed={4: 6})


# --- public function --------------------------------------------------------------------------------------------------


def _is_fused(query: Tensor) -> bool:
    """Whether a query is projected inside the op: in half precision, on a GPU, and not into a graph for others."""
    if query.dtype not in HALF or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_compiling():
        return HAS_TRITON and query.is_cuda and not torch.compiler.is_exporting()
    return runs_on_triton(query)


def projected_sampling_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    reference_points: Tensor,
) -> Tensor:
    """Attend from each query to N points on each of L maps, at offsets that are linear in the query (Eq. 2-4 and 6).

    Queries in half precision on a GPU are projected in float16, with sums in float32, and nothing of the projection is
    kept for the backward, which has first derivatives only. Other queries are projected in the dtype of the weight.

    Args:
        value: (B, S, M, D), see `sparse_sampling_attention`.
        spatial_shapes: [(H_0, W_0), ...], the height and width of each of the L levels.
        query: (B, Q, M, C) floating point, C channels per head.
        weight: (M, C, 3 * L * N) floating point: first the columns of the offsets, as (L, N, (x, y)), in pixels of each
            level, then those of the logits, as (L, N).
        bias: (M, 3 * L * N), in the same order, of the dtype of the weight.
        reference_points: (B or 1, Q, 2), see `sparse_sampling_attention`.

    Returns:
        (B, Q, M * D) in value's dtype.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit together, or the tensors are on several devices.
    """
    levels = len(spatial_shapes)
    if not _is_fused(query):
        offsets, logits = project(query.to(weight.dtype), weight, bias, levels)
        return sparse_sampling_attention(value, spatial_shapes, offsets, logits, reference_points)
    shapes = spatial.flat_shapes(spatial_shapes, value)
    tensors = {"query": query, "weight": weight, "bias": bias, "reference_points": reference_points}
    check_floating(value=value, **tensors)
    check_same_device(value=value, **tensors)
    B, _, M, _ = value.shape
    check_shape("query", query, (B, "Q", M, "C"), "B and M must be those of value")
    check_shape("weight", weight, (M, query.shape[3], "3 * L * N"), "M and C must be those of query")
    columns = weight.shape[2]
    if columns == 0 or columns % (3 * levels):
        raise ValueError(f"weight has {columns} columns; they must be 3 * L * N for {levels} levels and N >= 1 points")
    check_shape("bias", bias, (M, columns), "one number for each column of weight")
    images = 1 if reference_points.shape[0] == 1 else B
    check_shape("reference_points", reference_points, (images, query.shape[1], 2), "it has one point per query")
    return _run(value, shapes, query, weight, bias, reference_points, backend_argument())
