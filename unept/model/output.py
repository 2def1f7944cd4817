"""What a model predicts for images, and what is read from it: class ids, confidence, boundaries.

Letters: B images, H, W their height and width, K classes; h, w height and width of the predicted maps.

The maps cover the image padded right and below to multiples of 8 (`padded_size`). The network predicts them at 1/8 of
that (`STRIDE`), or finer by a whole factor if its options say so; averaged over several views they may have any
resolution, and boundaries and directions another one than the class scores. Class scores are not up-sampled to full
resolution in memory: ids and confidence come from kernels that up-sample and read them in one pass.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import upsample_argmax, upsample_cross_entropy
from .boundary import Refinement, refinement_offset, upsample_boundary

STRIDE = 8  # image pixels per pixel of the features, and by default of the prediction, along each axis


class DenseOutput(Protocol):
    """What class ids, confidence and boundaries are read from: `UNEPTOutput` and `AveragedOutput` have it."""

    @property
    def scores(self) -> Tensor:
        """(B, K, h, w); the class with the largest score is predicted."""

    @property
    def boundary_logits(self) -> Tensor | None:
        """(B, 1, h', w'), positive where a boundary is more likely than not; None without a spatial branch."""

    @property
    def direction(self) -> Tensor | None:
        """(B, m, h', w'); the direction with the largest score points into the segment; None likewise."""

    @property
    def direction_logits(self) -> Tensor | None:
        """(B, m, h', w'): logits of the directions, whose softmax over m gives their probabilities; None likewise."""

    def confidence(self, ids: Tensor, offset: Tensor | None) -> Tensor:
        """Probability (B, H, W) float32 of the classes `ids` (B, H, W), read at p + offset(p) (`read_offset`)."""


class UNEPTOutput(NamedTuple):
    """What the network predicts for the padded image, whose size is (8 ceil(H / 8), 8 ceil(W / 8)).

    The class logits have 1/`logits_stride` of its height and width (h, w), boundaries and directions 1/8 of them, or
    with sub-pixel heads all of them (h', w').
    """

    logits: Tensor
    """(B, K, h, w): class logits, before refinement."""
    boundary: Tensor | None
    """(B, 1, h', w'): logit of "closer to another class than 5 pixels"; None without a spatial branch."""
    direction: Tensor | None
    """(B, m, h', w'): logits of the m directions into the segment, by default the 8 of
    `unept.model.boundary.DIRECTIONS`; None likewise."""
    logits_stride: int = STRIDE
    """Image pixels per pixel of `logits`, along each axis: 8, 4, 2 or 1."""

    @property
    def scores(self) -> Tensor:
        """See `DenseOutput`."""
        return self.logits

    @property
    def boundary_logits(self) -> Tensor | None:
        """See `DenseOutput`."""
        return self.boundary

    @property
    def direction_logits(self) -> Tensor | None:
        """See `DenseOutput`."""
        return self.direction

    def confidence(self, ids: Tensor, offset: Tensor | None) -> Tensor:
        """See `DenseOutput`."""
        # The cross-entropy of a class is the negative logarithm of its softmax probability.
        return upsample_cross_entropy(self.logits, ids, offset, ignore_index=-1, reduction="none").neg_().exp_()


class AveragedOutput(NamedTuple):
    """Probabilities averaged over several views, which `unept.inference.infer` gives. All float32."""

    probabilities: Tensor
    """(B, K, h, w): of the classes, before refinement; they sum to 1 over the classes."""
    boundary: Tensor | None
    """(B, 1, h', w'): probability of "closer to another class than 5 pixels"; None without a spatial branch."""
    direction: Tensor | None
    """(B, m, h', w'): probabilities of the directions into the segment; None likewise."""

    @property
    def scores(self) -> Tensor:
        """See `DenseOutput`."""
        return self.probabilities

    @property
    def boundary_logits(self) -> Tensor | None:
        """See `DenseOutput`."""
        return None if self.boundary is None else self.boundary.logit(eps=1e-6)

    @property
    def direction_logits(self) -> Tensor | None:
        """See `DenseOutput`."""
        return None if self.direction is None else self.direction.clamp(min=1e-6).log()

    def confidence(self, ids: Tensor, offset: Tensor | None) -> Tensor:
        """See `DenseOutput`."""
        return _read_channels(self.probabilities, ids, offset)


class SegmentationModel(Protocol):
    """What inference, evaluation and pictures need of a model, which is an `nn.Module` besides.

    `UNEPT` has it; so has any other network that is to be evaluated by the same code.
    """

    num_classes: int
    """K."""
    classes: list[str]
    """Names of the K classes."""
    palette: list[list[int]]
    """(r, g, b) of each class, from 0 to 255."""
    refines: bool
    """Whether `UNEPTOutput.boundary` and `UNEPTOutput.direction` are predicted."""
    preprocessing: dict[str, Any]
    """The inference options that its training fixed (`unept.inference.PROTOCOL`), among other keys."""

    def __call__(self, images: Tensor) -> UNEPTOutput:
        """Predict for images (B, 3, H, W) of any size, uint8 RGB or floating-point and normalised."""

    def normalized(self, images: Tensor) -> Tensor:
        """Images (..., 3, H, W) as floating-point ones with the mean and deviation that the model was trained with."""

    def modules(self) -> Iterator[nn.Module]:
        """See `nn.Module.modules`."""

    def eval(self) -> Any:
        """See `nn.Module.eval`."""


class TrainableModel(SegmentationModel, Protocol):
    """What `unept.training` needs of a model besides."""

    backbone: Any
    """The `nn.Module` that is trained at `backbone_lr`. Augmentation pads images with its `mean`, of RGB in [0, 1]."""
    evaluation: dict[str, Any]
    """What the model reached (`UNEPT.evaluation`); training sets it before it saves the model."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write the model into a folder."""

    def train(self, mode: bool = True) -> Any:
        """See `nn.Module.train`."""

    def to(self, device: torch.device) -> Any:
        """See `nn.Module.to`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `nn.Module.parameters`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `nn.Module.named_parameters`."""

    def state_dict(self) -> dict[str, Any]:
        """See `nn.Module.state_dict`."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """See `nn.Module.load_state_dict`."""


def padded_size(size: Sequence[int], divisor: int = STRIDE) -> tuple[int, int]:
    """(H, W) rounded up to multiples of `divisor`; by default the size of the padded image that the maps cover."""
    height, width = ((n + divisor - 1) // divisor * divisor for n in size)
    return height, width


def class_ids(output: DenseOutput, size: Sequence[int], refinement: Refinement | None) -> Tensor:
    """Predicted class of every pixel.

    Args:
        output: maps of any resolution.
        size: (H, W) of the images.
        refinement: how boundary pixels are refined; None does not refine. Without a spatial branch nothing is refined.

    Returns:
        (B, H, W) int64.
    """
    padded = padded_size(size)
    return upsample_argmax(output.scores, padded, read_offset(output, padded, refinement))[:, : size[0], : size[1]]


def read_offset(output: DenseOutput, size: tuple[int, int], refinement: Refinement | None) -> Tensor | None:
    """Where the prediction of each pixel is read, relative to the pixel (`refinement_offset`).

    Args:
        output: maps of any resolution.
        size: (H, W) of the padded images.
        refinement: see `class_ids`.

    Returns:
        (B, 2, H, W) int16, (dx, dy) in pixels; None if every pixel is read where it lies.
    """
    if refinement is None:
        return None
    boundary = output.boundary_logits
    direction = output.direction_logits if refinement.direction == "mean" else output.direction
    if boundary is None or direction is None:
        return None
    return refinement_offset(boundary, direction, size, refinement)


def boundary_probability(output: DenseOutput, size: Sequence[int]) -> Tensor | None:
    """Probability (B, H, W) float32 of "closer to another class than 5 pixels" for images of `size` (H, W).

    It is None without a spatial branch.
    """
    logits = output.boundary_logits
    if logits is None:
        return None
    return upsample_boundary(logits, padded_size(size)).sigmoid()[:, : size[0], : size[1]]


# By model: how many `evaluation_mode` blocks it is in, and the modes that its modules had before the first of them.
_evaluated: weakref.WeakKeyDictionary[Any, tuple[int, list[tuple[nn.Module, bool]]]] = weakref.WeakKeyDictionary()
_evaluated_lock = threading.Lock()


@contextlib.contextmanager
def evaluation_mode(model: SegmentationModel) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; afterwards every module has its own mode back.

    Several threads may do so at once: the modes come back when the last of them has finished.
    """
    with _evaluated_lock:
        users, modes = _evaluated.get(model, (0, []))
        if not users:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
        _evaluated[model] = (users + 1, modes)
    try:
        with torch.inference_mode():
            yield
    finally:
        with _evaluated_lock:
            users, modes = _evaluated.pop(model)
            if users > 1:
                _evaluated[model] = (users - 1, modes)
            else:
                for module, training in modes:
                    module.training = training


def _read_channels(maps: Tensor, channels: Tensor, offset: Tensor | None) -> Tensor:
    """Up-sampled maps (B, C, h, w) float32 in the channel (B, H, W) of each pixel p, read at p + offset(p): (B, H, W).

    A volume with the channels in depth, sampled in the middle of a channel, gives that channel alone.
    """
    (B, C, _, _), (H, W) = maps.shape, channels.shape[1:]
    x, y = torch.arange(W, device=maps.device), torch.arange(H, device=maps.device)[:, None]
    read_x, read_y = (x, y) if offset is None else (x + offset[:, 0], y + offset[:, 1])
    places = [(read_x.clamp(0, W - 1), W), (read_y.clamp(0, H - 1), H), (channels, C)]
    grid = torch.stack([((2 * place + 1) / size - 1).expand(B, H, W) for place, size in places], dim=-1)
    volume = F.grid_sample(maps[:, None], grid[:, None], mode="bilinear", padding_mode="border", align_corners=False)
    return volume[:, 0, 0]
