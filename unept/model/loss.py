"""The loss of Eq. 7."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import boundary_targets, upsample_cross_entropy
from .boundary import refinement_offset, upsample_boundary
from .network import STRIDE, UNEPTOutput, padded_size

IGNORED_DIRECTION = 255  # of boundary_targets: no boundary pixel, or an ignored one


class Targets(NamedTuple):
    """What `UNEPTLoss` compares the predictions with; H and W are the labels' size, rounded up to multiples of 8."""

    labels: Tensor
    """(B, H, W) integer class ids, padded with the id that is ignored."""
    distance: Tensor | None
    """(B, H, W) float32, pixels to the next class (`unept.kernels.boundary_targets`); None: no spatial branch."""
    direction: Tensor | None
    """(B, H, W), index of the direction away from it, 255 off the boundary; None likewise."""
    counts: Tensor
    """(3,) float32: what the sums are divided by. The summed class weights of the pixels that count (1 each without
    weights), for both segmentation terms; the number of pixels that count; the number of boundary pixels."""

    def part(self, start: int, stop: int) -> "Targets":
        """Of images `start` to `stop` - 1, with the counts of all: the parts' terms add up to those of the whole."""
        labels, distance, direction = (None if t is None else t[start:stop] for t in self[:3])
        assert labels is not None
        return Targets(labels, distance, direction, self.counts)


class UNEPTLoss(nn.Module):
    """L = l1 CE(Y, Y_hat) + l2 CE(Y, Y_ref) + l3 L_bound + l4 L_dir (Eq. 7).

    CE is the cross-entropy of the up-sampled prediction, Y_ref the refined one (read at p + offset(p)). L_bound is the
    binary cross-entropy of the boundary over pixels that are not ignored, L_dir the cross-entropy of the direction on
    the true boundary pixels. The targets of both are computed here, from the labels as augmented.

    Args:
        weights: l1 to l4. A model without a spatial branch has the first term only.
        ignore_index: the label that never counts.
        class_weights: (K,) of the two segmentation terms.
        radius: pixels; closer than this to another class is boundary.
    """

    def __init__(
        self,
        weights: tuple[float, float, float, float] = (1.0, 1.5, 3.0, 0.7),
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        radius: int = 5,
    ):
        super().__init__()
        if len(weights) != 4:
            raise ValueError(f"weights are {weights}; give the four lambdas of Eq. 7")
        self.weights = tuple(weights)
        self.ignore_index = ignore_index
        self.radius = radius
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def targets(self, labels: Tensor, boundaries: bool = True) -> Targets:
        """Boundaries, directions and counts of labels (B, H, W).

        Args:
            labels: integer class ids; their size is padded to multiples of 8, as the network pads images.
            boundaries: False for a model without a spatial branch, which needs no distances.
        """
        height, width = padded_size(labels.shape[1:])
        labels = F.pad(labels, (0, width - labels.shape[2], 0, height - labels.shape[1]), value=self.ignore_index)
        counted = labels != self.ignore_index
        weight = counted
        if self.class_weights is not None:
            weight = counted * self.class_weights[labels.long().clamp(0, len(self.class_weights) - 1)]
        counts = [weight.sum(), counted.sum(), counted.new_zeros((), dtype=torch.int64)]
        distance = direction = None
        if boundaries:
            distance, direction = boundary_targets(labels, radius=self.radius, ignore_index=self.ignore_index)
            counts[2] = (direction != IGNORED_DIRECTION).sum()
        return Targets(labels, distance, direction, torch.stack([count.float() for count in counts]))

    def forward(self, output: UNEPTOutput, labels: Tensor) -> dict[str, Tensor]:
        """Each term by name, unweighted, and their weighted sum as `loss`: float32 scalars.

        Args:
            output: of the model, for images (B, 3, H, W).
            labels: (B, H, W) integer, of the size of the images.
        """
        height, width = (STRIDE * n for n in output.logits.shape[2:])
        if labels.dim() != 3 or padded_size(labels.shape[1:]) != (height, width):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the model saw images of about {height}x{width}: "
                "give labels (B, H, W) of the size of the images"
            )
        return self.terms(output, self.targets(labels, boundaries=output.boundary is not None))

    def terms(self, output: UNEPTOutput, targets: Targets) -> dict[str, Tensor]:
        """The same from targets, whose counts may be those of a larger batch that this one is a part of.

        Each term is a sum over this part's pixels, divided by `targets.counts`. So the terms of a batch's parts add up
        to those of the whole batch, however its ignored pixels and boundaries are spread over the parts.
        """
        segmentation_count, pixel_count, boundary_count = torch.where(targets.counts == 0, 1, targets.counts).unbind()
        size = (targets.labels.shape[1], targets.labels.shape[2])

        cross_entropy = functools.partial(upsample_cross_entropy, reduction="sum")
        segmentation = {"ignore_index": self.ignore_index, "class_weights": self.class_weights}
        terms = {"segmentation": cross_entropy(output.logits, targets.labels, **segmentation) / segmentation_count}
        if output.boundary is not None and output.direction is not None:
            assert targets.direction is not None
            offset = refinement_offset(output.boundary, output.direction, size)
            refined = cross_entropy(output.logits, targets.labels, offset, **segmentation)
            direction = cross_entropy(output.direction, targets.direction, ignore_index=IGNORED_DIRECTION)
            terms["refined"] = refined / segmentation_count
            terms["boundary"] = self._boundary_sum(output.boundary, targets) / pixel_count
            terms["direction"] = direction / boundary_count
        weighted = [weight * term for weight, term in zip(self.weights, terms.values(), strict=False)]
        return {"loss": torch.stack(weighted).sum(), **terms}

    def _boundary_sum(self, boundary: Tensor, targets: Targets) -> Tensor:
        assert targets.distance is not None
        logits = upsample_boundary(boundary, (targets.labels.shape[1], targets.labels.shape[2]))
        target = (targets.distance <= self.radius).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (loss * (targets.labels != self.ignore_index)).sum()
