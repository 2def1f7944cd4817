"""The loss of the compared networks: cross-entropy, also of auxiliary classifiers, of points and of present classes."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from unept.kernels import upsample_cross_entropy
from unept.model.loss import Targets, UNEPTLoss
from unept.model.output import UNEPTOutput

from .base import HeadOutput, Points

AUXILIARY_WEIGHT = 0.4  # of each auxiliary classifier, as in PSPNet and OCRNet
PRESENCE_WEIGHT = 0.2  # of EncNet's SE-loss, as in its paper


class HeadLoss(UNEPTLoss):
    """Cross-entropy of the up-sampled logits, of auxiliary classifiers (0.4 each) and of PointRend's points.

    EncNet's SE-loss (0.2) is the binary cross-entropy of whether an image holds each class, averaged over both.

    Args:
        ignore_index: label of the pixels that are left out.
        class_weights: (K,), weights of the classes in all of them but the SE-loss.
        region_losses: weights of further losses of the prediction, by name, as `UNEPTLoss` takes them.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        region_losses: Mapping[str, float] | None = None,
    ):
        super().__init__(ignore_index=ignore_index, class_weights=class_weights, region_losses=region_losses)

    def forward(self, output: UNEPTOutput | HeadOutput, labels: Tensor) -> dict[str, Tensor]:
        """Compare a prediction with labels (B, H, W); see `losses`."""
        return self.losses(output, self.targets(labels, boundaries=False))

    def losses(self, output: UNEPTOutput | HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """Sums over the pixels of this part of a batch, divided by the counts of the whole batch.

        Returns:
            `segmentation`, where there are any `auxiliary`, `points`, `presence` and region losses, and `loss`, their
            weighted sum: float32 scalars.
        """
        count = targets.counts[0].clamp(min=1)
        losses = {"segmentation": self._sum(output.logits, targets.labels) / count}
        weighted = [losses["segmentation"]]
        if isinstance(output, HeadOutput) and output.auxiliary:
            each = [self._sum(logits, targets.labels) for logits in output.auxiliary]
            losses["auxiliary"] = torch.stack(each).sum() / count
            weighted.append(AUXILIARY_WEIGHT * losses["auxiliary"])
        if isinstance(output, HeadOutput) and output.points is not None:
            losses["points"] = self._point_sum(output.points, targets.labels) / count
            weighted.append(losses["points"])
        if isinstance(output, HeadOutput) and output.presence is not None:
            losses["presence"] = self._presence_sum(output.presence, targets.labels) / targets.counts[3].clamp(min=1)
            weighted.append(PRESENCE_WEIGHT * losses["presence"])
        for name, mean in self.region_means(output.logits, targets).items():
            losses[name] = mean
            weighted.append(self.region_weights[name] * mean)
        return {"loss": torch.stack(weighted).sum(), **losses}

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of the up-sampled logits."""
        options = {"ignore_index": self.ignore_index, "class_weights": self.class_weights}
        return upsample_cross_entropy(logits, labels, reduction="sum", **options)

    def _presence_sum(self, presence: Tensor, labels: Tensor) -> Tensor:
        """Summed over the images, averaged over the classes."""
        num_classes = presence.shape[1]
        ids = labels.flatten(1).long()
        ids = ids.masked_fill(ids == self.ignore_index, num_classes)
        present = presence.new_zeros(len(ids), num_classes + 1, dtype=torch.float32).scatter(1, ids, 1.0)
        loss = F.binary_cross_entropy_with_logits(presence.float(), present[:, :num_classes], reduction="sum")
        return loss / num_classes

    def _point_sum(self, points: Points, labels: Tensor) -> Tensor:
        """Summed cross-entropy at the points, each of which stands for H W / P pixels."""
        height, width = labels.shape[1:]
        x, y = (points.coordinates[..., i] * n for i, n in enumerate((width, height)))
        inside = (x < width) & (y < height)
        index = y.long().clamp(0, height - 1) * width + x.long().clamp(0, width - 1)
        target = labels.flatten(1).long().gather(1, index).masked_fill(~inside, self.ignore_index)
        logits, weight = points.logits.float(), self.class_weights
        total = F.cross_entropy(logits, target, weight=weight, ignore_index=self.ignore_index, reduction="sum")
        return total * (height * width / points.logits.shape[2])
