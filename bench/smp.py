"""Networks of segmentation-models-pytorch as baselines: trained and evaluated by the same code as UNEPT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from unept.model.output import UNEPTOutput, padded_size

from .baselines import imported
from .compared import ComparedNetwork, crop

BACKBONE = "tf_efficientnet_lite0"


def create(architecture: str, encoder: str, classes: int, **options: Any) -> nn.Module:
    """A network of segmentation-models-pytorch without pretrained weights.

    By default its PSPNet ends with the third stage of the encoder, at 1/8. Here it has all stages, dilated to 1/8, as
    in the paper of PSPNet.

    Args:
        architecture: the name of a class of segmentation_models_pytorch.
        encoder: the name of an encoder, as the package takes it.
        classes: K.
        options: further arguments of the class.

    Raises:
        Unavailable: segmentation-models-pytorch is not installed.
    """
    library = imported("segmentation_models_pytorch", "segmentation-models-pytorch")
    of_timm = encoder.startswith("tu-")
    if architecture == "PSPNet":
        options = {"encoder_depth": 5, **({"output_stride": 8} if of_timm else {}), **options}
    model = getattr(library, architecture)(encoder_name=encoder, encoder_weights=None, classes=classes, **options)
    if architecture == "PSPNet" and not of_timm:
        model.encoder.make_dilated(output_stride=8)
    return model


class Baseline(ComparedNetwork):
    """A network of segmentation-models-pytorch on `BACKBONE`.

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

    def __init__(self, architecture: str, classes: Sequence[str], palette: Sequence[Any], weights: Path | None):
        half = (0.5, 0.5, 0.5)  # what these weights expect
        super().__init__(classes, palette, mean=half, std=half, divisor=32)
        self.network: Any = create(architecture, f"tu-{BACKBONE}", len(classes))
        self.network.segmentation_head[1] = nn.Identity()  # its up-sampling
        self.backbone.mean, self.backbone.std = half, half
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
        size, padded = padded_size(images.shape[2:]), self.pad(images)
        logits = crop(self.network(padded), padded.shape[2:], size)
        return UNEPTOutput(logits, None, None, size[0] // logits.shape[2])
