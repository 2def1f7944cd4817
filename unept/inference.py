"""Inference: one view of an image, or many averaged at low resolution (Sec. 4.2, Inference).

Letters: B images, H, W their height and width, K classes, C channels of a map; h, w its height and width.

An image is padded right and below to multiples of 8, as the network does. Every view is the padded image resized to
multiples of 8, so that the network's maps cover the padded image exactly, whatever the scale. Averages are summed on
one canvas for each kind of map. That of the class probabilities has the network's stride on the largest view, so they
are not held at full resolution unless the network predicts them there; that of boundaries and directions likewise, but
where the network predicts them finer than at 1/8 it has at most the resolution of the padded image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compilation import Compile, call_compiled
from .kernels import upsample_argmax
from .model.boundary import Refinement, StepDirection, mirrored_directions
from .model.finite import require_numbers
from .model.output import (
    STRIDE,
    AveragedOutput,
    DenseOutput,
    SegmentationModel,
    UNEPTOutput,
    boundary_probability,
    class_ids,
    evaluation_mode,
    padded_size,
    read_offset,
)
from .precision import Amp, uses_bfloat16
from .validation import check_fields, check_range

PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # Sec. 4.2; with flip=True these are its 12 views


@dataclass(frozen=True)
class InferenceConfig:
    """How class ids are predicted from an image. Nothing is left open: see `resolve` for options that may be."""

    scales: tuple[float, ...] = (1.0,)
    """The image is seen at each of these scales, and the predictions are averaged."""
    flip: bool = False
    """See every scale mirrored as well."""
    window: int = 0
    """Slide a square window of this many pixels, a multiple of 8, over views that are larger. 0: whole images."""
    window_stride: int = 0
    """Pixels from window to window, a multiple of 8. 0: 2/3 of the window, which is filled in."""
    window_batch: int = 4
    """Windows that go through the network at once; fewer take less memory."""
    refine: bool = True
    """Read the prediction of boundary pixels inside their segment (Sec. 3.2)."""
    refine_scale: int = 1
    """Length of a step into the segment in pixels, from 1 to 127."""
    refine_steps: int = 1
    """Number of steps, each from where the one before ended, from 1 to 127."""
    refine_direction: StepDirection = "best"
    """best: in the most likely direction, as in the paper. mean: in the mean of all, shorter where they disagree."""
    short_side: int = 0
    """Pixels of the image's short side at scale 1. 0: as many as it has."""
    long_side: int = 0
    """Pixels of its long side at scale 1, in place of `short_side`. 0: as many as it has."""
    amp: Amp = "auto"
    """Autocast to bfloat16. auto: on CUDA, and on CPUs with AVX512-BF16 or AMX."""
    compile: Compile = "auto"
    """torch.compile of the network, for at most 8 sizes of its input. on: those that come first. auto: on CUDA, those
    that come 100 times."""

    def __post_init__(self) -> None:
        if None in vars(self).values():
            name = next(name for name, value in vars(self).items() if value is None)
            raise ValueError(f"{name} is None; give a value, or fill in what is left open with unept.inference.resolve")
        given = self.scales if isinstance(self.scales, Sequence) else ()
        if not given or not all(isinstance(scale, Real) and 0 < scale < math.inf for scale in given):
            raise ValueError(f"scales are {self.scales}; give at least one, all of them positive")
        check_fields(self)
        for name in ("window", "window_stride"):
            pixels = getattr(self, name)
            if pixels < 0 or pixels % STRIDE:
                raise ValueError(f"{name} is {pixels}; it must be a positive multiple of {STRIDE}, or 0")
        if self.window_stride > self.window:
            raise ValueError(
                f"window_stride is {self.window_stride} and window {self.window}; give a window that is at least as "
                "large, or no stride"
            )
        if self.window_batch < 1:
            raise ValueError(f"window_batch is {self.window_batch}; it must be at least 1")
        if not 1 <= self.refine_scale <= 127:
            raise ValueError(f"refine_scale is {self.refine_scale}; it must be between 1 and 127 pixels")
        if not 1 <= self.refine_steps <= 127:
            raise ValueError(f"refine_steps is {self.refine_steps}; it must be between 1 and 127")
        for name in ("short_side", "long_side"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, or 0 for the image's own")
            check_range(name, getattr(self, name), 0, 1 << 16)
        if self.short_side and self.long_side:
            raise ValueError(f"short_side is {self.short_side} and long_side {self.long_side}; give one of them")
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.window and not self.window_stride:
            object.__setattr__(self, "window_stride", max(STRIDE, self.window * 2 // 3 // STRIDE * STRIDE))

    @property
    def refinement(self) -> Refinement | None:
        """How boundary pixels are refined; None if they are not."""
        return Refinement(self.refine_scale, self.refine_steps, self.refine_direction) if self.refine else None

    def protocol(self) -> dict[str, Any]:
        """The fields that a run fixes for its model (`PROTOCOL`), as `UNEPT.preprocessing` and config.json keep them.

        Those that say nothing (no window, the image's own size, autocast as the device has it) are omitted.
        """
        kept = {name: getattr(self, name) for name in PROTOCOL}
        return {name: value for name, value in kept.items() if value is False or value not in (0, "auto", "best")}

    def resize_ratio(self, height: int, width: int) -> float:
        """How much larger an image of height x width is seen at scale 1 than it is."""
        if self.short_side:
            return self.short_side / min(height, width)
        return self.long_side / max(height, width) if self.long_side else 1.0

    def describe(self) -> str:
        """The protocol in one line: all that two results must share to be compared."""
        scales = " ".join(f"{scale:g}" for scale in self.scales)
        steps = f"{self.refine_steps} times " if self.refine_steps > 1 else ""
        length = "up to " if self.refine_direction == "mean" else ""
        sides = [f"{side} side {n}" for side, n in (("short", self.short_side), ("long", self.long_side)) if n]
        return "; ".join(
            [
                f"scale{'s' * (len(self.scales) > 1)} {scales} {'with' if self.flip else 'without'} flip",
                *(sides or ["images at their own size"]),
                f"windows of {self.window} with stride {self.window_stride}" if self.window else "whole images",
                f"refined {steps}by {length}{self.refine_scale} px" if self.refine else "not refined",
            ]
        )


@dataclass(frozen=True)
class InferenceOptions:
    """What a user chooses of `InferenceConfig`. What is None is done as the model was trained and validated."""

    scales: tuple[float, ...] = (1.0,)
    """The image is seen at each of these scales, and the predictions are averaged. The paper's are
    0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """See every scale mirrored as well."""
    window: int | None = None
    """Slide a square window of this many pixels, a multiple of 8, over views that are larger. 0: whole images. None: as
    the run was validated, else whole images."""
    window_stride: int | None = None
    """Pixels from window to window, a multiple of 8. 0: 2/3 of the window. None: as the run was validated, unless a
    window is given; else 2/3 of the window."""
    window_batch: int = 4
    """Windows that go through the network at once; fewer take less memory."""
    refine: bool | None = None
    """Read the prediction of boundary pixels inside their segment (Sec. 3.2). None: as the run was validated, else
    yes."""
    refine_scale: int | None = None
    """Length of a step into the segment in pixels. None: as the run was validated, else 1."""
    refine_steps: int | None = None
    """Number of steps, each from where the one before ended. None: as the run was validated, else 1."""
    refine_direction: StepDirection | None = None
    """best: in the most likely direction, as in the paper. mean: in the mean of all directions, weighted by their
    probabilities, shorter where they disagree. None: as the run was validated, else best."""
    short_side: int | None = None
    """Pixels of the image's short side at scale 1. 0: as many as it has. None: as the run was trained, else 0."""
    long_side: int | None = None
    """Pixels of its long side at scale 1, in place of `short_side`. 0: as many as it has. None: as the run was trained,
    unless a short side is given; else 0."""
    amp: Amp | None = None
    """Autocast to bfloat16; auto does on CUDA, and on CPUs with AVX512-BF16 or AMX. None: as the run was trained, else
    auto."""
    compile: Compile = "auto"
    """torch.compile of the network, for at most 8 sizes of its input. on: those that come first, which pays for many
    images of few sizes. auto: on CUDA, those that come 100 times. off: none."""

    def __post_init__(self) -> None:
        chosen = self.chosen()
        if "window" not in chosen:
            chosen.pop("window_stride", None)  # the trained window is not known yet
        InferenceConfig(**chosen)  # raises ValueError for values that no model allows

    def chosen(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


# The options that a run fixes for its model: those that may be left open.
PROTOCOL = tuple(field.name for field in fields(InferenceOptions) if field.default is None)


def resolve(options: InferenceOptions, model: SegmentationModel) -> InferenceConfig:
    """Fill in what `options` leave open: as the model was trained (`preprocessing`), else by default.

    Every command and `Segmenter` come here once, so that all of them see images in the same way.

    Raises:
        ValueError: an option does not fit what the model's `preprocessing` says.
    """
    chosen = options.chosen()
    trained = {name: model.preprocessing[name] for name in PROTOCOL if name in model.preprocessing}
    if "window" in chosen:
        trained.pop("window_stride", None)  # it belongs to the trained window
    for name, other in (("short_side", "long_side"), ("long_side", "short_side")):
        if chosen.get(name):
            trained.pop(other, None)
    values = {**trained, **chosen}
    if not model.refines:
        values["refine"] = False
    return InferenceConfig(**values)


def infer(model: SegmentationModel, images: Tensor, config: InferenceConfig) -> UNEPTOutput | AveragedOutput:
    """Maps of the model for images, averaged over all views.

    The maps cover the image padded right and below to multiples of 8, as `unept.model.output.class_ids` expects.

    Args:
        model: in any mode; it is evaluated in `eval()` and left as it was.
        images: (B, 3, H, W) or (3, H, W), as `UNEPT.forward` takes them, on the model's device.
        config: the views.

    Returns:
        What the model gives where the image itself is the only view. Otherwise averaged probabilities, at the strides
        of the network on the largest view. B is 1 for a single image.
    """
    if images.dim() == 3:
        images = images[None]
    with evaluation_mode(model), _autocast(model, images.device.type, config.amp):
        if _is_plain(images, config) or not len(images):
            return _run(model, images, config)
        padded = _pad(model.normalized(images))
        padded = padded if padded.dtype == torch.float64 else padded.float()  # a CPU does not resize half precision
        sizes = _view_sizes(padded, config.resize_ratio(*images.shape[2:]), config.scales)
        total: Maps = []
        for size in sizes:
            maps = _view_probabilities(model, _resize(padded, size), config)
            canvases = _canvases(maps, size, max(sizes), padded.shape[2:])
            resized = [_resize(m, canvas) for m, canvas in zip(maps, canvases, strict=True)]
            total = [a.add_(m) for a, m in zip(total, resized, strict=True)] if total else resized
        return averaged_output([m.div_(len(sizes)) for m in total])


def predict_ids(model: SegmentationModel, images: Tensor, config: InferenceConfig) -> Tensor:
    """Class ids (B, H, W) int64 of images (B, 3, H, W) or (3, H, W), refined as `config` says; see `infer`.

    Raises:
        FloatingPointError: the prediction holds NaN.
    """
    output = infer(model, images, config)
    require_numbers(output.scores)
    return class_ids(output, images.shape[-2:], config.refinement)


class Prediction(NamedTuple):
    """What the views say about every pixel of images (B, 3, H, W)."""

    ids: Tensor
    """(B, H, W) int64: the class ids of `predict_ids`."""
    confidence: Tensor
    """(B, H, W) float32: the probability of that class where the prediction was read, averaged over the views."""
    boundary: Tensor | None
    """(B, H, W) float32: probability of "closer to another class than 5 pixels"; None without a spatial branch."""


def predict(model: SegmentationModel, images: Tensor, config: InferenceConfig) -> Prediction:
    """Class ids, their confidence and boundaries of images (B, 3, H, W) or (3, H, W); see `infer`.

    Raises:
        FloatingPointError: the prediction holds NaN.
    """
    output = infer(model, images, config)
    require_numbers(output.scores)
    size = images.shape[-2:]
    ids, confidence = read_prediction(output, size, config)
    return Prediction(ids, confidence, boundary_probability(output, size))


def read_prediction(output: DenseOutput, size: Sequence[int], config: InferenceConfig) -> tuple[Tensor, Tensor]:
    """Class ids (B, H, W) int64 of images of `size` (H, W), and their probability (B, H, W) float32 there.

    Args:
        output: result of `infer`.
        size: (H, W) of the images.
        config: how boundary pixels are refined.
    """
    padded = padded_size(size)
    offset = read_offset(output, padded, config.refinement)
    ids = upsample_argmax(output.scores, padded, offset)
    confidence = output.confidence(ids, offset)
    return ids[:, : size[0], : size[1]], confidence[:, : size[0], : size[1]]


def _autocast(model: SegmentationModel, device_type: str, amp: Amp) -> torch.autocast:
    """Autocast of float32 weights; others compute in their own dtype, which autocast would mix with bfloat16."""
    is_float32 = getattr(model, "dtype", torch.float32) == torch.float32
    return torch.autocast(device_type, torch.bfloat16, enabled=is_float32 and uses_bfloat16(amp, device_type))


def _run(model: SegmentationModel, images: Tensor, config: InferenceConfig) -> UNEPTOutput:
    """Pass images (B, 3, H, W) through the network, compiled if `config` says so; all views and windows come here.

    On CUDA, and in bfloat16 on CPUs, they are channels-last in memory, as convolutions read them there.
    """
    if images.is_cuda or torch.is_autocast_enabled(images.device.type):
        images = images.to(memory_format=torch.channels_last)
    return call_compiled(model, images, config.compile)


def _is_plain(images: Tensor, config: InferenceConfig) -> bool:
    """Whether the image itself is the only view."""
    height, width = images.shape[2:]
    return (
        config.scales == (1.0,)
        and not config.flip
        and config.resize_ratio(height, width) == 1
        and (not config.window or max(height, width) <= config.window)
    )


def _pad(images: Tensor) -> Tensor:
    """Pad normalised images right and below with the mean colour (zero) to multiples of 8, as the network does."""
    height, width = padded_size(images.shape[2:])
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))


def _view_sizes(padded: Tensor, ratio: float, scales: Sequence[float]) -> list[tuple[int, int]]:
    """(height, width) of the padded image at every scale, multiples of 8; `ratio` is its size at scale 1."""
    unit = ratio / STRIDE
    height, width = padded.shape[2:]
    return [
        (max(1, int(height * unit * s + 0.5)) * STRIDE, max(1, int(width * unit * s + 0.5)) * STRIDE) for s in scales
    ]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=True)


Maps = list[Tensor]
"""Probabilities of one or several views, float32: of the classes (B, K, h, w); and, if they are predicted, of the
boundary and the m directions in one tensor (B, 1 + m, h', w')."""


def _canvases(
    maps: Maps, size: tuple[int, int], largest: tuple[int, int], image: Sequence[int]
) -> list[tuple[int, int]]:
    """(h, w) on which the maps of a view of `size` are summed: the size that the `largest` view's maps have.

    Boundaries and directions finer than 1/8 have at most the size of the padded `image`, at which they will be read.
    """
    strides = [size[0] // m.shape[2] for m in maps]
    canvases = [(largest[0] // stride, largest[1] // stride) for stride in strides]
    if strides[-1] < STRIDE and len(maps) == 2:
        canvases[1] = (min(canvases[1][0], image[0]), min(canvases[1][1], image[1]))
    return canvases


def _probabilities(model: SegmentationModel, images: Tensor, config: InferenceConfig) -> Maps:
    """Maps of images (B, 3, 8 h, 8 w), averaged with those of their mirror images if `config` flips."""
    if not config.flip:
        return _as_maps(_run(model, images, config))
    both = [m.chunk(2) for m in _as_maps(_run(model, torch.cat([images, images.flip(-1)]), config))]
    mirrored = _unmirror([b for _, b in both])
    return [(a + b) / 2 for (a, _), b in zip(both, mirrored, strict=True)]


def _unmirror(maps: Maps) -> Maps:
    """Mirror the maps of a mirrored view back: places and directions."""
    maps = [m.flip(-1) for m in maps]
    for edges in maps[1:]:
        edges[:, 1:] = edges[:, 1:][:, mirrored_directions(edges.shape[1] - 1)]
    return maps


def _view_probabilities(model: SegmentationModel, view: Tensor, config: InferenceConfig) -> Maps:
    """Maps of a view (B, 3, 8 h, 8 w), seen whole or through windows.

    The windows are mirrored one by one: a mirrored view would take the memory of a second one.
    """
    height, width = view.shape[2:]
    if not config.window or max(height, width) <= config.window:
        return _probabilities(model, view, config)
    rows, columns = min(config.window, height), min(config.window, width)
    corners = [
        (b, y, x)
        for b in range(len(view))
        for y in window_starts(height, rows, config.window_stride)
        for x in window_starts(width, columns, config.window_stride)
    ]
    total: Maps = []
    count = torch.zeros(len(view), 1, height // STRIDE, width // STRIDE, device=view.device)
    step = max(1, config.window_batch // 2) if config.flip else config.window_batch  # mirrored ones go along
    for start in range(0, len(corners), step):
        batch = corners[start : start + step]
        crops = torch.stack([view[b, :, y : y + rows, x : x + columns] for b, y, x in batch])
        maps = _probabilities(model, crops, config)
        if not total:
            total = [_zeros_of_view(m, view, rows) for m in maps]
        ones = count.new_ones(len(batch), 1, rows // STRIDE, columns // STRIDE)
        for canvas, m in zip([*total, count], [*maps, ones], strict=True):
            stride = rows // m.shape[2]
            for (b, y, x), window in zip(batch, m, strict=True):
                top, left = y // stride, x // stride
                canvas[b, :, top : top + m.shape[2], left : left + m.shape[3]] += window
    return [m / F.interpolate(count, m.shape[2:]) for m in total]


def _zeros_of_view(maps: Tensor, view: Tensor, rows: int) -> Tensor:
    """A canvas for a whole view (B, 3, 8 h, 8 w), at the stride that `maps` have of windows with so many rows."""
    stride = rows // maps.shape[2]
    return maps.new_zeros(len(view), maps.shape[1], view.shape[2] // stride, view.shape[3] // stride)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of windows that cover 0..length - 1 from end to end; the last is shifted inwards to fit."""
    return [*range(0, length - window, stride), length - window]


def window_maps(model: SegmentationModel, windows: Tensor, config: InferenceConfig) -> Maps:
    """Probabilities of normalised windows (B, 3, 8 h, 8 w), mirrored ones included if `config` flips."""
    with evaluation_mode(model), _autocast(model, windows.device.type, config.amp):
        return _probabilities(model, windows, config)


def _as_maps(output: UNEPTOutput) -> Maps:
    """The probabilities of a view."""
    maps = [output.logits.float().softmax(dim=1)]
    if output.boundary is not None and output.direction is not None:
        maps.append(torch.cat([output.boundary.float().sigmoid(), output.direction.float().softmax(dim=1)], dim=1))
    return maps


def averaged_output(maps: Maps) -> AveragedOutput:
    """Averages of the views' probabilities as an output."""
    if len(maps) == 1:
        return AveragedOutput(maps[0], None, None)
    return AveragedOutput(maps[0], *maps[1].split([1, maps[1].shape[1] - 1], dim=1))
