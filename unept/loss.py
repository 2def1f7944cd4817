"""The loss of Eq. 7."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boundary import refinement_offset, upsample_boundary
from .kernels import boundary_targets, upsample_cross_entropy
from .model import STRIDE, UNEPTOutput


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

    def forward(self, output: UNEPTOutput, labels: Tensor) -> dict[str, Tensor]:
        """Each term by name, unweighted, and their weighted sum as `loss`: float32 scalars.

        Args:
            output: of the model, for images (B, 3, H, W).
            labels: (B, H, W) integer, of the size of the images.
        """
        height, width = (STRIDE * n for n in output.logits.shape[2:])
        pad = (0, width - labels.shape[-1], 0, height - labels.shape[-2]) if labels.dim() == 3 else (0, -1, 0, -1)
        if not (0 <= pad[1] < STRIDE and 0 <= pad[3] < STRIDE):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the model saw images of about {height}x{width}: "
                "give labels (B, H, W) of the size of the images"
            )
        labels = F.pad(labels, pad, value=self.ignore_index)
        segmentation = {"ignore_index": self.ignore_index, "class_weights": self.class_weights}
        terms = {"segmentation": upsample_cross_entropy(output.logits, labels, **segmentation)}
        if output.boundary is not None and output.direction is not None:
            offset = refinement_offset(output.boundary, output.direction, (height, width))
            distance, direction = boundary_targets(labels, radius=self.radius, ignore_index=self.ignore_index)
            terms["refined"] = upsample_cross_entropy(output.logits, labels, offset, **segmentation)
            terms["boundary"] = self._boundary_loss(output.boundary, distance, labels != self.ignore_index)
            terms["direction"] = upsample_cross_entropy(output.direction, direction, ignore_index=255)
        weighted = [weight * term for weight, term in zip(self.weights, terms.values(), strict=False)]
        return {"loss": torch.stack(weighted).sum(), **terms}

    def _boundary_loss(self, boundary: Tensor, distance: Tensor, counted: Tensor) -> Tensor:
        logits = upsample_boundary(boundary, (distance.shape[1], distance.shape[2]))
        target = (distance <= self.radius).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (loss * counted).sum() / counted.sum().clamp_min(1)
