"""Try a new backbone before anything is written: which sizes of images it takes, and which parameters its maps need."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Sides of the images on which a backbone is tried: not square, and of no size that a model is made for.
SIDES = (160, 224)
# What timm's models raise for an image of a size that they were not made for.
REFUSALS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def find_divisor(
    features: nn.Module, divisor: int, own_size: int, name: str, in_chans: int = 3, image_size: int | None = None
) -> int:
    """The number of which the sides of images must be multiples, and freeze what the feature maps do not depend on.

    Distributed training waits for the gradient of every parameter that is not frozen.

    Args:
        features: the backbone, on the CPU; images (B, C, H, W) to feature maps.
        divisor: the least common multiple of its strides.
        own_size: the side of the images that it was made for.
        name: its name, for the message.
        in_chans: channels of its images, C.
        image_size: the side of the only images that it is to see; None for images of any size.

    Returns:
        `image_size` if given, else `divisor`, or a multiple of `own_size` where only that works, as for models that cut
        the image into windows.

    Raises:
        ValueError: it sees images of one size only, and no `image_size` is given or it is another one.
    """
    if image_size is not None and image_size % divisor:
        raise ValueError(f"backbone_image_size is {image_size}; for {name} it must be a multiple of {divisor}")
    refusal: Exception | None = None
    for unit in (image_size,) if image_size else dict.fromkeys((divisor, math.lcm(divisor, own_size))):
        height, width = (image_size or math.ceil(side / unit) * unit for side in SIDES)
        if height == width and not image_size:
            width += unit
        try:
            reached = _reached_parameters(features, (in_chans, height, width))
        except REFUSALS as error:
            refusal = refusal or error
            continue
        for parameter_name, parameter in features.named_parameters():
            parameter.requires_grad_(parameter_name in reached)
        return unit
    reason = f"(timm: {_first_line(refusal)})"
    if image_size is not None:
        raise ValueError(
            f"{name} does not see images of backbone_image_size {image_size} {reason}: {own_size} is its own size"
        ) from refusal
    raise ValueError(
        f"{name} cannot be a backbone as it is, since it sees images of one size only {reason}: cut images into "
        f"squares of one size with backbone_image_size={own_size} (--backbone-image-size), or choose another backbone; "
        "docs/choose_a_backbone.md lists families that take any size"
    ) from refusal


def _reached_parameters(features: nn.Module, shape: Sequence[int]) -> set[str]:
    """Names of the parameters that the feature maps of an image of `shape` (C, H, W) depend on."""
    modes = [(module, module.training) for module in features.modules()]
    features.eval()
    try:
        # Meta tensors have a shape and no values, so that this costs no arithmetic and no memory.
        return _trace(features, shape, "meta")
    except REFUSALS:
        return _trace(features, shape, "cpu")  # perhaps it was the meta tensors that the model does not take
    finally:
        for module, training in modes:
            module.training = training


def _trace(features: nn.Module, shape: Sequence[int], device: str) -> set[str]:
    tensors = {**dict(features.named_parameters()), **dict(features.named_buffers())}
    if device == "meta":
        parameters = {name for name, _ in features.named_parameters()}
        tensors = {name: torch.empty_like(t, device=device) for name, t in tensors.items()}
        for name in parameters:
            tensors[name].requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        maps = torch.func.functional_call(features, tensors, (torch.zeros(1, *shape, device=device),))
    leaves = {id(leaf) for leaf in _leaves(maps)}
    return {name for name, tensor in tensors.items() if id(tensor) in leaves}


def _leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaf tensors that outputs were computed from and that take a gradient."""
    waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, leaves = set(waiting), []
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
