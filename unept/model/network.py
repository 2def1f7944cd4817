"""The whole network (Fig. 2)."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from ..colors import default_palette
from ..kernels import upsample_argmax
from .backbone import Backbone, PyramidProjection
from .boundary import DIRECTIONS, PixelHead, refinement_offset
from .hub import model_card
from .spatial import LearnedQueries, SpatialBranch
from .transformer import Decoder, Encoder

STRIDE = 8  # pixels of the image a pixel of the prediction, each way


class UNEPTOutput(NamedTuple):
    """What the network predicts at 1/8 of the image; h = ceil(H / 8), w = ceil(W / 8), at stride 8 exactly.

    For an image whose size is no multiple of 8 the maps cover a little more than the image, below and to the right.
    """

    logits: Tensor
    """(B, K, h, w): of the classes, before refinement."""
    boundary: Tensor | None
    """(B, 1, h, w): logit of "closer to another class than 5 pixels"; None without a spatial branch."""
    direction: Tensor | None
    """(B, 8, h, w): logits of the directions into the segment (`unept.model.boundary.DIRECTIONS`); None likewise."""


class UNEPT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="unept",
    tags=["semantic-segmentation"],
    pipeline_tag="image-segmentation",
):
    """A unified efficient pyramid transformer for semantic segmentation.

    The context branch is a backbone, a 1x1 convolution a level, and a transformer whose attention reads a few sampled
    points of each level; the spatial branch gives its decoder the queries and predicts boundaries and directions, which
    refine the prediction.

    Args:
        num_classes: K.
        backbone: any timm model that gives feature maps.
        pretrained_backbone: load its ImageNet weights from timm's hub.
        backbone_weights: load them from this file instead.
        output_stride: of the backbone; None means 8 for ResNets and the backbone's own for others.
        d_model: channels of the transformer.
        num_heads: M.
        num_points: N, sampled points a head and level.
        num_levels: L, feature maps taken from the backbone.
        num_encoder_layers, num_decoder_layers: of the transformer.
        ffn_dim: hidden channels of its feed-forward networks.
        dropout: in the transformer.
        context_queries: `"spatial"`, or `"learned"` for the paper's baseline without a spatial branch (Table 5), which
            predicts no boundary and does not refine.
        classes: names of the K classes, kept in config.json.
        palette: an (r, g, b) for each class, kept there too.

    Attributes:
        preprocessing: how images are to be given and seen, kept in config.json: `input`, and `mean` and `std` of RGB in
            [0, 1], which `normalized` uses; of a trained model also the fields of `unept.inference.InferenceConfig`
            that its run fixed (`unept.cli.PROTOCOL`).
        evaluation: what the model reached, kept in config.json and shown in the model card: `dataset`, `split`, `step`,
            and scores as `unept.evaluate.evaluate_model` names them; empty if nobody has measured it.

    Raises:
        ValueError: for values that don't fit together; the message says which.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        *,
        pretrained_backbone: bool = False,
        backbone_weights: str | None = None,
        output_stride: int | None = None,
        d_model: int = 256,
        num_heads: int = 8,
        num_points: int = 16,
        num_levels: int = 3,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 2,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        context_queries: str = "spatial",
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__()
        for name, listed in (("classes", classes), ("palette", palette)):
            if listed is not None and len(listed) != num_classes:
                raise ValueError(f"num_classes is {num_classes}, but {name} has {len(listed)} entries")
        if d_model % 8:
            raise ValueError(f"d_model is {d_model}: it must be a multiple of 8")
        if context_queries not in ("spatial", "learned"):
            raise ValueError(f"context_queries is {context_queries!r}; it must be 'spatial' or 'learned'")
        self.num_classes = num_classes
        self.classes = list(classes) if classes is not None else [f"class {k}" for k in range(num_classes)]
        self.palette = [list(color) for color in palette or default_palette(num_classes)]

        self.backbone = Backbone(
            backbone,
            num_levels=num_levels,
            output_stride=output_stride,
            pretrained=pretrained_backbone,
            weights=backbone_weights,
        )
        self.pyramid = PyramidProjection(self.backbone.channels, d_model)
        size = (d_model, num_heads, num_levels, num_points, ffn_dim, dropout)
        self.encoder = Encoder(num_encoder_layers, *size)
        self.decoder = Decoder(num_decoder_layers, *size)
        self.classifier = nn.Conv2d(d_model, num_classes, 1)
        self.refines = context_queries == "spatial"
        self.queries = SpatialBranch(d_model) if self.refines else LearnedQueries(d_model)
        self.boundary_head = PixelHead(d_model, 1) if self.refines else None
        self.direction_head = PixelHead(d_model, len(DIRECTIONS)) if self.refines else None

        self.divisor = math.lcm(STRIDE, *self.backbone.strides)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1) * 255, persistent=False)
        self.preprocessing: dict[str, Any] = {
            "input": "uint8 RGB",
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
        }
        self.evaluation: dict[str, Any] = {}
        # A saved model carries its weights: loading it again needs neither the hub nor the file.
        for key in ("pretrained_backbone", "backbone_weights"):
            self._hub_mixin_config.pop(key, None)  # type: ignore[union-attr]

    def normalized(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W): uint8 ones with the mean and standard deviation that the backbone expects.

        Floating-point images are taken as normalised already and come back as they are.

        Raises:
            TypeError: they are neither.
        """
        if images.dtype == torch.uint8:
            return (images.to(self.mean.dtype) - self.mean) / self.std
        if not images.is_floating_point():
            raise TypeError(f"images have dtype {images.dtype}; give uint8 images, or normalised floating-point ones")
        return images

    def forward(self, images: Tensor) -> UNEPTOutput:
        """Predict at 1/8 of the image.

        Args:
            images: (B, 3, H, W), RGB, any H and W; uint8, or floating-point and normalised (`normalized`).
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; they must be (B, 3, H, W)")
        images = self.normalized(images)
        height, width = images.shape[2:]
        full_height, full_width = padded_size((height, width), self.divisor)
        padded = F.pad(images, (0, full_width - width, 0, full_height - height))

        details = self.queries(padded)
        tokens, shapes = self.pyramid(self.backbone(padded))
        memory = self.encoder(tokens, shapes)
        logits = self.classifier(self.decoder(details, memory, shapes))
        boundary = self.boundary_head(details) if self.boundary_head is not None else None
        direction = self.direction_head(details) if self.direction_head is not None else None

        h, w = (n // STRIDE for n in padded_size((height, width)))
        return UNEPTOutput(*(None if m is None else m[:, :, :h, :w] for m in (logits, boundary, direction)))

    def _save_pretrained(self, save_directory: Path) -> None:
        """As the mixin does; what the model says about itself goes into the config.json that the mixin writes next."""
        description = {"preprocessing": self.preprocessing, "evaluation": self.evaluation}
        self._hub_mixin_config.update(description)  # type: ignore[union-attr]
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, strict: bool = True, **options):
        """As the mixin does, but missing weights are an error, not random numbers, and so is a missing config.json.

        The stored mean and standard deviation count, not what this version of timm has for the backbone.
        """
        if "num_classes" not in options:
            raise FileNotFoundError(
                f"{model_id} has no config.json of a model that can be read: give a folder that save_pretrained wrote "
                "(model/ in a folder of unept.train), or ORG/NAME of one that push_to_hub wrote"
            )
        with contextlib.redirect_stdout(None):  # the mixin announces local folders
            model = super()._from_pretrained(model_id=model_id, strict=strict, **options)
        stored = config or {}
        model.preprocessing.update(stored.get("preprocessing", {}))
        model.evaluation.update(stored.get("evaluation", {}))
        for name in ("mean", "std"):
            buffer = getattr(model, name)
            buffer.copy_(torch.tensor(model.preprocessing[name]).view(3, 1, 1) * 255)
            setattr(model.backbone, name, tuple(model.preprocessing[name]))
        return model

    def generate_model_card(self, repo_id: str | None = None, **metadata: Any) -> ModelCard:
        """README.md of a saved model: its classes, how it sees images, what it reached, how to use it.

        Args:
            repo_id: where it can be had.
            metadata: more of `huggingface_hub.ModelCardData`, such as `license="cc-by-4.0"` or `datasets=["org/name"]`.
        """
        return model_card(self, self._hub_mixin_info.model_card_data, repo_id, metadata)

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        """Save the model into a repository of the Hugging Face hub, in one commit, with a model card.

        Args:
            repo_id: `ORG/NAME`; made if it does not exist.
            model_card_kwargs: of `generate_model_card`.
            options: of `huggingface_hub.PyTorchModelHubMixin.push_to_hub` (`private`, `token`, `commit_message`, ...).

        Returns:
            The commit's address.
        """
        about = {"repo_id": repo_id, **(model_card_kwargs or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=about, **options)

    def predict(self, images: Tensor, *, refine: bool = True, refine_scale: int = 1) -> Tensor:
        """Class ids of every pixel, in evaluation mode and without gradients; the mode is restored.

        Args:
            images: as `forward` takes them.
            refine: read boundary pixels one step inside their segment (Sec. 3.2).
            refine_scale: pixels a step.

        Returns:
            (B, H, W) int64.
        """
        with evaluation_mode(self):
            output = self(images)
            return predicted_ids(output, images.shape[2:], refine=refine, refine_scale=refine_scale)


def padded_size(size: Sequence[int], divisor: int = STRIDE) -> tuple[int, int]:
    """(H, W) padded right and below to the next multiples of `divisor`; by default what the predicted maps cover."""
    height, width = ((n + divisor - 1) // divisor * divisor for n in size)
    return height, width


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def predicted_ids(output: UNEPTOutput, size: Sequence[int], *, refine: bool = True, refine_scale: int = 1) -> Tensor:
    """Class ids (B, H, W) int64 of images of `size` (H, W), refined if asked for and if there is a spatial branch.

    The maps of `output` may have any resolution; they cover the image padded right and below to multiples of 8.
    """
    full = padded_size(size)
    offset = output_offset(output, full, refine_scale) if refine else None
    return upsample_argmax(output.logits, full, offset)[:, : size[0], : size[1]]


def output_offset(output: UNEPTOutput, size: tuple[int, int], refine_scale: int = 1) -> Tensor | None:
    """Where pixels of a prediction of `size` are read (`refinement_offset`); None without a spatial branch."""
    if output.boundary is None or output.direction is None:
        return None
    return refinement_offset(output.boundary, output.direction, size, scale=refine_scale)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> UNEPT:
    """The model that `save_pretrained` wrote into `folder`, in evaluation mode."""
    return UNEPT.from_pretrained(str(folder)).to(device).eval()
