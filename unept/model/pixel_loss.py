"""The loss of the two segmentation terms of Eq. 7, as a sum over pixels: cross-entropy, as in the paper, or others.

Letters: B images, K classes, H, W height and width of the labels, h, w those of the logits. No up-sampled logits are
held: each loss follows from cross-entropies, which the fused operator gives per pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..kernels import upsample_cross_entropy, upsample_cross_entropy_pair

PixelLossKind = Literal["cross-entropy", "focal", "ohem"]
EMPTY = -30.0  # the logit of a class that has no share: exp(-30) is lost in float32 beside 1


@dataclass(frozen=True)
class PixelLoss:
    """A loss per pixel and how it is summed.

    With p the probability of the true class and w its weight:
        cross-entropy   -w log p
        focal           -w (1 - p)^gamma log p (Lin et al. 2017)
        ohem            -w log p of the `hard_share` of each image's labelled pixels where it is largest (Shrivastava et
                        al. 2016)

    Label smoothing replaces -w log p as `torch.nn.functional.cross_entropy` does.
    """

    kind: PixelLossKind = "cross-entropy"
    """Which of the three."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    gamma: float = 2.0
    """Exponent of the focal loss."""
    hard_share: float = 0.25
    """Share of the pixels that OHEM keeps."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(PixelLossKind):
            raise ValueError(f"segmentation_loss is {self.kind!r}; give one of {', '.join(get_args(PixelLossKind))}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if not self.gamma >= 0 or not 0 < self.hard_share <= 1:
            raise ValueError(f"gamma is {self.gamma} and hard_share {self.hard_share}; give 0 or more, and (0, 1]")

    def count(self, valid: Tensor, weight: Tensor) -> Tensor:
        """Return what a sum is divided by: the summed weights of the pixels, or the number of those that OHEM keeps.

        Args:
            valid: (B, H, W) bool, the labelled pixels.
            weight: (B, H, W), the weight of the class of each of them, 0 elsewhere.
        """
        return self._kept(valid).sum() if self.kind == "ohem" else weight.sum()

    def sums(
        self,
        logits: Tensor,
        labels: Tensor,
        offsets: Sequence[Tensor | None],
        *,
        ignore_index: int,
        class_weights: Tensor | None,
    ) -> list[Tensor]:
        """Return the summed loss of up-sampled logits for each offset, read at p + offset(p).

        Args:
            logits: (B, K, h, w).
            labels: (B, H, W) integer.
            offsets: one, or None and another, for less than two calls: each (B, 2, H, W), (dx, dy) in pixels, or None.
            ignore_index: label of the pixels that are left out.
            class_weights: (K,), or None for 1 each.
        """
        losses = _cross_entropies(logits, labels, offsets, ignore_index, class_weights)
        if self.label_smoothing:
            uniform = _uniform_cross_entropies(logits, labels, offsets, ignore_index, class_weights)
            share = self.label_smoothing
            losses = [(1 - share) * loss + share * even for loss, even in zip(losses, uniform, strict=True)]
        if self.kind == "ohem":
            return [self._hardest(loss, labels != ignore_index) for loss in losses]
        if self.kind == "focal":
            nlls = _cross_entropies(logits, labels, offsets, ignore_index, None)
            factors = [(1 - (-nll).exp()).clamp(min=1e-6) ** self.gamma for nll in nlls]
            losses = [loss * factor for loss, factor in zip(losses, factors, strict=True)]
        return [loss.sum() for loss in losses]

    def _kept(self, valid: Tensor) -> Tensor:
        """The number of pixels (B,) that OHEM keeps of each image."""
        return (valid.flatten(1).sum(1) * self.hard_share).ceil().long()

    def _hardest(self, loss: Tensor, valid: Tensor) -> Tensor:
        flat = torch.where(valid, loss, -1.0).flatten(1)  # ignored pixels come last
        hardest = flat.topk(math.ceil(flat.shape[1] * self.hard_share), dim=1).values
        rank = torch.arange(hardest.shape[1], device=hardest.device)
        return torch.where(rank < self._kept(valid)[:, None], hardest, 0.0).sum()


CROSS_ENTROPY = PixelLoss()


def _cross_entropies(
    logits: Tensor,
    labels: Tensor,
    offsets: Sequence[Tensor | None],
    ignore_index: int,
    class_weights: Tensor | None,
) -> list[Tensor]:
    """Return the cross-entropy (B, H, W) at each of the offsets: one, or None and another."""
    if len(offsets) == 1:
        loss = upsample_cross_entropy(
            logits, labels, offsets[0], ignore_index=ignore_index, class_weights=class_weights, reduction="none"
        )
        return [loss]
    _, offset = offsets
    assert offset is not None
    pair = upsample_cross_entropy_pair(logits, labels, offset, ignore_index=ignore_index, class_weights=class_weights)
    return list(pair)


def _uniform_cross_entropies(
    logits: Tensor,
    labels: Tensor,
    offsets: Sequence[Tensor | None],
    ignore_index: int,
    class_weights: Tensor | None,
) -> list[Tensor]:
    """Return the cross-entropy (B, H, W) with a label that is spread evenly: sum of -w_k log p_k over k, over K.

    It is (sum of w) (logsumexp(z) - m) / K, where m is the mean of the logits z under the weights. Up-sampling is
    linear, so that m may be subtracted before; and logsumexp(z - m) is the cross-entropy of a further class without
    share, whose logit is constant.
    """
    num_classes = logits.shape[1]
    z = logits.float()
    if class_weights is None:
        mean, total = z.mean(1, keepdim=True), float(num_classes)
    else:
        total = class_weights.sum()
        mean = (z * class_weights[:, None, None]).sum(1, keepdim=True) / total
    extended = torch.cat([z - mean, torch.full_like(mean, EMPTY)], dim=1)
    spread = torch.where(labels == ignore_index, -1, num_classes).int()
    nlls = _cross_entropies(extended, spread, offsets, -1, None)
    return [torch.where(labels == ignore_index, 0.0, (nll + EMPTY) * total / num_classes) for nll in nlls]
