"""The extension of Deformable DETR without a compiler: `patch()` lets `import MultiScaleDeformableAttention` find this.

The repositories of Deformable DETR, DINO, Mask DINO, Mask2Former, OneFormer and many others compile a module of that
name from CUDA sources, and Grounding DINO compiles the same functions as `groundingdino._C`. Call `patch` before
importing them, and nothing has to be compiled.

Letters: B batch, S pixels of all levels, Q queries, M heads, D channels per head, L levels, N points per level.
"""

import sys

import torch
from torch import Tensor

from unept.kernels import ms_deform_attn

from .replacing import Replacements

NAMES = ("MultiScaleDeformableAttention", "groundingdino._C")

_replaced = Replacements()


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """The output (B, Q, M * D); the arguments are those of `unept.kernels.ms_deform_attn`."""
    with torch.no_grad():  # those who call it have an autograd function of their own
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
) -> list[Tensor]:
    """The gradients of value, sampling_locations and attention_weights for `grad_output` (B, Q, M * D)."""
    gradients = torch.ops.unept.sparse_sampling_backward(
        grad_output, value, [], sampling_locations, attention_weights, None, True, False, spatial_shapes
    )
    return list(gradients[:3])


def patch() -> int:
    """Put this module in the place of the compiled ones, now and for later imports. Patching twice changes nothing.

    Returns:
        The number of places: names of modules, and modules that have imported a compiled one already.
    """
    if not len(_replaced):
        for name in NAMES:
            compiled = sys.modules.get(name)
            if compiled is not None:
                _replaced.everywhere(compiled, sys.modules[__name__])
            _replaced.module(name, sys.modules[__name__])
    return len(_replaced)


def unpatch() -> int:
    """Undo `patch`. Modules that were imported in between keep what they imported.

    Returns:
        The number of places.
    """
    return _replaced.undo()
