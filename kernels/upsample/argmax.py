"""Argmax of up-sampled logits, without up-sampled logits: the predicted classes, refined with an offset (Sec. 3.2).

    best(p) = argmax_k z[k, p], the lowest of equals

with z[k, p], the up-sampled logits read at p + offset(p), as `tiles_torch` defines them.

Legend
    B batch, K classes, h x w the logits' map, H x W the full-size map.
    logits    (B, K, h, w)
    offset    (B, 2, H, W), (dx, dy) in pixels of the full-size map
    best      (B, H, W) int64
Kernels: `argmax_triton`.
"""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .. import reference as plain
from .._registration import in_pytorch, register_vmap
from ..backend import runs_on_triton
from . import argmax_triton
from .tiles_torch import Where, check_maps, visit_tiles


def _argmax_torch(logits: Tensor, size: tuple[int, int], offset: Tensor | None) -> Tensor:
    best = torch.empty((logits.shape[0], *size), dtype=torch.int64, device=logits.device)

    def visit(where: Where, z: Tensor) -> None:
        ids = z.max(1).indices  # which argmax finds 3 to 8 times more slowly along an axis that is not the last
        best[where] = ids.view(best[where].shape)

    visit_tiles(logits, size, offset, visit)
    return best


@torch.library.custom_op("unept::upsample_argmax", mutates_args=())
def _upsample_argmax(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    run = argmax_triton.forward if runs_on_triton(logits) else _argmax_torch
    return run(logits, (height, width), offset)


@_upsample_argmax.register_fake
def _upsample_argmax_fake(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


register_vmap(_upsample_argmax)


def upsample_argmax(logits: Tensor, size: tuple[int, int], offset: Tensor | None = None) -> Tensor:
    """Class ids of logits that are up-sampled bilinearly to `size` on the way: the prediction, refined with an offset.

    Equals `F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)`, but never holds (B, K, H, W).

    Args:
        logits: (B, K, h, w), float32, float16, bfloat16 or (torch backend) float64.
        size: (H, W), ints, Python's or NumPy's.
        offset: (B, 2, H, W), as in `upsample_cross_entropy`.

    Returns:
        (B, H, W) int64; among equals the lowest id, and a NaN is the largest. No gradient.

    Raises:
        TypeError: a tensor has a dtype that is not listed.
        ValueError: shapes or devices do not fit, size is not a pair of sizes, or an image has more than 2**30 pixels.
    """
    if torch.jit.is_tracing():  # sizes may be tensors now
        return plain.upsample_argmax(logits, size, offset)
    if not (
        isinstance(size, Sequence)
        and len(size) == 2
        and all(isinstance(n, (Integral, torch.SymInt)) and n >= 0 for n in size)
    ):
        raise ValueError(f"size is {size!r}; it must be (height, width), two ints >= 0, such as labels.shape[-2:]")
    height, width = (n if isinstance(n, (int, torch.SymInt)) else int(n) for n in size)
    check_maps(logits, offset, (height, width))
    # Without a gradient: torch.func.grad refuses an op that has no derivative.
    logits, offset = logits.detach(), None if offset is None else offset.detach()
    if torch.onnx.is_in_onnx_export():
        return in_pytorch(_upsample_argmax, logits, height, width, offset)
    return _upsample_argmax(logits, height, width, offset)
