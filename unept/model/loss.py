"""The loss of Eq. 7."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import boundary_targets, upsample_cross_entropy
from ..validation import check_choice, check_fields, check_range
from .boundary import DIRECTIONS, ONE_STEP, refinement_offset, upsample_boundary
from .output import UNEPTOutput, padded_size
from .pixel_loss import CROSS_ENTROPY, PixelLoss
from .region_loss import region_loss

IGNORED_DIRECTION = 255  # what boundary_targets gives off the boundary and on ignored pixels
DIRECTION_REACH = 32  # pixels from another class, up to which a predicted boundary pixel has a true direction


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

    def __post_init__(self) -> None:
        check_fields(self)
        for name, weight in vars(self).items():
            check_range(f"the weight of the loss {name!r}", weight, 0)

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
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(f"weights are {weights!r}; give the four lambdas of Eq. 7: {', '.join(names)}")
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
    """(B, H, W), index of the direction away from it, 255 where there is none; None likewise."""
    counts: Tensor
    """(4,) float32: what the sums are divided by. The summed class weights of the pixels that are not ignored (1 each
    without weights), for both segmentation losses; the number of these pixels; the number of true boundary pixels; the
    number of images."""

    def part(self, start: int, stop: int) -> "Targets":
        """Targets of images `start` to `stop` - 1, with the counts of all: the losses of all parts add up."""
        labels, distance, direction = (None if t is None else t[start:stop] for t in self[:3])
        assert labels is not None
        return Targets(labels, distance, direction, self.counts)


class UNEPTLoss(nn.Module):
    """L = l1 CE(Y, Y_hat) + l2 CE(Y, Y_ref) + l3 L_bound + l4 L_dir (Eq. 7).

    CE is the cross-entropy of the up-sampled prediction; Y_ref is the refined prediction, read at p + offset(p).
    L_bound is the binary cross-entropy of the boundary over pixels that are not ignored, L_dir the cross-entropy of the
    direction on boundary pixels. The targets of both are computed here, from the labels as augmented.

    Args:
        weights: l1 to l4, by name or in this order. A model without a spatial branch has the first loss only.
        ignore_index: label of the pixels that are left out.
        class_weights: (K,), weights of the classes in the two segmentation losses.
        radius: pixels; what is closer than this to another class is boundary.
        pixel_loss: takes the place of CE.
        region_losses: weights of further losses of the prediction as it is before refinement, by their names in
            `unept.model.region_loss`, averaged over the images.
        num_directions: m, the number of directions that the model predicts.
        direction_pixels: on which pixels directions are learned: `"true"`, the true boundary pixels, or `"predicted"`,
            those whose boundary probability is above 0.5, as in SegFix, up to 32 pixels from another class. The sum is
            divided by the number of true boundary pixels in both cases.
        boundary_balance: `"none"`, the mean over all pixels, or `"classes"`, half the mean over boundary pixels plus
            half that over the others, as in the released code.

    Raises:
        ValueError: `weights` has another number of entries than Eq. 7, or a choice is unknown.
    """

    def __init__(
        self,
        weights: LossWeights | Sequence[float] = PAPER_WEIGHTS,
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        radius: int = 5,
        pixel_loss: PixelLoss = CROSS_ENTROPY,
        region_losses: Mapping[str, float] | None = None,
        num_directions: int = len(DIRECTIONS),
        direction_pixels: str = "true",
        boundary_balance: str = "none",
    ):
        super().__init__()
        check_choice("direction_pixels", direction_pixels, "true", "predicted")
        check_choice("boundary_balance", boundary_balance, "none", "classes")
        self.pixel_loss = pixel_loss
        self.region_weights = dict(region_losses or {})
        self.region_losses = {name: region_loss(name, ignore_index) for name in self.region_weights}
        self.weights = LossWeights.read(weights)
        self.ignore_index = ignore_index
        self.radius, self.num_directions = radius, num_directions
        self.direction_pixels, self.boundary_balance = direction_pixels, boundary_balance
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
        images = valid.new_full((), len(labels), dtype=torch.int64)
        counts = [self.pixel_loss.count(valid, weight), valid.sum(), torch.zeros_like(images), images]
        distance = direction = None
        if boundaries:
            reach = self.radius if self.direction_pixels == "true" else max(self.radius, DIRECTION_REACH)
            distance, direction = boundary_targets(
                labels, radius=reach, num_directions=self.num_directions, ignore_index=self.ignore_index
            )
            counts[2] = (distance <= self.radius).sum()
        return Targets(labels, distance, direction, torch.stack([count.float() for count in counts]))

    def forward(self, output: UNEPTOutput, labels: Tensor) -> dict[str, Tensor]:
        """Compare a prediction with labels.

        Args:
            output: of the model, for images (B, 3, H, W).
            labels: (B, H, W) integer class ids, of the size of the images.

        Returns:
            Each loss by its name in `LossWeights` or `region_losses`, not weighted, and their weighted sum as `loss`:
            float32 scalars.

        Raises:
            ValueError: the labels have another size than the images, or the model predicts another number of directions
                than `num_directions`.
        """
        height, width = (output.logits_stride * n for n in output.logits.shape[2:])
        if labels.dim() != 3 or padded_size(labels.shape[1:]) != (height, width):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the model saw images of about {height}x{width}: "
                "give labels (B, H, W) of the size of the images"
            )
        if output.direction is not None and output.direction.shape[1] != self.num_directions:
            raise ValueError(
                f"the model predicts {output.direction.shape[1]} directions, but the loss has num_directions="
                f"{self.num_directions}: give UNEPTLoss the number of the model"
            )
        return self.losses(output, self.targets(labels, boundaries=output.boundary is not None))

    def losses(self, output: UNEPTOutput, targets: Targets) -> dict[str, Tensor]:
        """Compare a prediction with targets, whose counts may be those of a larger batch that it is a part of.

        Each loss is a sum over the pixels of this part, divided by `targets.counts`. So the losses of a batch's parts
        add up to those of the whole batch, however its ignored pixels and boundaries are spread over the parts.

        Returns:
            What `forward` returns.
        """
        counts = torch.where(targets.counts == 0, 1, targets.counts)
        segmentation_count = counts[0]
        offsets: list[Tensor | None] = [None]
        if output.boundary is not None and output.direction is not None:
            size = (targets.labels.shape[1], targets.labels.shape[2])
            offsets.append(refinement_offset(output.boundary, output.direction, size, ONE_STEP))
        sums = self.pixel_loss.sums(
            output.logits, targets.labels, offsets, ignore_index=self.ignore_index, class_weights=self.class_weights
        )
        losses = {name: s / segmentation_count for name, s in zip(("segmentation", "refined"), sums, strict=False)}
        if output.boundary is not None and output.direction is not None:
            losses["boundary"], losses["direction"] = self.boundary_losses(output.boundary, output.direction, targets)
        losses |= self.region_means(output.logits, targets)
        weights = {**vars(self.weights), **self.region_weights}
        weighted = [weights[name] * loss for name, loss in losses.items()]
        return {"loss": torch.stack(weighted).sum(), **losses}

    def region_means(self, logits: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The region losses of logits (B, K, h, w) by name, divided by the number of images of `targets`."""
        image_count = targets.counts[3].clamp(min=1)
        return {name: total(logits, targets.labels) / image_count for name, total in self.region_losses.items()}

    def boundary_losses(self, boundary: Tensor, direction: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """L_bound and L_dir of Eq. 7, divided by the counts of `targets`.

        Args:
            boundary: logits (B, 1, h, w).
            direction: logits (B, m, h, w).
            targets: what `targets` gives with boundaries.
        """
        _, pixel_count, boundary_count, _ = torch.where(targets.counts == 0, 1, targets.counts).unbind()
        logits = upsample_boundary(boundary, (targets.labels.shape[1], targets.labels.shape[2]))
        predicted = logits > 0 if self.direction_pixels == "predicted" else None
        direction_loss = _direction_sum(direction, targets, predicted) / boundary_count
        return self._boundary_loss(logits, targets, pixel_count, boundary_count), direction_loss

    def _boundary_loss(self, logits: Tensor, targets: Targets, pixels: Tensor, boundary_pixels: Tensor) -> Tensor:
        """Binary cross-entropy of boundary logits (B, H, W), divided by the number of pixels of the whole batch."""
        assert targets.distance is not None
        target = targets.distance <= self.radius
        loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        loss = loss * (targets.labels != self.ignore_index)
        if self.boundary_balance == "none":
            return loss.sum() / pixels
        others = (pixels - boundary_pixels).clamp(min=1)
        return (loss * target).sum() / (2 * boundary_pixels) + (loss * ~target).sum() / (2 * others)


def _direction_sum(direction: Tensor, targets: Targets, pixels: Tensor | None) -> Tensor:
    """Summed cross-entropy of direction logits (B, m, h, w) on the pixels that have a target, of `pixels` (B, H, W)."""
    assert targets.direction is not None
    target = targets.direction
    if pixels is not None:
        target = target.masked_fill(~pixels, IGNORED_DIRECTION)
    if direction.shape[2:] == target.shape[1:]:
        return F.cross_entropy(direction.float(), target.long(), ignore_index=IGNORED_DIRECTION, reduction="sum")
    return upsample_cross_entropy(direction, target, ignore_index=IGNORED_DIRECTION, reduction="sum")
