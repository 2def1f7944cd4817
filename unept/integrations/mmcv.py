"""Deformable attention of mmcv on this project's kernels: `patch()` for mmdetection, mmdetection3d and their kin.

mmcv runs `MultiScaleDeformableAttnFunction` on a GPU and `multi_scale_deformable_attn_pytorch` elsewhere. Both are
replaced wherever they have been imported, and so are the functions of mmcv's compiled extension, which projects such as
BEVFormer call from functions of their own.
"""

import importlib

from torch import Tensor

from unept.kernels import MSDeformAttnFunction, ms_deform_attn

from . import deformable_detr
from .replacing import Replacements

MODULE = "mmcv.ops.multi_scale_deform_attn"

_replaced = Replacements()


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`unept.kernels.ms_deform_attn` under mmcv's name and with its keywords."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """The function of mmcv's extension: see `deformable_detr.ms_deform_attn_forward`."""
    return deformable_detr.ms_deform_attn_forward(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
    )


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int = 64,
) -> None:
    """The function of mmcv's extension, which writes the gradients into the last three tensors."""
    inputs = (value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
    gradients = deformable_detr.ms_deform_attn_backward(*inputs, grad_output)
    for out, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        out.copy_(gradient)


def patch() -> int:
    """Run mmcv's deformable attention on `unept.kernels.ms_deform_attn`, in all models. Patching twice changes nothing.

    Returns:
        The number of places at which a function was replaced.

    Raises:
        ImportError: mmcv is not there, or it has no operators, as mmcv-lite.
    """
    if len(_replaced):
        return len(_replaced)
    try:
        module = importlib.import_module(MODULE)
    except ImportError as error:
        raise ImportError(f"{MODULE} cannot be imported ({error}): install mmcv, not mmcv-lite") from error
    _replaced.everywhere(module.MultiScaleDeformableAttnFunction, MSDeformAttnFunction)
    _replaced.everywhere(module.multi_scale_deformable_attn_pytorch, multi_scale_deformable_attn_pytorch)
    extension = getattr(module, "ext_module", None)
    for function in (ms_deform_attn_forward, ms_deform_attn_backward):
        if hasattr(extension, function.__name__):
            _replaced.attribute(extension, function.__name__, function)
    return len(_replaced)


def unpatch() -> int:
    """Undo `patch`. Modules that were imported in between keep what they imported.

    Returns:
        The number of places.
    """
    return _replaced.undo()
