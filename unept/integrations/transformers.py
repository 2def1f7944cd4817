"""Run the deformable attention of Hugging Face's models on this project's kernels: `patch(model)`, `unpatch(model)`.

This works for the models of transformers that read values at sampled points: Deformable DETR, RT-DETR and RT-DETRv2,
D-FINE, Grounding DINO, Mask2Former, OneFormer, OmDet-Turbo, LW-DETR, RF-DETR and any other with the same operators.
Weights, outputs and gradients stay the same; the operator takes bfloat16 and float16 without conversion, and saves only
its inputs for the backward.

Letters: B batch, S pixels of all levels, Q queries, M heads, D channels per head, P points of all levels.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unept.kernels import ms_deform_attn

# In transformers, the operator is a module of this class, or a function that modules call by one of these names, or the
# second function as an attribute of modules.
CLASS = "MultiScaleDeformableAttention"
FUNCTION = "multi_scale_deformable_attention"
FUNCTION_V2 = "multi_scale_deformable_attention_v2"
ATTRIBUTE_V2 = "ms_deformable_attn_core"

# The attribute of a patched module that holds the name of the replaced attribute, and its value if it was the module's
# own (None if it was that of the class).
_ORIGINAL = "_unept_original"


def _forward(
    self: nn.Module,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[Sequence[int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Replaces the forward of a module of `CLASS`, as Deformable DETR and others have it."""
    return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


def _function(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Replaces `FUNCTION`, as Mask2Former and OneFormer call it."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def _function_v2(
    value: Tensor,
    value_spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """Replaces `FUNCTION_V2`, as RT-DETRv2 and D-FINE call it. Levels may have different numbers of points.

    Args:
        value: (B, S, M, D).
        value_spatial_shapes: (height, width) of each level.
        sampling_locations: (B, Q, M, P, 2), (x, y) in [0, 1], one level after another.
        attention_weights: (B, Q, M, P), normalised over P.
        num_points_list: the number of points of each level.
        method: always `"default"`, since modules with another method are not patched.

    Returns:
        (B, Q, M * D).
    """
    shapes = [(int(height), int(width)) for height, width in value_spatial_shapes]
    levels, points = len(num_points_list), num_points_list[0]
    if all(count == points for count in num_points_list):
        locations = sampling_locations.unflatten(3, (levels, points))
        return ms_deform_attn(value, shapes, None, locations, attention_weights.unflatten(3, (levels, points)))
    parts = zip(
        shapes,
        value.split([height * width for height, width in shapes], dim=1),
        sampling_locations.split(list(num_points_list), dim=3),
        attention_weights.split(list(num_points_list), dim=3),
        strict=True,
    )
    outputs = [
        ms_deform_attn(pixels, [shape], None, locations.unsqueeze(3), weights.unsqueeze(3))
        for shape, pixels, locations, weights in parts
    ]
    return sum(outputs[1:], start=outputs[0])


def _find_replacement(module: nn.Module) -> tuple[str, Any] | None:
    """The name of the attribute that holds or calls the operator, and its new value; None for any other module."""
    cls: Any = type(module)
    if not cls.__module__.startswith("transformers."):
        return None
    if cls.__name__ == CLASS:
        return "forward", types.MethodType(_forward, module)
    if "discrete" in (getattr(module, "method", None), getattr(module, "decoder_method", None)):
        return None  # RT-DETRv2 and D-FINE can read the nearest pixel instead
    if hasattr(module, ATTRIBUTE_V2):
        return ATTRIBUTE_V2, _function_v2
    forward = _rebind_forward(cls)
    return None if forward is None else ("forward", types.MethodType(forward, module))


@functools.cache
def _rebind_forward(cls: Any) -> types.FunctionType | None:
    """A copy of a class's forward that finds our functions under the names of theirs; None if it calls neither."""
    forward = cls.forward
    replacements = {FUNCTION: _function, FUNCTION_V2: _function_v2}
    called = {name: function for name, function in replacements.items() if name in forward.__code__.co_names}
    if not called:
        return None
    # Each class gets one code object of its own: Dynamo caches what it compiled by code object, and in these globals.
    code, names = forward.__code__.replace(), {**forward.__globals__, **called}
    function = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return function


def patch(model: nn.Module) -> int:
    """Run every deformable attention in `model` on `unept.kernels.ms_deform_attn`. Patching twice changes nothing more.

    Patch before `torch.compile`. The backend is chosen as for all operators, by `UNEPT_BACKEND`.

    Args:
        model: a model of transformers, or any module that contains one.

    Returns:
        The number of modules that are patched now.

    Raises:
        ValueError: if the model has no deformable attention.
    """
    count = 0
    for module in model.modules():
        replacement = _find_replacement(module)
        if replacement is None:
            continue
        count += 1
        name, value = replacement
        if _ORIGINAL not in vars(module):
            setattr(module, _ORIGINAL, (name, vars(module).get(name)))
            setattr(module, name, value)
    if not count:
        raise ValueError(
            f"{type(model).__name__} has no deformable attention that can be replaced: give a model of transformers "
            f"whose modules are of class {CLASS} or call {FUNCTION} or {FUNCTION_V2}"
        )
    return count


def unpatch(model: nn.Module) -> int:
    """Undo `patch`.

    Returns:
        The number of modules that were patched.
    """
    count = 0
    for module in model.modules():
        if _ORIGINAL not in vars(module):
            continue
        count += 1
        name, original = getattr(module, _ORIGINAL)
        if original is None:
            delattr(module, name)
        else:
            setattr(module, name, original)
        delattr(module, _ORIGINAL)
    return count
