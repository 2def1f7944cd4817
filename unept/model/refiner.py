"""The boundary refinement of the paper on its own, for the predictions of any model (Sec. 3.2; SegFix)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels import upsample_argmax
from .boundary import DIRECTIONS, PixelHead, Refinement, read_at_offset, refinement_offset
from .loss import Targets, UNEPTLoss
from .network import UNEPT
from .normalization import NormalizedInput
from .output import STRIDE, evaluation_mode, padded_size
from .spatial import SpatialBranch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TWO_PIXELS = Refinement(scale=2)  # what SegFix uses at inference


class Refiner(NormalizedInput):
    """Spatial branch, boundary head and direction head of UN-EPT without the rest of it.

    It sees the image alone, tells where two classes meet and which way the inside of a segment lies, and has the pixels
    at a boundary take the class that a model predicts further inside. It knows no classes, so that one refiner serves
    any model and any set of classes. Train it by `unept.training.refiner.train_refiner`, or take it from a trained
    UN-EPT by `from_model`.

    Args:
        width: channels of the branch.
        hidden: channels of the heads.
        upscale: 8 predicts every pixel (sub-pixel heads), 1 every eighth as the paper does, up-sampled bilinearly.
        mean: of RGB in [0, 1], with which uint8 images are normalised.
        std: the standard deviation likewise.
        num_directions: m, the even number of directions that the direction head tells apart.
        widths: channels of the first two convolutions of the branch; None: 32 and `width`.
        last_relu: whether the branch ends in a ReLU.

    Raises:
        ValueError: `upscale` or `num_directions` is another number, or `mean` and `std` are not one number per channel,
            the latter positive.

    Example:
        >>> refiner = Refiner.load("refiner.safetensors")
        >>> ids = refiner.refine(other_model(images), images)  # ids (B, H, W) or logits (B, K, h, w) of any model
    """

    def __init__(
        self,
        width: int = 128,
        hidden: int = 128,
        upscale: int = STRIDE,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        num_directions: int = len(DIRECTIONS),
        widths: Sequence[int] | None = None,
        last_relu: bool = True,
    ):
        super().__init__()
        if min(width, hidden, *(widths or ())) < 1:
            raise ValueError(f"width is {width}, hidden {hidden} and widths {widths}; each must be at least 1")
        if upscale not in (1, STRIDE):
            raise ValueError(f"upscale is {upscale}; it must be 1 or {STRIDE}")
        if num_directions < 2 or num_directions % 2:
            raise ValueError(f"num_directions is {num_directions}; it must be an even number")
        self.options: dict[str, Any] = {"width": width, "hidden": hidden, "upscale": upscale}
        self.options["num_directions"] = num_directions
        self.options |= {"widths": None if widths is None else [*widths], "last_relu": last_relu}
        self.in_chans = len(mean)
        self.branch = SpatialBranch(width, self.in_chans, widths, last_relu)
        self.boundary_head = PixelHead(width, 1, hidden=hidden, upscale=upscale)
        self.direction_head = PixelHead(width, num_directions, hidden=hidden, upscale=upscale)
        self.preprocessing: dict[str, Any] = {}
        self.set_normalization([*map(float, mean)], [*map(float, std)])

    @classmethod
    def from_model(cls, model: UNEPT) -> "Refiner":
        """The refinement of a trained UN-EPT; the modules are shared, not copied.

        Raises:
            ValueError: the model has no spatial branch, or its heads see more than the image.
        """
        if model.boundary_head is None or model.boundaries_see_decoder:
            raise ValueError(
                "the boundary heads of this model "
                + ("do not exist" if model.boundary_head is None else "see the decoder's features")
                + ": give a model with context_queries='spatial' and boundary_features='spatial', or train a Refiner"
            )
        first: Any = model.boundary_head[0][0]  # its first convolution
        refiner = cls(
            first.in_channels,
            first.out_channels,
            STRIDE // model.boundary_stride,
            model.preprocessing["mean"],
            model.preprocessing["std"],
            num_directions=model.options["num_directions"],
            widths=model.options["spatial_widths"],
            last_relu=model.options["spatial_last_relu"],
        )
        parts: Any = model  # whose heads are there, as was checked
        refiner.branch = parts.queries
        refiner.boundary_head, refiner.direction_head = parts.boundary_head, parts.direction_head
        return refiner.to(model.mean.device).train(model.training)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict boundaries and directions.

        Args:
            images: (B, 3, H, W), RGB, of any size; uint8, or floating-point and normalised.

        Returns:
            Logits (B, 1, h, w) of "closer to another class than 5 pixels" and (B, 8, h, w) of `DIRECTIONS`, for the
            image padded to multiples of 8, at all of its pixels or at 1/8.
        """
        images = self.normalized(images).to(self.dtype)
        height, width = padded_size(images.shape[2:])
        features = self.branch(F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2])))
        return self.boundary_head(features), self.direction_head(features)

    def loss(self, images: Tensor, labels: Tensor, criterion: UNEPTLoss) -> Tensor:
        """lambda_3 L_bound + lambda_4 L_dir of Eq. 7, the parts of the loss that need no classes.

        Args:
            images: as `forward` takes them.
            labels: (B, H, W) integer class ids, of the size of the images.
            criterion: has the weights, the radius and the id that is ignored.
        """
        targets: Targets = criterion.targets(labels)
        boundary, direction = self(images)
        boundary_loss, direction_loss = criterion.boundary_losses(boundary, direction, targets)
        return criterion.weights.boundary * boundary_loss + criterion.weights.direction * direction_loss

    def refine(self, prediction: Tensor, images: Tensor, refinement: Refinement = TWO_PIXELS) -> Tensor:
        """Refine what any model predicts for images, in evaluation mode and without gradients.

        Args:
            prediction: class ids (B, H, W) of any integer dtype, or logits (B, K, h, w), up-sampled on the way.
            images: (B, 3, H, W), as `forward` takes them; the same that the model saw, at the size of the result.
            refinement: length and number of the steps.

        Returns:
            (B, H, W): ids in the dtype of the given ids, int64 for logits.

        Raises:
            ValueError: the prediction is neither, its batch or size is not that of the images, or these are no batch.
        """
        if images.dim() != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; they must be (B, {self.in_chans}, H, W)")
        size = (images.shape[2], images.shape[3])
        is_logits = prediction.is_floating_point() and prediction.dim() == 4
        fits = len(prediction) == len(images) and (is_logits or prediction.shape[1:] == size)
        if not fits or not (is_logits or (prediction.dim() == 3 and not prediction.is_floating_point())):
            raise ValueError(
                f"the prediction is {prediction.dtype} {tuple(prediction.shape)} for images {tuple(images.shape)}; "
                f"give integer ids {(len(images), *size)}, or floating-point logits ({len(images)}, K, h, w)"
            )
        with evaluation_mode(self):
            boundary, direction = self(images)
        with torch.no_grad():  # not in inference mode, whose results take part in no loss and are not written to
            offset = refinement_offset(boundary, direction, padded_size(size), refinement)[:, :, : size[0], : size[1]]
            if is_logits:
                return upsample_argmax(prediction, size, offset.contiguous())
            return read_at_offset(prediction[:, None], offset)[:, 0]

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write weights and options into one .safetensors file."""
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, path, metadata={"unept.Refiner": json.dumps({**self.options, **self.preprocessing})})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Refiner":
        """Read what `save` wrote, in evaluation mode.

        Raises:
            ValueError: the file is damaged or of something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                options = (file.metadata() or {}).get("unept.Refiner")
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}): give a file that Refiner.save wrote") from error
        if options is None:
            raise ValueError(f"{path} does not hold a Refiner: give a file that Refiner.save wrote")
        refiner = cls(**json.loads(options))
        refiner.load_state_dict(weights)
        return refiner.to(device).eval()
