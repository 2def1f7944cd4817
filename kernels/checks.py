"""Argument checks whose messages say what was given, what the rule is and what to do."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Kernels count the pixels of one image in 32 bits; the last tile, and a row cut into equal steps, go past the end.
MAX_PIXELS = 1 << 30

# Positions are float32, which tells pixels apart up to here.
MAX_SIDE = 1 << 24


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of coordinates and sums: float64 for float64 tensors, float32 for the others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is float32, float16, bfloat16 or float64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; it must be float32, float16, bfloat16 or float64: "
                f"convert it with {name}.float()"
            )


def check_integer(**tensors: Tensor) -> None:
    """Raise TypeError unless every tensor holds integers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must hold integers: convert it with {name}.long()")


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, but there are {listed}: move them with .to(device)")


def check_count(what: str, count: int) -> None:
    """Raise ValueError if one image has more pixels or points, named by `what`, than the kernels count.

    Nothing is compared while a graph is exported: a size that may vary would be bounded by it.
    """
    if not torch.compiler.is_exporting() and count > MAX_PIXELS:
        raise ValueError(f"an image has {count} {what}; there may be at most 2**30: cut it into parts")


def check_sides(what: str, *sides: int) -> None:
    """Raise ValueError if a side of a map, named by `what`, is longer than float32 tells pixels apart.

    Nothing is compared while a graph is exported, as in `check_count`.
    """
    for side in sides:
        if not torch.compiler.is_exporting() and side > MAX_SIDE:
            raise ValueError(f"{what} has a side of {side} pixels; it may be at most 2**24: cut it into parts")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...], remedy: str = "") -> None:
    """Raise ValueError unless `tensor` has the expected shape.

    Args:
        name: how the message calls the tensor.
        tensor: what was given.
        expected: an int where the size is fixed, a letter where any size will do.
        remedy: what to do, appended to the message.
    """
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(size) for size in expected) + ")"
        message = f"{name} has shape {tuple(tensor.shape)}; it must be {wanted}"
        raise ValueError(f"{message}: {remedy}" if remedy else message)
