"""Options of a training run that the paper's recipe does not have; by default each of them changes nothing."""

from dataclasses import dataclass
from typing import Literal

from .model.pixel_loss import PixelLoss, PixelLossKind
from .validation import check_fields

Tracker = Literal["none", "wandb", "mlflow"]


@dataclass
class RecipeConfig:
    """What is not in the paper: fine-tuning, freezing, other losses, and how the optimiser is held."""

    init_from: str | None = None
    """Start from a trained model: a run folder, a folder that save_pretrained wrote, camvid_tiny (the demo model), or
    ORG/NAME on the Hugging Face hub. The network is built as that one, unless options of the network say otherwise;
    every tensor that fits is taken, and for other classes the classifier is made anew."""
    freeze_backbone: bool = False
    """Do not train the backbone; its batch normalisation keeps its statistics too."""
    freeze_stages: int = 0
    """Do not train the stem and the first N stages of the backbone (of a ViT: blocks)."""
    grad_checkpointing: bool = False
    """Compute the stages of the backbone and the layers of the transformer again in the backward, to save memory."""
    clip_grad: float = 0.0
    """Largest norm of all gradients together; a larger one is scaled down to it. 0: gradients are not clipped."""
    layer_decay: float = 1.0
    """Factor from the learning rate of a layer of the backbone to that of the layer before it; the last one has
    backbone_lr."""
    decay_norms: bool = True
    """Whether weight decay holds for normalisations and biases too, as in the paper."""
    patience: int = 0
    """Stop after this many evaluations in a row without a better mIoU. 0: never."""
    segmentation_loss: PixelLossKind = "cross-entropy"
    """Loss of the two segmentation terms. focal: pixels that are right already count less. ohem: only the hardest
    quarter of the pixels of each image counts."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes in the two segmentation terms."""
    dice_weight: float = 0.0
    """Weight of a Dice loss beside Eq. 7; it needs segmentation-models-pytorch."""
    lovasz_weight: float = 0.0
    """Weight of a Lovász loss beside Eq. 7; it needs segmentation-models-pytorch."""
    tracker: Tracker = "none"
    """Record the run in Weights & Biases or MLflow too, beside TensorBoard."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("freeze_stages", "clip_grad", "patience", "dice_weight", "lovasz_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be in (0, 1]")
        self.pixel_loss()  # which checks its options

    def pixel_loss(self) -> PixelLoss:
        """Return the loss of the two segmentation terms."""
        return PixelLoss(self.segmentation_loss, self.label_smoothing)

    def region_losses(self) -> dict[str, float]:
        """Return the weights of the losses beside Eq. 7 that are asked for, by name."""
        weights = {"dice": self.dice_weight, "lovasz": self.lovasz_weight}
        return {name: weight for name, weight in weights.items() if weight}
