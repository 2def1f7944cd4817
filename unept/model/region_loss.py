"""Losses of the overlap of whole regions, from segmentation-models-pytorch, beside Eq. 7: Dice and Lovász."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 2  # rows and columns from one compared pixel to the next


def region_loss(name: str, ignore_index: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of logits (B, K, h, w) and labels (B, H, W): the sum over the images of their losses.

    Each image is up-sampled and compared alone, so that the full-size logits of one image are held at a time, and that
    the loss of a batch does not depend on how it is split. The pixels of every second row and column stand for all, at
    a quarter of the time: Lovász sorts them once per class. Where none of those counts, all pixels are compared.

    Args:
        name: `"dice"` or `"lovasz"`.
        ignore_index: label of the pixels that are left out.

    Raises:
        ValueError: segmentation-models-pytorch is not installed.
    """
    try:
        from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss
    except ImportError as error:
        raise ValueError(
            f"the {name} loss (--{name}-weight) is that of segmentation-models-pytorch, which is not installed: "
            'pip install "unept[losses]"'
        ) from error
    compare = {"dice": DiceLoss, "lovasz": LovaszLoss}[name]("multiclass", ignore_index=ignore_index)

    def one_image(logits: Tensor, labels: Tensor) -> Tensor:
        full = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
        if name == "lovasz" and logits.shape[1] == 1:
            raise ValueError("the lovasz loss compares classes, and there is one only: set lovasz_weight to 0")
        for step in (STEP, 1):  # labels of single points may lie between the compared rows and columns
            compared = labels[:, ::step, ::step]
            if (compared != ignore_index).any():
                return compare(full[..., ::step, ::step], compared.long())
        return 0 * full.sum()

    @torch.compiler.disable
    def total(logits: Tensor, labels: Tensor) -> Tensor:
        return _Sum.apply(logits if torch.is_grad_enabled() else logits.detach(), labels, one_image)

    return total


class _Sum(torch.autograd.Function):
    """The sum of the losses of images, whose gradient is taken with them: a backward need not compute them again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total, grad = torch.zeros((), device=logits.device), torch.zeros_like(logits, dtype=torch.float32)
        for z, y, out in zip(logits.split(1), labels.split(1), grad.split(1), strict=True):
            leaf = z.detach().float().requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                value = loss(leaf, y)
            total += value.detach()
            if value.requires_grad:
                out.copy_(torch.autograd.grad(value, leaf)[0])
        ctx.loss = loss
        ctx.save_for_backward(logits, labels, grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, grad = ctx.saved_tensors
        if torch.is_grad_enabled() and len(logits):  # by create_graph=True: a gradient that has a gradient itself
            pairs = zip(logits.split(1), labels.split(1), strict=True)
            total = torch.stack([ctx.loss(z, y) for z, y in pairs]).sum()
            grad = torch.autograd.grad(total, logits, create_graph=True)[0]
        return (grads[0] * grad).to(logits.dtype), None, None
