"""Batch normalisation by the statistics of all processes' batches (Sec. 4.2), in one collective per direction.

    forward   one all-reduce of (sum, sum of squares, count) per layer
    backward  one all-reduce of (sum of the gradient, sum of the gradient times the normalised input)

The host waits for none of them, and they are functional collectives: `torch.compile` traces them into its graph.
"""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as collectives


def sum_over_group(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, out of place."""
    return collectives.all_reduce(tensor, "sum", dist.group.WORLD)


def per_channel(statistic: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1)."""
    return statistic[:, None, None]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias over all processes, with mean, variance and count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalise (B, C, H, W); shift (C,) is near the mean and the same in all processes."""
        # The sum of squares less the square of the sum loses the variance of channels whose mean is large. The running
        # mean is subtracted before, which is the same in all processes.
        wide = x.to(shift.dtype) - per_channel(shift)
        count = torch.full_like(shift[:1], x.numel() // x.shape[1])
        sums, squares, count = sum_over_group(
            torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count])
        ).split([len(shift), len(shift), 1])
        mean = sums / count
        variance = (squares / count - mean.square()).clamp_min(0)
        inverse = (variance + eps).rsqrt()
        out = (wide - per_channel(mean)) * per_channel(inverse * weight) + per_channel(bias)
        mean = mean + shift
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias; the latter two of this process's part, as of any layer."""
        x, weight, mean, inverse, count = ctx.saved_tensors
        grad_wide = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - per_channel(mean)) * per_channel(inverse)
        own = torch.cat([grad_wide.sum((0, 2, 3)), (grad_wide * normalised).sum((0, 2, 3))])
        mean_grad, mean_product = (sum_over_group(own) / count).chunk(2)
        grad_x = grad_wide - per_channel(mean_grad) - normalised * per_channel(mean_product)
        grad_bias, grad_weight = own.to(weight.dtype).chunk(2)
        return (grad_x * per_channel(inverse * weight)).to(x.dtype), grad_weight, grad_bias, None, None


def normalise(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalise (B, C, H, W) by the statistics of all processes' batches, and update the running statistics."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shift = x.new_zeros(norm.num_features, dtype=dtype)  # near the mean, as the running mean is where there is one
    if norm.running_mean is not None:
        shift += norm.running_mean
    weight = shift.new_ones(len(shift)) if norm.weight is None else norm.weight
    bias = shift.new_zeros(len(shift)) if norm.bias is None else norm.bias
    out, mean, variance, count = _Normalise.apply(x, weight, bias, shift, norm.eps)
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return out
    norm.num_batches_tracked.add_(1)
    with torch.no_grad():
        # Without a momentum the running statistics are averages, and the weight of a batch stays on the device.
        count_so_far = norm.num_batches_tracked.to(norm.running_mean.dtype)
        momentum: Any = norm.momentum if norm.momentum is not None else 1 / count_so_far
        unbiased = variance * (count / (count - 1).clamp_min(1))
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    return out


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, in training over all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        return normalise(self, input) if self.training else super().forward(input)


class SyncBatchNormAct2d(BatchNormAct2d):
    """timm's batch normalisation with an activation, in training over all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W), and activate."""
        return self.act(self.drop(normalise(self, x))) if self.training else super().forward(x)


SYNCHRONISED: dict[type, type] = {nn.BatchNorm2d: SyncBatchNorm2d, BatchNormAct2d: SyncBatchNormAct2d}


def synchronise(model: nn.Module) -> None:
    """Let all batch normalisation in a model, in place, use the statistics of all processes' batches."""
    for module in model.modules():
        if (synchronised := SYNCHRONISED.get(type(module))) is not None:
            module.__class__ = synchronised
