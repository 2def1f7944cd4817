"""What `offline` compiles: the launches of each op on tensors without memory, at the paper's shapes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unept.kernels import bilinear_gather_triton, boundary_targets_triton
from unept.kernels.boundary_targets import bin_centres, saturation_of
from unept.kernels.sparse_attention import force_form, triton_backward, triton_forward
from unept.kernels.upsample import argmax_triton, cross_entropy_triton


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _encoder(dtype: torch.dtype, points_dtype: torch.dtype, channels: int = 32) -> tuple[Any, ...]:
    """grad_out, value, shapes, points and scores of the ResNet-50 variant's encoder at 480x480, as its layers call it.

    B=2, L=3, N=16, M=8, D=32, 60x60 pixels per level, points and scores are views of one projection, a plane per head.
    """
    shapes, length = [60, 60] * 3, 3 * 60 * 60
    projection = _meta(8, 2, length, 3 * 48, dtype=points_dtype).permute(1, 2, 0, 3)
    points, scores = projection[..., :96].unflatten(-1, (3, 16, 2)), projection[..., 96:].unflatten(-1, (3, 16))
    return (
        _meta(2, length, 8 * channels, dtype=dtype),
        _meta(2, length, 8, channels, dtype=dtype),
        shapes,
        points,
        scores,
    )


def _attention(
    dtype: torch.dtype,
    *,
    method: str = "binned",
    padded: bool = True,
    reference: bool = True,
    gradient: bool = False,
    channels: int = 32,
    projected: bool = False,
) -> None:
    """The encoder's attention, forward and backward, with maps and gradient of the value in a given form.

    Points and scores are float32, whatever the value is; `projected`, as `projected_sampling_attention` makes them,
    float16 with a gradient in bfloat16.
    """
    grad_out, *inputs = _encoder(dtype, torch.float16 if projected else torch.float32, channels)
    joint = _meta(2, inputs[0].shape[1], 8, 3 * 48, dtype=torch.bfloat16) if projected else None
    centres = _meta(1, inputs[0].shape[1], 2, dtype=torch.float32) if reference else None
    with force_form(padded=padded, value_gradient=method):
        triton_forward.forward(*inputs, centres)
        triton_backward.backward(grad_out, *inputs, centres, True, gradient, joint)


def sparse_sampling(dtype: torch.dtype) -> None:
    """Maps padded, the value's gradient binned."""
    _attention(dtype, projected=dtype == torch.bfloat16)


def sparse_sampling_masked(dtype: torch.dtype) -> None:
    """Maps masked, the value's gradient by atomics."""
    _attention(dtype, padded=False, method="atomic")


def sparse_sampling_mixed(dtype: torch.dtype) -> None:
    """What a network launches beside the paper's under autocast: with float32 points and scores over padded maps, and
    projected inside over masked ones."""
    _attention(dtype)
    _attention(dtype, padded=False, method="atomic", projected=True)
    _attention(dtype, padded=False, projected=True)


def sparse_sampling_wide(dtype: torch.dtype) -> None:
    """Heads of 256 channels, in both forms, and of 64."""
    _attention(dtype, channels=256)
    _attention(dtype, channels=256, padded=False, method="atomic")
    _attention(dtype, channels=64)


def sparse_sampling_widest(dtype: torch.dtype) -> None:
    """Heads of 512 channels, the most that are binned, and of 1024, of which few fit into a program."""
    _attention(dtype, channels=512)
    _attention(dtype, channels=1024, padded=False)


def sparse_sampling_deterministic(dtype: torch.dtype) -> None:
    """The backward that adds integers, always by atomics, with the gradient of the reference points."""
    torch.use_deterministic_algorithms(True)
    try:
        _attention(dtype, gradient=True)
    finally:
        torch.use_deterministic_algorithms(False)


def sparse_sampling_sizes_of_one(dtype: torch.dtype) -> None:
    """One image, pixel, head, channel, query, level and point: arguments that are 1 become constants."""
    value, grad_out, reference = (
        _meta(1, 1, 1, 1, dtype=dtype),
        _meta(1, 1, 1, dtype=dtype),
        _meta(1, 1, 2, dtype=dtype),
    )
    inputs = value, [1, 1], _meta(1, 1, 1, 1, 1, 2, dtype=dtype), _meta(1, 1, 1, 1, 1, dtype=dtype), reference
    for padded, method in ((True, "binned"), (False, "atomic")):
        with force_form(padded=padded, value_gradient=method):
            triton_forward.forward(*inputs)
            triton_backward.backward(grad_out, *inputs, needs_value=True, needs_reference=True)


def ms_deform(dtype: torch.dtype) -> None:
    """The encoder's shapes under Deformable DETR's convention."""
    _attention(dtype, reference=False)


def _gather(size: int, dtype: torch.dtype, paddings: tuple[str, ...]) -> None:
    channels = 256 if size > 1 else 1
    features = _meta(2, channels, size, size, dtype=dtype)
    points = _meta(2, size * size, 2, dtype=torch.float32)
    for padding in paddings:
        out = bilinear_gather_triton.forward(features, points, padding)
        bilinear_gather_triton.backward(out, features, points, padding, needs_features=True, needs_points=True)


def gather(dtype: torch.dtype) -> None:
    """A map of 256 channels at 1/8 of 480x480, read at a point for each of its pixels."""
    _gather(60, dtype, ("border",) if dtype == torch.bfloat16 else ("zeros", "border"))


def _up_sampled(K: int, low_size: int, size: int, dtype: torch.dtype, with_options: bool) -> None:
    logits, target = _meta(2, K, low_size, low_size, dtype=dtype), _meta(2, size, size, dtype=torch.int64)
    # A gradient that sum() expanded.
    grad_losses = _meta(1, dtype=torch.float32)[0].expand(2, size, size)
    offset = _meta(2, 2, size, size, dtype=torch.float32) if with_options else None
    class_weights = _meta(K, dtype=torch.float32) if with_options else None
    cross_entropy_triton.forward(logits, target, (offset,), class_weights, 255)
    cross_entropy_triton.backward((grad_losses,), logits, target, (offset,), class_weights, 255)
    argmax_triton.forward(logits, (size, size), offset)


def up_sampled_loss(dtype: torch.dtype) -> None:
    """150 classes at 1/8 of 480x480; in bfloat16 with offset and class weights, in float32 without."""
    _up_sampled(150, 60, 480, dtype, with_options=dtype == torch.bfloat16)


def _boundary(labels: Tensor, radius: float, num_directions: int, ignore_index: int) -> None:
    boundary_targets_triton.forward(
        labels,
        saturation=saturation_of(radius),
        largest_distance=radius,
        centres=bin_centres(num_directions),
        ignore_index=ignore_index,
    )


def boundary(dtype: torch.dtype) -> None:
    """Labels of 480x480 in bytes; no floating point, whatever the dtype."""
    _boundary(_meta(2, 480, 480, dtype=torch.uint8), 5.0, 8, 255)


def deterministic(dtype: torch.dtype) -> None:
    """The gradients that are added up as integers."""
    torch.use_deterministic_algorithms(True)
    try:
        gather(dtype)
        up_sampled_loss(dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def sizes_of_one(dtype: torch.dtype) -> None:
    """One class, channel, pixel: Triton turns arguments that are 1 into constants, which take other paths."""
    _gather(1, dtype, ("zeros", "border"))
    _up_sampled(1, 1, 1, dtype, with_options=True)
    _boundary(_meta(1, 1, 1, dtype=torch.uint8), 1.0, 1, 1)


# name: (its launches, the dtypes to compile for)
OPS: dict[str, tuple[Callable[[torch.dtype], None], tuple[str, ...]]] = {
    "sparse_sampling": (sparse_sampling, ("bf16", "fp32")),
    "sparse_sampling, masked": (sparse_sampling_masked, ("bf16", "fp32")),
    "sparse_sampling, mixed": (sparse_sampling_mixed, ("bf16",)),
    "sparse_sampling, wide": (sparse_sampling_wide, ("bf16",)),
    "sparse_sampling, widest": (sparse_sampling_widest, ("bf16", "fp32")),
    "sparse_sampling, deterministic": (sparse_sampling_deterministic, ("fp32",)),
    "sparse_sampling, sizes of one": (sparse_sampling_sizes_of_one, ("fp32",)),
    "ms_deform": (ms_deform, ("fp32",)),
    "bilinear_gather": (gather, ("bf16", "fp32")),
    "upsample_cross_entropy": (up_sampled_loss, ("bf16", "fp32")),
    "boundary_targets": (boundary, ("fp32",)),
    "dense, deterministic": (deterministic, ("fp32",)),
    "dense, sizes of one": (sizes_of_one, ("fp32",)),
}
