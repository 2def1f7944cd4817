"""The whole network (Fig. 2)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validation import check_arguments, check_choice
from .attention_variants import ATTENTIONS
from .backbone import RESNET50, Backbone, PyramidProjection
from .boundary import DIRECTIONS, PixelHead, Refinement, StepDirection, SubpixelConv
from .finite import require_numbers
from .hub import HubMixin
from .labels import Labelled, check_labels
from .limits import check_sizes
from .normalization import NormalizedInput
from .output import STRIDE, UNEPTOutput, class_ids, evaluation_mode, padded_size
from .spatial import LearnedQueries, SpatialBranch
from .transformer import Decoder, Encoder, LayerSize, upsampled_levels


class UNEPT(NormalizedInput, Labelled, HubMixin):
    """A unified efficient pyramid transformer for semantic segmentation.

    The context branch is a backbone, a 1x1 convolution per level, and a transformer whose attention reads a few sampled
    points of each level. The spatial branch gives the decoder its queries and predicts boundaries and directions, which
    refine the prediction.

    Args:
        num_classes: K.
        backbone: name of any timm model that gives feature maps; its tag, as in `resnet50.tv_in1k`, says which weights.
        pretrained_backbone: load its ImageNet weights from timm's hub.
        backbone_weights: load them from this file instead.
        backbone_image_size: for backbones that see images of one size only: the side in pixels of the squares into
            which images are cut for the backbone. None: whole images.
        output_stride: of the backbone; None means 8 for ResNets and the backbone's own for others.
        d_model: channels of the transformer, a multiple of 8 and of `num_heads`.
        num_heads: M, attention heads.
        num_points: N, sampled points per head and level.
        num_levels: L, feature maps taken from the backbone.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        ffn_dim: hidden channels of the transformer's feed-forward networks.
        dropout: dropout probability in the transformer.
        attention: `"sparse_sampling"`, or one of those that Table 8 compares it with: `"full"`, `"sparse_transformer"`,
            `"longformer"` or `"reformer"` (`unept.model.attention_variants`).
        decoder_self_attention: that of the context queries among themselves; None means `attention`.
        context_queries: `"spatial"`, or `"learned"` for the paper's baseline without a spatial branch (Table 5), which
            predicts no boundary and does not refine; `"spatial+learned"` adds such a table to the spatial branch's
            features where they enter the decoder, `"spatial+encoder"` adds the encoder's output, the sum of its levels
            up-sampled to 1/8.
        boundary_upsampling: how boundaries and directions come from 1/8 to the resolution of the image: `"bilinear"`,
            as in the paper, or `"subpixel"`, where the last convolution of each head predicts all 64 pixels of a block.
        boundary_features: what the boundary and direction heads see: `"spatial"`, the spatial branch alone, as in the
            paper, or `"spatial+decoder"`, the output of the decoder too.
        logits_stride: image pixels per pixel of the class logits along each axis: 8, as in the paper, or 4, 2 or 1,
            where the classifier predicts every pixel of a block.
        num_directions: m, the even number of directions that the direction head tells apart.
        spatial_widths: channels of the first two convolutions of the spatial branch; None means (32, d_model).
        spatial_last_relu: whether the spatial branch ends in a ReLU.
        level_norm: whether a group normalisation follows the 1x1 convolution of each level.
        position_resize: how a ViT's position embedding is resized: `"bicubic"`, as in timm, or `"bilinear"`, as in the
            paper.
        scale_encoding_std: standard deviation of the scale encoding at the start.
        zero_init_residual: start with attentions and feed-forward networks that give zero, so that a layer of the
            transformer at first only normalises what it is given. With `context_queries="spatial+encoder"` the
            classifier then reads the backbone's features from the first step on.
        classes: names of the K classes, kept in config.json.
        palette: an (r, g, b) for each class, kept there too.
        in_chans: number of channels of an image, C.
        mean: mean of each channel in [0, 1]; None means the backbone's, whose average every channel has if they are not
            3.
        std: standard deviation, likewise.

    Attributes:
        classes, palette: may be set to others of the same number; `save_pretrained` keeps them.
        refines: whether boundaries and directions are predicted.
        preprocessing: how images are to be given and seen, kept in config.json: `input`, and `mean` and `std` of RGB in
            [0, 1], which `normalized` uses; of a trained model also the inference options that its run fixed
            (`unept.inference.PROTOCOL`).
        evaluation: what the model reached, kept in config.json and shown in the model card: `dataset`, its
            `dataset_title` in a sentence, `split`, `step`, and scores as `unept.evaluate.evaluate_model` names them;
            empty if nobody has measured it.

    Raises:
        ValueError: options that do not fit together; the message says which.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = RESNET50,
        *,
        pretrained_backbone: bool = False,
        backbone_weights: str | Path | None = None,
        backbone_image_size: int | None = None,
        output_stride: int | None = None,
        d_model: int = 256,
        num_heads: int = 8,
        num_points: int = 16,
        num_levels: int = 3,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 2,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        attention: str = "sparse_sampling",
        decoder_self_attention: str | None = None,
        context_queries: str = "spatial",
        boundary_upsampling: str = "bilinear",
        boundary_features: str = "spatial",
        logits_stride: int = STRIDE,
        num_directions: int = len(DIRECTIONS),
        spatial_widths: Sequence[int] | None = None,
        spatial_last_relu: bool = True,
        level_norm: bool = True,
        position_resize: str = "bicubic",
        scale_encoding_std: float = 0.02,
        zero_init_residual: bool = False,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        in_chans: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(UNEPT.__init__, arguments)
        check_sizes(arguments)
        check_labels(num_classes, classes=classes, palette=palette)
        check_choice("attention", attention, *ATTENTIONS)
        check_choice("decoder_self_attention", decoder_self_attention or attention, *ATTENTIONS)
        check_choice("context_queries", context_queries, "spatial", "learned", "spatial+learned", "spatial+encoder")
        check_choice("boundary_upsampling", boundary_upsampling, "bilinear", "subpixel")
        check_choice("boundary_features", boundary_features, "spatial", "spatial+decoder")
        check_choice("logits_stride", logits_stride, 1, 2, 4, 8)
        self.in_chans = in_chans
        self.set_labels(num_classes, classes, palette)
        self.refines = context_queries != "learned"

        self.backbone = Backbone(
            backbone,
            num_levels=num_levels,
            output_stride=output_stride,
            pretrained=pretrained_backbone,
            weights=backbone_weights,
            in_chans=in_chans,
            image_size=backbone_image_size,
            position_resize=position_resize,
        )
        self.pyramid = PyramidProjection(self.backbone.channels, d_model, level_norm)
        size = LayerSize(
            d_model=d_model,
            num_heads=num_heads,
            num_levels=num_levels,
            num_points=num_points,
            ffn_dim=ffn_dim,
            dropout=dropout,
            attention=attention,
            decoder_self_attention=decoder_self_attention,
            zero_init_residual=zero_init_residual,
        )
        self.encoder = Encoder(num_encoder_layers, size, scale_encoding_std)
        self.decoder = Decoder(num_decoder_layers, size)
        self.logits_stride = logits_stride
        self.classifier = _classifier(d_model, num_classes, logits_stride)
        self.queries: nn.Module = (
            SpatialBranch(d_model, in_chans, spatial_widths, spatial_last_relu)
            if self.refines
            else LearnedQueries(d_model)
        )
        self.query_table = LearnedQueries(d_model) if context_queries == "spatial+learned" else None
        self.queries_see_encoder = context_queries == "spatial+encoder"
        self.boundary_stride = 1 if boundary_upsampling == "subpixel" else STRIDE
        self.boundaries_see_decoder = boundary_features == "spatial+decoder"
        channels, upscale = d_model * (1 + self.boundaries_see_decoder), STRIDE // self.boundary_stride
        self.boundary_head = PixelHead(channels, 1, upscale=upscale) if self.refines else None
        self.direction_head = PixelHead(channels, num_directions, upscale=upscale) if self.refines else None

        self.divisor = math.lcm(STRIDE, self.backbone.divisor)
        self.preprocessing: dict[str, Any] = {"input": "uint8 RGB"}
        self.evaluation: dict[str, Any] = {}
        self.set_normalization(self.backbone.mean if mean is None else mean, self.backbone.std if std is None else std)

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise uint8 images with this mean and deviation of each channel in [0, 1]; see `NormalizedInput`."""
        super().set_normalization(mean, std)
        self.backbone.mean, self.backbone.std = tuple(mean), tuple(std)

    def reset_classifier(
        self, num_classes: int, classes: Sequence[str] | None = None, palette: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Predict other classes: a new classifier with random weights; everything else is kept, `evaluation` is not.

        Args:
            num_classes: K of the new classes.
            classes: their names.
            palette: an (r, g, b) for each.

        Raises:
            ValueError: `classes` or `palette` has another number of entries than K.
        """
        check_labels(num_classes, classes=classes, palette=palette)
        weight = next(self.classifier.parameters())
        d_model = self.options["d_model"]
        self.classifier = _classifier(d_model, num_classes, self.logits_stride).to(weight.device, weight.dtype)
        self.set_labels(num_classes, classes, palette)
        self.options["num_classes"] = num_classes
        self.evaluation = {}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the stages of the backbone and the layers of the transformer again in the backward, to save memory.

        Loss and gradients stay the same. The batch normalisation of a stage sees each batch twice, so that its running
        statistics follow the data faster.

        Raises:
            ValueError: timm has no such option for the backbone.
        """
        self.backbone.set_grad_checkpointing(enable)
        self.encoder.grad_checkpointing = self.decoder.grad_checkpointing = enable

    def forward(self, images: Tensor) -> UNEPTOutput:
        """Predict at 1/8 of the image (Fig. 2), or finer where the options of the model say so.

        Args:
            images: (B, C, H, W), by default RGB, any H and W; uint8, or floating-point and normalised (`normalized`).
                What is normalised is converted to the dtype of the weights.

        Returns:
            Maps (B, K, h, w), (B, 1, h', w') and (B, m, h', w'). By default h = h' = ceil(H / 8) and w = w' =
            ceil(W / 8); see `UNEPTOutput`. For `torch.jit.trace` and `torch.onnx.export`, which take nothing but
            tensors, it is a plain tuple of the maps that there are.

        Raises:
            ValueError: the images have another shape.
            TypeError: they have another dtype.
        """
        if images.dim() != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; they must be (B, {self.in_chans}, H, W)")
        images = self.normalized(images).to(self.dtype)
        height, width = images.shape[2:]
        full_height, full_width = padded_size((height, width), self.divisor)
        padded = F.pad(images, (0, full_width - width, 0, full_height - height))

        details = self.queries(padded)
        tokens, shapes = self.pyramid(self.backbone(padded))
        memory = self.encoder(tokens, shapes)
        queries = details if self.query_table is None else details + self.query_table(padded)
        if self.queries_see_encoder:
            queries = queries + upsampled_levels(memory, shapes, (full_height // STRIDE, full_width // STRIDE))
        decoded = self.decoder(queries, memory, shapes)
        covered = padded_size((height, width))
        logits = _crop(self.classifier(decoded), covered, self.logits_stride)
        if self.boundary_head is None or self.direction_head is None:
            return self._output(logits)
        seen = torch.cat([details, decoded], dim=1) if self.boundaries_see_decoder else details
        boundary = _crop(self.boundary_head(seen), covered, self.boundary_stride)
        direction = _crop(self.direction_head(seen), covered, self.boundary_stride)
        return self._output(logits, boundary, direction)

    def _output(self, logits: Tensor, boundary: Tensor | None = None, direction: Tensor | None = None) -> Any:
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return tuple(maps for maps in (logits, boundary, direction) if maps is not None)
        return UNEPTOutput(logits, boundary, direction, self.logits_stride)

    def predict(
        self,
        images: Tensor,
        *,
        refine: bool = True,
        refine_scale: int = 1,
        refine_steps: int = 1,
        refine_direction: StepDirection = "best",
    ) -> Tensor:
        """Class ids of every pixel, in evaluation mode and without gradients; the mode is restored.

        Args:
            images: as `forward` takes them.
            refine: read the prediction of boundary pixels inside their segment (Sec. 3.2).
            refine_scale: length of a step in pixels.
            refine_steps: number of steps, each from where the one before ended.
            refine_direction: `"best"` or `"mean"` (`unept.model.boundary.Refinement`).

        Returns:
            (B, H, W) int64.

        Raises:
            ValueError: a step has another length, number or direction than `Refinement` allows.
            FloatingPointError: the prediction holds NaN.
        """
        refinement = Refinement(refine_scale, refine_steps, refine_direction) if refine else None
        with evaluation_mode(self):
            output = self(images)
        with torch.no_grad():  # not in inference mode, whose results take part in no loss and are not written to
            require_numbers(output.logits)
            return class_ids(output, images.shape[2:], refinement)


def _classifier(d_model: int, num_classes: int, stride: int) -> nn.Module:
    """The last convolution, which predicts class logits at 1/`stride` of the image."""
    if stride == STRIDE:
        return nn.Conv2d(d_model, num_classes, 1)
    return SubpixelConv(d_model, num_classes, STRIDE // stride)


def _crop(maps: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Crop maps (B, C, h, w) of a stride to those of the first pixels, `size` (H, W), a multiple of the stride."""
    return maps[:, :, : size[0] // stride, : size[1] // stride]
