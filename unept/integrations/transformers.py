"""Run the deformable attention of Hugging Face's models on this project's kernels: `patch(model)`, `unpatch(model)`.

This works for the models of transformers that read values at sampled points: Deformable DETR, RT-DETR and RT-DETRv2,
D-FINE, DEIMv2, Grounding DINO, Mask2Former, OneFormer, OmDet-Turbo, LW-DETR, RF-DETR, PP-DocLayout and any other with
the same operators.
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


# --- patched classes --------------------------------------------------------------------------------------------------


class _Patched:
    """What the patched classes have in common. An instance is pickled and copied as its original class, patched."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_patched, (_original_class(type(self)),), vars(self)


def _new_patched(original: Any) -> Any:
    """An empty instance of a class's patched form: what copying and unpickling begin with."""
    patched = _patched_class(original)
    if patched is None:
        raise ValueError(
            f"{original.__module__}.{original.__name__} calls no deformable attention in the installed version of "
            "transformers: load the model with the version that saved it"
        )
    return patched.__new__(patched)


def _original_class(patched: Any) -> Any:
    """The class of transformers under a patched class."""
    return patched.__mro__[2]


@functools.cache
def _patched_class(cls: Any) -> Any:
    """A subclass of a class of transformers that runs on our operator; None if the class does not use the operator."""
    if cls.__name__ == CLASS:
        namespace: dict[str, Any] = {"forward": _forward}
    elif FUNCTION in cls.forward.__code__.co_names or FUNCTION_V2 in cls.forward.__code__.co_names:
        namespace = {"forward": _rebind_forward(cls.forward)}
    elif ATTRIBUTE_V2 in cls.forward.__code__.co_names:
        namespace = {ATTRIBUTE_V2: property(lambda self: _function_v2)}
    else:
        return None
    # The name stays, since device maps and other tools go by the names of classes.
    return type(cls.__name__, (_Patched, cls), {**namespace, "__doc__": f"`{cls.__name__}` on `unept.kernels`."})


def _rebind_forward(forward: Any) -> types.FunctionType:
    """A copy of a forward that finds our functions under the names of theirs."""
    # It has a code object of its own: Dynamo caches what it compiled by code object, and in these globals.
    names = {**forward.__globals__, FUNCTION: _function, FUNCTION_V2: _function_v2}
    code = forward.__code__.replace()
    function = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return function


def _find_patched_class(module: nn.Module) -> Any:
    """The class that a module has once it is patched; None if it does not use the operator, or not this form of it."""
    cls: Any = type(module)
    if isinstance(module, _Patched):
        return cls
    if not cls.__module__.startswith("transformers."):
        return None
    if "discrete" in (getattr(module, "method", None), getattr(module, "decoder_method", None)):
        return None  # RT-DETRv2, D-FINE and DEIMv2 can read the nearest pixel instead
    return _patched_class(cls)


# --- modules whose forward is wrapped ---------------------------------------------------------------------------------


def _set_class(module: nn.Module, cls: Any) -> None:
    """Change a module's class. What keeps its old forward to wrap it, as accelerate's hooks do, gets the new one."""
    old = type(module).forward
    for name, value in vars(module).items():
        if getattr(value, "__func__", None) is old and value.__self__ is module:
            setattr(module, name, types.MethodType(cls.forward, module))
    module.__class__ = cls


def _check_forward(name: str, module: nn.Module) -> None:
    """Raise ValueError if the forward that was put on a module itself does not end in that of its class."""
    own = vars(module).get("forward")
    if own is not None and type(module).forward not in _reachable_functions(own, module):
        raise ValueError(
            f"the forward of {name or 'the model'} ({type(module).__name__}) was replaced on the module by "
            f"{getattr(own, '__qualname__', type(own).__name__)}, which does not call the operator that patch puts in: "
            "patch the model first, and wrap it, or load other kernels into it, afterwards"
        )


def _reachable_functions(start: Any, module: nn.Module) -> set[Any]:
    """The functions that `start`, a function in place of a module's forward, can call: itself, what it wraps or binds,
    and the methods that are kept as attributes of the module."""
    waiting, seen, found = [start], set(), set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):
            found.add(item)
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
        elif isinstance(item, types.MethodType):
            waiting += [item.__func__, item.__self__]
        elif isinstance(item, functools.partial):
            waiting += [item.func, *item.args, *item.keywords.values()]
        elif item is module:
            waiting += [value for value in vars(module).values() if isinstance(value, types.MethodType)]
    return found


# --- public functions -------------------------------------------------------------------------------------------------


def patch(model: nn.Module) -> int:
    """Run every deformable attention in `model` on `unept.kernels.ms_deform_attn`. Patching twice changes nothing more.

    The modules get another class, so that a patched model can be copied, pickled, replicated and wrapped as before; to
    read one that `torch.save` wrote, `unept` must be installed. Patch before `torch.compile`. The backend is chosen as
    for all operators, by `UNEPT_BACKEND`.

    Args:
        model: a model of transformers, or any module that contains one.

    Returns:
        The number of modules that are patched now.

    Raises:
        ValueError: if the model has no deformable attention, or the forward of one has been replaced by a function that
            would go on calling another implementation; nothing is patched then.
    """
    found = [(name, module, _find_patched_class(module)) for name, module in model.named_modules()]
    chosen = [(name, module, cls) for name, module, cls in found if cls is not None]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no deformable attention that can be replaced: give a model of transformers "
            f"whose modules are of class {CLASS} or call {FUNCTION} or {FUNCTION_V2}"
        )
    changed = []
    try:
        for name, module, cls in chosen:
            if not isinstance(module, _Patched):
                _set_class(module, cls)
                changed.append(module)
            _check_forward(name, module)
    except ValueError:
        for module in changed:
            unpatch(module)
        raise
    return len(chosen)


def unpatch(model: nn.Module) -> int:
    """Undo `patch`.

    Returns:
        The number of modules that were patched.
    """
    patched = [module for module in model.modules() if isinstance(module, _Patched)]
    for module in patched:
        _set_class(module, _original_class(type(module)))
    return len(patched)
