"""The network as one function of an image, and as a program in PyTorch's own operators: what `unept.export` writes.

The program is one view of a whole image at its own size, refinement included. The operators of this project are
replaced by `unept.kernels.DECOMPOSITIONS`, so that the program needs nothing of `unept`.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame
from torch import Tensor, nn

from ..kernels import DECOMPOSITIONS, reference
from .boundary import ONE_STEP, Refinement
from .network import UNEPT
from .output import STRIDE, UNEPTOutput, class_ids, read_offset

# --- the network as one function --------------------------------------------------------------------------------------


class WholeImage(nn.Module):
    """A model from an image of any size to its prediction, without a branch that depends on the size.

    Args:
        model: the network, in evaluation mode.
        output: what is predicted, `"ids"` or `"logits"`.
        refinement: how boundary pixels are refined; None does not refine.
    """

    def __init__(self, model: UNEPT, output: str = "ids", refinement: Refinement | None = ONE_STEP):
        super().__init__()
        self.model, self.output, self.refinement = model, output, refinement
        self.training = model.training  # `torch.onnx.export` would put the model into the mode of its wrapper

    def forward(self, images: Tensor) -> Tensor:
        """The ids (B, H, W) or logits (B, K, H, W) of images (B, 3, H, W), uint8, RGB."""
        height, width = images.shape[2:]
        divisor = self.model.divisor
        padded = self.model.normalized(images)
        padded = pad(padded, 2, (height + divisor - 1) // divisor * divisor)
        padded = pad(padded, 3, (width + divisor - 1) // divisor * divisor)
        h, w = ((size + STRIDE - 1) // STRIDE for size in (height, width))
        size = (STRIDE * h, STRIDE * w)
        # A trace makes it a plain tuple of the maps that there are.
        maps: tuple[Any, ...] = tuple(self.model(padded))
        logits = maps[0]
        boundary, direction = maps[1:3] if len(maps) > 2 else (None, None)
        logits_stride = self.model.logits_stride
        finer = STRIDE // logits_stride
        logits = crop(logits, finer * h, finer * w)
        if boundary is not None and direction is not None:
            finer = STRIDE // self.model.boundary_stride
            boundary, direction = (crop(m, finer * h, finer * w) for m in (boundary, direction))
        output = UNEPTOutput(logits, boundary, direction, logits_stride)
        if self.output == "ids":
            return crop(class_ids(output, size, self.refinement), height, width)
        z = reference.upsampled(output.logits.float(), size, read_offset(output, size, self.refinement))
        return crop(z, height, width)


def pad(images: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind the end of an axis, up to `size`. `F.pad` would branch on whether there is anything to pad."""
    index = torch.arange(size, device=images.device)
    in_bounds = (index < images.shape[axis]).view([-1 if a == axis else 1 for a in range(images.dim())])
    return images.index_select(axis, index.clamp(max=images.shape[axis] - 1)) * in_bounds


def crop(maps: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of the last two axes, contiguous whether that is all of them or not."""
    rows, columns = (torch.arange(size, device=maps.device) for size in (height, width))
    return maps.index_select(-2, rows).index_select(-1, columns)


# --- the program ------------------------------------------------------------------------------------------------------


def export_program(network: WholeImage, size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """Trace a network into a program in PyTorch's own operators, for batches of any size.

    Args:
        network: what to export.
        size: (H, W) of all images; None means any.

    Raises:
        ValueError: the network can't be exported; the message gives the reason.
    """
    divisor = network.model.divisor
    network = with_fixed_padding(network)
    # No side is a multiple of the divisor, none is as long as another: nothing is taken for a constant.
    height, width = size or (2 * divisor + 6, 3 * divisor - 6)
    images = torch.zeros(2, network.model.in_chans, height, width, dtype=torch.uint8, device=network.model.mean.device)
    axes = dict.fromkeys((0,) if size else (0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad(), explain_failure("exported" if size else "exported for any size; --size H W is simpler"):
        program = torch.export.export(network, (images,), dynamic_shapes=(axes,))
        return program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS})


def with_fixed_padding(network: WholeImage) -> WholeImage:
    """A copy whose convolutions and average poolings with "same" padding have fixed padding.

    "Same" padding depends on the size of its input, but here all sizes that these meet are multiples of their stride,
    since the padded image is a multiple of the largest stride.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (Conv2dSame, AvgPool2dSame)):
            convolves = isinstance(module, Conv2dSame)
            reach = zip(module.kernel_size, module.dilation if convolves else (1, 1), module.stride, strict=True)
            totals = [max(0, (size - 1) * dilation + 1 - stride) for size, dilation, stride in reach]
            sides = [(total // 2, total - total // 2) for total in reversed(totals)]  # the last axis first
            fixed = functools.partial(_fixed_convolution if convolves else _fixed_pooling, module, sides[0] + sides[1])
            module.forward = fixed  # type: ignore[method-assign]
    return network


def _fixed_pooling(module: AvgPool2dSame, padding: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.nn.AvgPool2d.forward(module, F.pad(x, padding))


def _fixed_convolution(module: Conv2dSame, padding: tuple[int, ...], x: Tensor) -> Tensor:
    stride, dilation, groups = module.stride, module.dilation, module.groups
    return F.conv2d(F.pad(x, padding), module.weight, module.bias, stride, 0, dilation, groups)


@contextlib.contextmanager
def explain_failure(what: str) -> Iterator[None]:
    """Turn whatever an exporter raises into a ValueError with the first line of its cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ValueError(f"this network can't be {what}. The reason given: {reason[:300]}") from error
