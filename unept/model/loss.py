"""The loss of Eq. 7."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import boundary_targets, upsample_cross_entropy
from .boundary import ONE_STEP, refinement_offset, upsample_boundary
from .output import UNEPTOutput, padded_size

IGNORED_DIRECTION = 255  # what boundary_targets gives off the boundary and on ignored pixels


@dataclass(frozen=True)
class LossWeights:
    """What the losses of Eq. 7 are multiplied by, by their names in the result of `UNEPTLoss`."""

    segmentation: float = 1.0
    """lambda_1: cross-entropy of the prediction."""
    refined: float = 1.5
    """lambda_2: cross-entropy of the refined prediction."""
    boundary: float = 3.0
    """lambda_3: binary cross-entropy of the boundary."""
    direction: float = 0.7
    """lambda_4: cross-entropy of the direction on boundary pixels."""

    @classmethod
    def read(cls, weights: "LossWeights | Sequence[float] | Mapping[str, float]") -> "LossWeights":
        """Weights in any of their forms: lambda_1 to lambda_4 in this order, or by name.

        Raises:
            ValueError: there are not four numbers, or there is no loss of a name.
        """
        if isinstance(weights, LossWeights):
            return weights
        names = [field.name for field in fields(cls)]
        if isinstance(weights, Mapping):
            unknown = sorted(set(weights) - set(names))
            if unknown:
                raise ValueError(f"there are no losses {', '.join(unknown)} to weigh; there are {', '.join(names)}")
            return cls(**weights)
        if len(weights) != len(names):
            raise ValueError(f"weights are {weights}; give the four lambdas of Eq. 7: {', '.join(names)}")
        return cls(*weights)


PAPER_WEIGHTS = LossWeights()


class Targets(NamedTuple):
    """What `UNEPTLoss` compares the predictions with; H and W are the labels' size, rounded up to multiples of 8."""

    labels: Tensor
    """(B, H, W) integer class ids, padded with the id that is ignored."""
    distance: Tensor | None
    """(B, H, W) float32, pixels to the next class (`unept.kernels.boundary_targets`); None without a spatial branch."""
    direction: Tensor | None
    """(B, H, W), index of the direction away from it, 255 off the boundary; None likewise."""
    counts: Tensor
    """(3,) float32: what the sums are divided by. The summed class weights of the pixels that are not ignored (1 each
    without weights), for both segmentation losses; the number of these pixels; the number of boundary pixels."""

    def part(self, start: int, stop: int) -> "Targets":
        """Targets of images `start` to `stop` - 1, with the counts of all: the losses of all parts add up."""
        labels, distance, direction = (None if t is None else t[start:stop] for t in self[:3])
        assert labels is not None
        return Targets(labels, distance, direction, self.counts)


class UNEPTLoss(nn.Module):
    """L = l1 CE(Y, Y_hat) + l2 CE(Y, Y_ref) + l3 L_bound + l4 L_dir (Eq. 7).

    CE is the cross-entropy of the up-sampled prediction; Y_ref is the refined prediction, read at p + offset(p).
    L_bound is the binary cross-entropy of the boundary over pixels that are not ignored, L_dir the cross-entropy of the
    direction on the true boundary pixels. The targets of both are computed here, from the labels as augmented.

    Args:
        weights: l1 to l4, by name or in this order. A model without a spatial branch has the first loss only.
        ignore_index: label of the pixels that are left out.
        class_weights: (K,), weights of the classes in the two segmentation losses.
        radius: pixels; what is closer than this to another class is boundary.

    Raises:
        ValueError: `weights` has another number of entries than Eq. 7.
    """

    def __init__(
        self,
        weights: LossWeights | Sequence[float] = PAPER_WEIGHTS,
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        radius: int = 5,
    ):
        super().__init__()
        self.weights = LossWeights.read(weights)
        self.ignore_index = ignore_index
        self.radius = radius
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def targets(self, labels: Tensor, boundaries: bool = True) -> Targets:
        """Boundaries, directions and counts of labels.

        Args:
            labels: (B, H, W) integer class ids; they are padded to multiples of 8, as the network pads images.
            boundaries: False for a model without a spatial branch, which needs no distances.
        """
        height, width = padded_size(labels.shape[1:])
        labels = F.pad(labels, (0, width - labels.shape[2], 0, height - labels.shape[1]), value=self.ignore_index)
        valid = labels != self.ignore_index
        weight = valid
        if self.class_weights is not None:
            weight = valid * self.class_weights[labels.long().clamp(0, len(self.class_weights) - 1)]
        counts = [weight.sum(), valid.sum(), valid.new_zeros((), dtype=torch.int64)]
        distance = direction = None
        if boundaries:
            distance, direction = boundary_targets(labels, radius=self.radius, ignore_index=self.ignore_index)
            counts[2] = (direction != IGNORED_DIRECTION).sum()
        return Targets(labels, distance, direction, torch.stack([count.float() for count in counts]))

    def forward(self, output: UNEPTOutput, labels: Tensor) -> dict[str, Tensor]:
        """Compare a prediction with labels.

        Args:
            output: of the model, for images (B, 3, H, W).
            labels: (B, H, W) integer class ids, of the size of the images.

        Returns:
            Each loss by its name in `LossWeights`, not weighted, and their weighted sum as `loss`: float32 scalars.

        Raises:
            ValueError: the labels have another size than the images.
        """
        height, width = (output.logits_stride * n for n in output.logits.shape[2:])
        if labels.dim() != 3 or padded_size(labels.shape[1:]) != (height, width):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the model saw images of about {height}x{width}: "
                "give labels (B, H, W) of the size of the images"
            )
        return self.losses(output, self.targets(labels, boundaries=output.boundary is not None))

    def losses(self, output: UNEPTOutput, targets: Targets) -> dict[str, Tensor]:
        """Compare a prediction with targets, whose counts may be those of a larger batch that it is a part of.

        Each loss is a sum over the pixels of this part, divided by `targets.counts`. So the losses of a batch's parts
        add up to those of the whole batch, however its ignored pixels and boundaries are spread over the parts.

        Returns:
            What `forward` returns.
        """
        segmentation_count, pixel_count, boundary_count = torch.where(targets.counts == 0, 1, targets.counts).unbind()
        losses = {"segmentation": self._cross_entropy(output, targets) / segmentation_count}
        if output.boundary is not None and output.direction is not None:
            size = (targets.labels.shape[1], targets.labels.shape[2])
            offset = refinement_offset(output.boundary, output.direction, size, ONE_STEP)
            losses["refined"] = self._cross_entropy(output, targets, offset) / segmentation_count
            boundary_sum, direction_sum = self.boundary_sums(output.boundary, output.direction, targets)
            losses["boundary"], losses["direction"] = boundary_sum / pixel_count, direction_sum / boundary_count
        weighted = [getattr(self.weights, name) * loss for name, loss in losses.items()]
        return {"loss": torch.stack(weighted).sum(), **losses}

    def _cross_entropy(self, output: UNEPTOutput, targets: Targets, offset: Tensor | None = None) -> Tensor:
        """Summed cross-entropy of the up-sampled logits, read at p + offset(p)."""
        return upsample_cross_entropy(
            output.logits,
            targets.labels,
            offset,
            ignore_index=self.ignore_index,
            class_weights=self.class_weights,
            reduction="sum",
        )

    def boundary_sums(self, boundary: Tensor, direction: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """L_bound and L_dir of Eq. 7, summed over pixels: `targets.counts[1]` and `[2]` divide them.

        Args:
            boundary: logits (B, 1, h, w).
            direction: logits (B, 8, h, w).
            targets: what `targets` gives with boundaries.
        """
        return self._boundary_sum(boundary, targets), _direction_sum(direction, targets)

    def _boundary_sum(self, boundary: Tensor, targets: Targets) -> Tensor:
        """Summed binary cross-entropy of boundary logits (B, 1, h, w)."""
        assert targets.distance is not None
        logits = upsample_boundary(boundary, (targets.labels.shape[1], targets.labels.shape[2]))
        target = (targets.distance <= self.radius).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (loss * (targets.labels != self.ignore_index)).sum()


def _direction_sum(direction: Tensor, targets: Targets) -> Tensor:
    """Summed cross-entropy of direction logits (B, 8, h, w) on the true boundary pixels."""
    assert targets.direction is not None
    if direction.shape[2:] == targets.direction.shape[1:]:
        target = targets.direction.long()
        return F.cross_entropy(direction.float(), target, ignore_index=IGNORED_DIRECTION, reduction="sum")
    return upsample_cross_entropy(direction, targets.direction, ignore_index=IGNORED_DIRECTION, reduction="sum")
