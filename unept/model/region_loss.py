"""Losses of the overlap of whole regions, from segmentation-models-pytorch, beside Eq. 7: Dice and Lovász."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STEP = 2  # rows and columns from one compared pixel to the next


def region_loss(name: str, ignore_index: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of logits (B, K, h, w) and labels (B, H, W): the sum over the images of their losses.

    Each image is up-sampled and compared alone, and again in the backward, so that the full-size logits of one image
    are held at a time, and that the loss of a batch does not depend on how it is split. The pixels of every second row
    and column stand for all, at a quarter of the time: Lovász sorts them once per class.

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
        return compare(full[..., ::STEP, ::STEP], labels[:, ::STEP, ::STEP].long())

    @torch.compiler.disable
    def total(logits: Tensor, labels: Tensor) -> Tensor:
        losses = [
            checkpoint(one_image, logits[b : b + 1], labels[b : b + 1], use_reentrant=False)
            for b in range(len(logits))
            if (labels[b] != ignore_index).any()
        ]
        return torch.stack(losses).sum() if losses else 0 * logits.float().sum()

    return total
