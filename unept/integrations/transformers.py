"""Hugging Face's deformable attention on this project's kernels: `patch(model)`, and back: `unpatch(model)`.

For the models of transformers that read values at sampled points: Deformable DETR, RT-DETR and RT-DETRv2, D-FINE,
Grounding DINO, Mask2Former, OneFormer, OmDet-Turbo, LW-DETR, RF-DETR and what else has the same three operators.
Weights, outputs and gradients stay what they are; the operator takes bfloat16 and float16 as they come, and keeps
nothing but its inputs for the backward.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unept.kernels import ms_deform_attn

CLASS = "MultiScaleDeformableAttention"
FUNCTION = "multi_scale_deformable_attention"
FUNCTION_V2 = "multi_scale_deformable_attention_v2"
ATTRIBUTE_V2 = "ms_deformable_attn_core"

_ORIGINAL = "_unept_original"  # of a patched module: the attribute's name, and what it was if it was the module's own


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
    """Of a module of the class that Deformable DETR and others have."""
    return ms_deform_attn(value, value_spatial_shapes_list, None, sampling_locations, attention_weights)


def _function(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The function of Mask2Former and OneFormer."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def _function_v2(
    value: Tensor,
    value_spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """The function of RT-DETRv2 and D-FINE, whose levels may have different numbers of points, side by side.

    Args:
        value: (B, S, M, D).
        value_spatial_shapes: (height, width) of each level.
        sampling_locations: (B, Q, M, P, 2) in [0, 1], P the points of all levels.
        attention_weights: (B, Q, M, P).
        num_points_list: how many of them belong to each level.
        method: `"default"`; modules of another one are not patched.
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


def _replacement(module: nn.Module) -> tuple[str, Any] | None:
    """The attribute of a module that holds or calls the operator, and what to set it to; None: not such a module."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    if kind.__name__ == CLASS:
        return "forward", types.MethodType(_forward, module)
    if "discrete" in (getattr(module, "method", None), getattr(module, "decoder_method", None)):
        return None  # RT-DETRv2 and D-FINE can read the nearest pixel instead
    if hasattr(module, ATTRIBUTE_V2):
        return ATTRIBUTE_V2, _function_v2
    forward = _with_ours(kind)  # type: ignore[arg-type]  # mypy takes no class for hashable
    return None if forward is None else ("forward", types.MethodType(forward, module))


@functools.cache
def _with_ours(kind: Any) -> types.FunctionType | None:
    """A class's forward, which finds our function under the name of theirs; None if it calls neither."""
    forward = kind.forward
    called = {FUNCTION: _function, FUNCTION_V2: _function_v2}
    ours = {name: function for name, function in called.items() if name in forward.__code__.co_names}
    if not ours:
        return None
    # A code object of its own, once a class: Dynamo keeps what it compiled by code object, and in these globals.
    code, names = forward.__code__.replace(), {**forward.__globals__, **ours}
    function = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return function


def patch(model: nn.Module) -> int:
    """Have every deformable attention in `model` run on `unept.kernels.ms_deform_attn`; a second time changes nothing.

    Patch before `torch.compile`; which backend runs is `UNEPT_BACKEND`'s choice, as ever.

    Args:
        model: of transformers, or any module that contains one.

    Returns:
        How many of its modules run on it now.

    Raises:
        ValueError: it has none.
    """
    found = 0
    for module in model.modules():
        replacement = _replacement(module)
        if replacement is None:
            continue
        found += 1
        name, ours = replacement
        if _ORIGINAL not in vars(module):
            setattr(module, _ORIGINAL, (name, vars(module).get(name)))
            setattr(module, name, ours)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no deformable attention that this could replace: give a model of transformers "
            f"whose modules are of class {CLASS} or call {FUNCTION} or {FUNCTION_V2}"
        )
    return found


def unpatch(model: nn.Module) -> int:
    """Undo `patch`; returns how many modules were as patched."""
    found = 0
    for module in model.modules():
        if _ORIGINAL not in vars(module):
            continue
        found += 1
        name, original = getattr(module, _ORIGINAL)
        if original is None:
            delattr(module, name)
        else:
            setattr(module, name, original)
        delattr(module, _ORIGINAL)
    return found
