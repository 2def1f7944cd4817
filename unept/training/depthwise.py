"""Depthwise convolutions that train fast on a CPU in bfloat16."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import pad_same
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


class _DepthwiseConv(torch.autograd.Function):
    """A depthwise convolution, without bias and dilation, whose gradients avoid PyTorch's slow CPU kernels in bfloat16.

    Those kernels are fast in the channels-last format for strides of 1 and for kernels of at most 3x3, and up to 20
    times slower than in float32 otherwise.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        grad_x = _grad_input(grad, x, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        grad_weight = _grad_weight(grad, x, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None


def _grad_input(grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Return the gradient of the input; strided ones in float32, image by image, which stay in the cache."""
    if stride == [1, 1]:
        return _convolution_backward(grad, x, weight, stride, padding, [True, False, False])[0]
    sizes = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, strict=True)
    rest = [n - ((m - 1) * step + kernel - 2 * pad) for n, m, kernel, step, pad in sizes]
    result = torch.empty_like(x, memory_format=torch.channels_last)
    for one, of in zip(result.split(1), grad.split(1), strict=True):
        one.copy_(F.conv_transpose2d(of.float(), weight.float(), None, stride, padding, rest, groups=len(weight)))
    return result


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Return the gradient of the weight, that of a large kernel by windows of 3x3 taps."""
    if max(weight.shape[2:]) <= 3:
        return _convolution_backward(grad, x, weight, stride, padding, [False, True, False])[1]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    (rows, columns), result = grad.shape[2:], torch.empty_like(weight)
    for top in _window_starts(weight.shape[2]):
        for left in _window_starts(weight.shape[3]):
            taps = (slice(None), slice(None), slice(top, top + 3), slice(left, left + 3))
            kernel = weight[taps].contiguous()
            height, width = (
                (n - 1) * step + k for n, step, k in zip((rows, columns), stride, kernel.shape[2:], strict=True)
            )
            part = x[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
            result[taps] = _convolution_backward(grad, part, kernel, stride, [0, 0], [False, True, False])[1]
    return result


def _window_starts(taps: int) -> list[int]:
    """Return where windows of 3 taps start that cover a kernel; the last two may overlap."""
    return [*range(0, taps - 3, 3), max(taps - 3, 0)]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """Return the gradients of a depthwise convolution that `output_mask` asks for: input, weight, bias."""
    geometry = (stride, padding, [1, 1], False, [0, 0], len(weight))
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, output_mask)


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
