"""Depthwise convolutions that train fast on a CPU in bfloat16."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import pad_same
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


class _DepthwiseConv(torch.autograd.Function):
    """A depthwise convolution whose gradients are computed in float32 and in the channels-last format.

    PyTorch's CPU kernels for these gradients are several times slower in bfloat16 than in float32. The convolution has
    no bias and no dilation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, x32 = (t.float().contiguous(memory_format=torch.channels_last) for t in (grads[0], x))
        geometry = (ctx.stride, ctx.padding, [1, 1], False, [0, 0], len(weight))
        output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x32, weight.float(), None, *geometry, output_mask
        )
        return *(None if g is None else g.to(x.dtype) for g in (grad_x, grad_weight)), None, None


class DepthwiseConv(nn.Module):
    """Takes the place of a depthwise `nn.Conv2d` and shares its weight; under autocast it computes in autocast's dtype.

    Args:
        conv: a convolution with one group per channel, without bias and dilation (`Conv2dSame` of timm included).
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = conv.weight
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.same_padding = isinstance(conv, Conv2dSame)
        self.padding = (0, 0) if self.same_padding else conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C, H', W'), as the convolution that it replaces does."""
        if self.same_padding:
            x = pad_same(x, list(self.kernel_size), list(self.stride))
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return _DepthwiseConv.apply(x, weight, list(self.stride), list(self.padding))


def prepare_for_cpu_bfloat16(model: nn.Module) -> None:
    """Convert a model in place to the channels-last format, and its depthwise convolutions to `DepthwiseConv`.

    The names and values of its parameters stay as they are. Only training on a CPU under bfloat16 autocast becomes
    faster by it.
    """
    model.to(memory_format=torch.channels_last)
    for parent in list(model.modules()):
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d) and _is_plain_depthwise(conv):
                setattr(parent, name, DepthwiseConv(conv))


def _is_plain_depthwise(conv: nn.Conv2d) -> bool:
    """Whether `DepthwiseConv` can take the place of a convolution."""
    depthwise = 1 < conv.groups == conv.in_channels == conv.out_channels
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return depthwise and zeros and conv.bias is None and tuple(conv.dilation) == (1, 1)
