"""The ops in PyTorch's own, for programs that are to run without this package: ONNX and `torch.export` files.

`torch.onnx.export(model)` takes them by itself. A program of `torch.export` keeps the ops until it is told otherwise:

    program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS})
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import reference
from ._registration import DECOMPOSITIONS
from .bilinear_gather import _bilinear_gather as gather_op
from .checks import compute_dtype
from .sparse_attention import differentiable
from .sparse_attention.op import _sparse_sampling as attention_op
from .upsample.argmax import _upsample_argmax as argmax_op
from .upsample.cross_entropy import _upsample_cross_entropy as cross_entropy_op
from .upsample.cross_entropy import _upsample_cross_entropy_pair as cross_entropy_pair_op


def _sparse_sampling(
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    scores: Tensor,
    reference_points: Tensor | None,
    spatial_shapes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    if spatial_shapes is not None:
        return differentiable.sample(value, spatial_shapes, points, scores, reference_points)
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    dtype = compute_dtype(value)
    maps, points, scores = value.to(dtype), points.to(dtype), scores.to(dtype)
    if reference_points is None:
        return reference.ms_deform_attn(maps, pairs, None, points, scores).to(value.dtype)
    return reference.sparse_sampling_attention(maps, pairs, points, scores, reference_points).to(value.dtype)


def _bilinear_gather(features: Tensor, points: Tensor, padding: str, backend: str | None = None) -> Tensor:
    dtype = compute_dtype(features)
    return reference.bilinear_gather(features.to(dtype), points.to(dtype), padding).to(features.dtype)


def _upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    offset: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> Tensor:
    logits = logits.to(compute_dtype(logits))
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    options: dict[str, Any] = {"ignore_index": ignore_index, "class_weights": weights, "reduction": "none"}
    return reference.upsample_cross_entropy(logits, target, offset, **options)


def _upsample_cross_entropy_pair(
    logits: Tensor,
    target: Tensor,
    offset: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    plain, moved = (
        _upsample_cross_entropy(logits, target, shift, class_weights, ignore_index) for shift in (None, offset)
    )
    return plain, moved


def _upsample_argmax(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    return reference.upsample_argmax(logits.to(compute_dtype(logits)), (height, width), offset)


DECOMPOSITIONS.update(
    {
        attention_op._opoverload: _sparse_sampling,
        gather_op._opoverload: _bilinear_gather,
        cross_entropy_op._opoverload: _upsample_cross_entropy,
        cross_entropy_pair_op._opoverload: _upsample_cross_entropy_pair,
        argmax_op._opoverload: _upsample_argmax,
    }
)
