"""Networks of segmentation-models-pytorch as baselines: trained and evaluated by the same code as UNEPT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from unept.config import TrainConfig
from unept.model.network import UNEPT
from unept.model.output import TrainableModel, UNEPTOutput, padded_size
from unept.train import Trainer

from .baselines import imported

BACKBONE = "tf_efficientnet_lite0"


class Baseline(nn.Module):
    """A network of segmentation-models-pytorch on `BACKBONE`, that is a `TrainableModel`.

    Its logits are at 1/4 of the image (those of UNEPT at 1/8), and the loss and the prediction up-sample them alike.

    Args:
        architecture: the name of a class of segmentation_models_pytorch.
        classes: the names of the classes.
        palette: an (r, g, b) per class.
        weights: ImageNet weights of the backbone, .safetensors as timm has them; None leaves them random.

    Raises:
        Unavailable: segmentation-models-pytorch is not installed.
        ValueError: the file lacks tensors of the backbone.
    """

    refines = False
    normalized = UNEPT.normalized

    def __init__(self, architecture: str, classes: Sequence[str], palette: Sequence[Any], weights: Path | None):
        super().__init__()
        smp = imported("segmentation_models_pytorch", "segmentation-models-pytorch")
        self.num_classes, self.classes, self.palette = len(classes), list(classes), list(palette)
        encoder = f"tu-{BACKBONE}"
        self.network = getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, classes=len(classes))
        self.network.segmentation_head[1] = nn.Identity()  # its up-sampling
        self.backbone.mean, self.backbone.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # what these weights expect
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1) * 255, persistent=False)
        self.preprocessing: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        if weights is not None:
            self._load(weights)

    @property
    def backbone(self) -> Any:
        """The encoder, which has a learning rate of its own."""
        return self.network.encoder

    def _load(self, weights: Path) -> None:
        stored = load_file(weights)
        missing, _ = self.backbone.model.load_state_dict(stored, strict=False)
        if missing:
            raise ValueError(
                f"{weights} lacks {len(missing)} of the backbone's tensors, such as {missing[0]}: give timm's weights "
                f"of {BACKBONE}"
            )

    def forward(self, images: Tensor) -> UNEPTOutput:
        """Predict as `UNEPT.forward` does, without boundary and direction."""
        images = self.normalized(images)
        height, width = padded_size(images.shape[2:])
        full = padded_size((height, width), 32)
        padded = F.pad(images, (0, full[1] - images.shape[3], 0, full[0] - images.shape[2]))
        logits = self.network(padded)
        stride = full[0] // logits.shape[2]
        return UNEPTOutput(logits[:, :, : height // stride, : width // stride], None, None, stride)

    def save_pretrained(self, folder: Path) -> None:
        """Save the weights alone."""
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "model.pt")


class BaselineTrainer(Trainer):
    """Train a `Baseline` of one architecture."""

    def __init__(self, architecture: str, config: TrainConfig, out: Path):
        self.architecture = architecture
        super().__init__(config, out)

    def build_model(self) -> TrainableModel:
        """Return the baseline with the pretrained weights of its backbone."""
        weights = self.config.model.backbone_weights
        return Baseline(self.architecture, self.train_set.classes, self.train_set.palette, weights)
