"""Inference: one view of an image, or many averaged at low resolution (Sec. 4.2, Inference).

Letters: B images, H, W their size, K classes, C channels of a view's probabilities: K of the classes, 1 of the
boundary, 8 of the directions (the K alone for a model without a spatial branch).

An image is padded right and below to multiples of 8, as the network does. Every view is the padded image resized to
multiples of 8, so that the network's maps at 1/8 cover the padded image exactly, whatever the scale. Averages are
summed up on one canvas at 1/8 of the largest view; class scores are never held at full resolution.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from .kernels import upsample_argmax, upsample_cross_entropy
from .model.boundary import DIRECTIONS, upsample_boundary
from .model.network import STRIDE, UNEPT, UNEPTOutput, evaluation_mode, output_offset, padded_size, predicted_ids

if TYPE_CHECKING:
    from .config import TrainConfig

# The inference options that belong to a trained model, and which its config.json therefore has (`UNEPT.preprocessing`).
PROTOCOL = ("short_side", "window", "window_stride", "refine", "refine_scale", "amp")
PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # Sec. 4.2; with flip=True these are its 12 views

# Which direction is seen in a mirrored image where direction k is seen in the original.
MIRRORED = [DIRECTIONS.index((-dx, dy)) for dx, dy in DIRECTIONS]


@dataclass
class InferenceConfig:
    """How class ids are predicted from an image."""

    scales: tuple[float, ...] = (1.0,)
    """The image is seen at each of these scales, and the predictions are averaged. The paper's are
    0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """See every scale mirrored as well."""
    window: int | None = None
    """Slide a square window of this many pixels, a multiple of 8, over views that are larger. 0: whole images. None: as
    the run was validated, else whole images."""
    window_stride: int | None = None
    """Pixels from window to window, a multiple of 8. None: 2/3 of the window."""
    window_batch: int = 4
    """Windows that go through the network at once; fewer take less memory."""
    refine: tyro.conf.DisallowNone[bool | None] = None
    """Read the prediction of boundary pixels inside of their segment (Sec. 3.2). None: as the run was validated, else
    yes."""
    refine_scale: int | None = None
    """How many pixels inside. None: as the run was validated, else 1."""
    short_side: int | None = None
    """Pixels that the image's short side has at scale 1. 0: as many as it has. None: as the run was trained, else 0."""
    amp: Literal["auto", "bf16", "off"] = "auto"
    """Autocast to bfloat16. auto: on CUDA only."""

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales are {self.scales}; give at least one, all of them positive")
        for name, pixels in (("window", self.window or None), ("window_stride", self.window_stride)):
            if pixels is not None and (pixels < STRIDE or pixels % STRIDE):
                raise ValueError(f"{name} is {pixels}; it must be a positive multiple of {STRIDE}")
        if self.window_stride is not None and self.window_stride > (self.window or 0):
            raise ValueError(
                f"window_stride is {self.window_stride} and window {self.window}; give a window that is at least as "
                "large, or no stride"
            )
        if self.window_batch < 1:
            raise ValueError(f"window_batch is {self.window_batch}; it must be at least 1")
        if self.refine_scale is not None and not 1 <= self.refine_scale <= 127:
            raise ValueError(f"refine_scale is {self.refine_scale}; it must be between 1 and 127 pixels")
        if self.short_side is not None and self.short_side < 0:
            raise ValueError(f"short_side is {self.short_side}; it must be at least 1, or 0 for the image's own")

    @property
    def stride(self) -> int:
        """Pixels from window to window, a multiple of 8; 0 without windows."""
        if not self.window:
            return 0
        return self.window_stride or max(STRIDE, self.window * 2 // 3 // STRIDE * STRIDE)

    @property
    def refinement(self) -> dict[str, Any]:
        """Arguments `refine` and `refine_scale` of `unept.model.predicted_ids`."""
        return {"refine": self.refine is not False, "refine_scale": self.refine_scale or 1}

    def describe(self) -> str:
        """The protocol in one line: all that two results must share to be compared."""
        scales = " ".join(f"{scale:g}" for scale in self.scales)
        return "; ".join(
            [
                f"scale{'s' * (len(self.scales) > 1)} {scales} {'with' if self.flip else 'without'} flip",
                f"short side {self.short_side}" if self.short_side else "images at their own size",
                f"windows of {self.window} with stride {self.stride}" if self.window else "whole images",
                f"refined by {self.refine_scale or 1} px" if self.refine is not False else "not refined",
            ]
        )


def as_trained(inference: InferenceConfig, config: "TrainConfig") -> InferenceConfig:
    """Inference options with what was left open filled in from the run, so that they say all that will be done."""
    chosen = {name: value for name, value in vars(inference).items() if value not in (None, "auto")}
    if "window" in chosen:
        chosen.setdefault("window_stride", None)  # the run's stride belongs to the run's window
    filled = dataclasses.replace(config.inference(), **chosen)
    return dataclasses.replace(
        filled,
        window=filled.window or None,
        window_stride=filled.stride or None,
        short_side=filled.short_side or None,
        refine=filled.refine and config.model.context_queries == "spatial",
    )


def protocol(config: "TrainConfig") -> dict[str, Any]:
    """What a run fixed of the inference options: those of `PROTOCOL` that it did not leave open."""
    options = vars(as_trained(InferenceConfig(), config))
    return {name: options[name] for name in PROTOCOL if options[name] not in (None, "auto")}


def as_described(inference: InferenceConfig, model: UNEPT) -> InferenceConfig:
    """Inference options; those that are as by default follow the model's `preprocessing`, where it has them.

    Raises:
        ValueError: the two don't fit together.
    """
    chosen = {name: value for name, value in vars(inference).items() if value != getattr(InferenceConfig(), name)}
    described = {name: model.preprocessing[name] for name in PROTOCOL if name in model.preprocessing}
    if "window" in chosen:
        described.pop("window_stride", None)  # it belongs to the described window
    return InferenceConfig(**{**described, **chosen})


def infer(model: UNEPT, images: Tensor, config: InferenceConfig) -> UNEPTOutput:
    """The network's maps for images, averaged over all views.

    The image itself as the only view gives what the network gives. Otherwise `logits` and `direction` hold averaged
    probabilities and `boundary` the logit of the averaged probability, on a grid of 1/8 of the largest view. Either way
    the maps cover the image padded right and below to multiples of 8, as `unept.model.predicted_ids` expects.

    Args:
        model: in any mode; it is evaluated in `eval()` and left as it was.
        images: (B, 3, H, W) or (3, H, W), as `UNEPT.forward` takes them, on the model's device.
        config: the views.

    Returns:
        Maps (B, K, h, w), (B, 1, h, w) and (B, 8, h, w); B is 1 for a single image.
    """
    if images.dim() == 3:
        images = images[None]
    with evaluation_mode(model), _autocast(images.device.type, config.amp):
        if _is_plain(images, config):
            return model(images)
        padded = _padded(model.normalized(images))
        sizes = _view_sizes(padded, min(images.shape[2:]), config)
        canvas = max(sizes)
        total = padded.new_zeros(())
        for size in sizes:
            maps = _view_probabilities(model, _resized(padded, size), config)
            total = total + _resized(maps, (canvas[0] // STRIDE, canvas[1] // STRIDE))
        return _as_output(total / len(sizes), model.num_classes)


def predict_ids(model: UNEPT, images: Tensor, config: InferenceConfig) -> Tensor:
    """Class ids (B, H, W) int64 of images (B, 3, H, W) or (3, H, W), refined as `config` says; see `infer`."""
    output = infer(model, images, config)
    return predicted_ids(output, images.shape[-2:], **config.refinement)


class Prediction(NamedTuple):
    """What the views say about every pixel of images (B, 3, H, W)."""

    ids: Tensor
    """(B, H, W) int64: the class ids of `predict_ids`."""
    confidence: Tensor
    """(B, H, W) float32: the probability of that class, where the prediction was read; with several views their
    average."""
    boundary: Tensor | None
    """(B, H, W) float32: probability of "closer to another class than 5 pixels"; None without a spatial branch."""


def predict(model: UNEPT, images: Tensor, config: InferenceConfig) -> Prediction:
    """Class ids of images (B, 3, H, W) or (3, H, W), how sure they are, and boundaries; see `infer`.

    Like the ids, the confidence comes from class scores that are never held at full resolution.
    """
    output = infer(model, images, config)
    height, width = images.shape[-2:]
    full = padded_size((height, width))
    offset = output_offset(output, full, config.refine_scale or 1) if config.refine is not False else None
    ids = upsample_argmax(output.logits, full, offset)
    if _is_plain(images, config):
        confidence = upsample_cross_entropy(output.logits, ids, offset, ignore_index=-1, reduction="none").neg_().exp_()
    else:
        confidence = _read_channels(output.logits, ids, offset)
    boundary = None if output.boundary is None else upsample_boundary(output.boundary, full).sigmoid_()
    return Prediction(*(None if m is None else m[:, :height, :width] for m in (ids, confidence, boundary)))


def _read_channels(maps: Tensor, channels: Tensor, offset: Tensor | None) -> Tensor:
    """(B, H, W): maps (B, C, h, w) float32, up-sampled, read at p + offset(p) in the channel (B, H, W) of each pixel p.

    A volume with the channels in depth, sampled in the middle of a channel, gives that channel alone.
    """
    (B, C, _, _), (H, W) = maps.shape, channels.shape[1:]
    x, y = torch.arange(W, device=maps.device), torch.arange(H, device=maps.device)[:, None]
    at_x, at_y = (x, y) if offset is None else (x + offset[:, 0], y + offset[:, 1])
    places = [(at_x.clamp(0, W - 1), W), (at_y.clamp(0, H - 1), H), (channels, C)]
    grid = torch.stack([((2 * at + 1) / size - 1).expand(B, H, W) for at, size in places], dim=-1)
    volume = F.grid_sample(maps[:, None], grid[:, None], mode="bilinear", padding_mode="border", align_corners=False)
    return volume[:, 0, 0]


def _autocast(device_type: str, amp: str) -> torch.autocast:
    enabled = amp == "bf16" or (amp == "auto" and device_type == "cuda")
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


def _is_plain(images: Tensor, config: InferenceConfig) -> bool:
    """Whether the only view is the image itself."""
    height, width = images.shape[2:]
    return (
        config.scales == (1.0,)
        and not config.flip
        and config.short_side in (None, 0, min(height, width))
        and (not config.window or max(height, width) <= config.window)
    )


def _padded(images: Tensor) -> Tensor:
    """Normalised images, padded right and below with the mean colour (zero) to multiples of 8, as the network pads."""
    height, width = padded_size(images.shape[2:])
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))


def _view_sizes(padded: Tensor, short_side: int, config: InferenceConfig) -> list[tuple[int, int]]:
    """(height, width) of the padded image at every scale, multiples of 8; `short_side` is the image's own."""
    unit = (config.short_side or short_side) / short_side / STRIDE
    height, width = padded.shape[2:]
    return [
        (max(1, int(height * unit * s + 0.5)) * STRIDE, max(1, int(width * unit * s + 0.5)) * STRIDE)
        for s in config.scales
    ]


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)


def _probabilities(model: UNEPT, images: Tensor, config: InferenceConfig) -> Tensor:
    """(B, C, h, w) float32 of images (B, 3, 8 h, 8 w), averaged with those of their mirror images if `config` flips."""
    maps = _as_probabilities(model(images))
    if config.flip:
        maps = (maps + _unmirrored(_as_probabilities(model(images.flip(-1))), model.num_classes)) / 2
    return maps


def _unmirrored(maps: Tensor, num_classes: int) -> Tensor:
    """What the maps (B, C, h, w) of a mirrored view say about the view: places and directions mirrored back."""
    maps = maps.flip(-1)
    direction = maps[:, num_classes + 1 :]
    if direction.shape[1]:
        direction.copy_(direction[:, MIRRORED])
    return maps


def _view_probabilities(model: UNEPT, view: Tensor, config: InferenceConfig) -> Tensor:
    """(B, C, h, w) float32 of a view (B, 3, 8 h, 8 w), seen whole or through windows.

    It is the windows that are mirrored, each where it is: a mirrored view would take the memory of a second one.
    """
    height, width = view.shape[2:]
    if not config.window or max(height, width) <= config.window:
        return _probabilities(model, view, config)
    rows, columns = min(config.window, height), min(config.window, width)
    corners = [
        (b, y, x)
        for b in range(len(view))
        for y in window_starts(height, rows, config.stride)
        for x in window_starts(width, columns, config.stride)
    ]
    channels = model.num_classes + (1 + len(DIRECTIONS) if model.refines else 0)
    total = torch.zeros(len(view), channels, height // STRIDE, width // STRIDE, device=view.device)
    count = torch.zeros_like(total[:, :1])
    for start in range(0, len(corners), config.window_batch):
        chosen = corners[start : start + config.window_batch]
        crops = torch.stack([view[b, :, y : y + rows, x : x + columns] for b, y, x in chosen])
        for (b, y, x), maps in zip(chosen, _probabilities(model, crops, config), strict=True):
            at_y, at_x = slice(y // STRIDE, (y + rows) // STRIDE), slice(x // STRIDE, (x + columns) // STRIDE)
            total[b, :, at_y, at_x] += maps
            count[b, :, at_y, at_x] += 1
    return total / count


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of windows that cover 0..length - 1 from end to end; the last is shifted inwards to fit."""
    return [*range(0, length - window, stride), length - window]


def _as_probabilities(output: UNEPTOutput) -> Tensor:
    """(B, C, h, w) float32: one tensor of all the maps."""
    maps = [output.logits.float().softmax(dim=1)]
    if output.boundary is not None and output.direction is not None:
        maps += [output.boundary.float().sigmoid(), output.direction.float().softmax(dim=1)]
    return torch.cat(maps, dim=1)


def _as_output(maps: Tensor, num_classes: int) -> UNEPTOutput:
    """Averaged probabilities (B, C, h, w), the boundary as a logit again: its threshold is a probability of 0.5."""
    if maps.shape[1] == num_classes:
        return UNEPTOutput(maps, None, None)
    classes, boundary, direction = maps.split([num_classes, 1, len(DIRECTIONS)], dim=1)
    return UNEPTOutput(classes, boundary.logit(eps=1e-6), direction)
