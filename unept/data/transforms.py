"""Training and evaluation transforms (Sec. 4.2), on uint8 tv_tensors.

Each takes and returns `(image, mask)`: a `tv_tensors.Image`, uint8 (3, H, W), and a `tv_tensors.Mask`, uint8 (H, W).
Randomness comes from torch's global generator. Colors are distorted later, on the device (`photometric`), and the model
normalises by its backbone's mean and std.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .base import IGNORE_INDEX
from .photometric import DrawDistortion

MEAN_COLOR = (124, 116, 104)  # of ImageNet: what becomes zero when an image is normalised
CROP_TRIES = 10


def train_transform(
    crop_size: int | tuple[int, int],
    short_side: int | None = None,
    scale: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    flip: bool = True,
    photometric: bool = True,
    fill: Sequence[int] = MEAN_COLOR,
    long_side: int | None = None,
) -> v2.Compose:
    """Random scale, random crop, horizontal flip and padding to the crop size; parameters of a photometric distortion.

    Args:
        crop_size: the size of the result in pixels, (height, width) or one int for both.
        short_side: the size in pixels that `scale` 1 brings an image's shorter side to; None keeps its own.
        scale: the smallest and the largest random scale, uniform in between.
        cat_max_ratio: draw up to 10 crops until every class has less than this share of the pixels that count; 1 or
            more takes the first crop.
        flip: mirror half of the images.
        photometric: return `(image, mask, params)`, with which `photometric.distort` changes brightness, contrast,
            saturation and hue of the batch.
        fill: (r, g, b) of the padding right of and below a small image; the mask is padded with 255.
        long_side: the size in pixels that `scale` 1 brings an image's longer side to, in place of `short_side`.

    Raises:
        ValueError: if crop_size, short_side, long_side or scale is not positive, scale's bounds are swapped, or both
            sides are given.
    """
    size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    steps: list[v2.Transform] = [RandomScaledCrop(size, short_side, scale, cat_max_ratio, long_side)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if photometric:
        steps.append(DrawDistortion())
    steps.append(PadTo(size, fill))
    return v2.Compose(steps)


def eval_transform(short_side: int | None = None) -> v2.Transform:
    """Resize the image's shorter side to `short_side`; None resizes nothing. The mask keeps its size in either case."""
    return v2.Identity() if short_side is None else ResizeImage(short_side)


class Span(NamedTuple):
    """One axis of a crop that is also resampled: `size` pixels that cover `step` pixels of the image each.

    The first one begins at the image's pixel `start`.
    """

    start: int
    step: float
    size: int

    def source(self, length: int) -> slice:
        """The image's pixels that interpolation reads for the crop, on an axis of `length` pixels."""
        return slice(self.start, min(length, self.start + ceil((self.size + 1) * self.step) + 1))

    def nearest(self, length: int) -> np.ndarray:
        """The index of the image's pixel at the centre of each pixel of the crop, on an axis of `length` pixels."""
        centres = self.start + (np.arange(self.size) + 0.5) * self.step
        return np.minimum(centres.astype(np.int64), length - 1)


def scaled_crop(image: Tensor, rows: Span, columns: Span) -> Tensor:
    """Crop a resized image, uint8 (3, H, W) to (3, rows.size, columns.size), without resizing all of it.

    Interpolation is bilinear with antialiasing. Pixels before the first row and column are not read, as at an image's
    border.
    """
    source = image[:, rows.source(image.shape[1]), columns.source(image.shape[2])]
    # interpolate rounds the size down: one billionth more keeps it from falling short of the crop.
    factors = (1 / rows.step * (1 + 1e-9), 1 / columns.step * (1 + 1e-9))
    # Channels innermost, as decoders give them: torch fails on others where the result is a single pixel.
    source = source[None].contiguous(memory_format=torch.channels_last)
    resized = interpolate(source, scale_factor=factors, mode="bilinear", antialias=True)[0]
    return resized[:, : rows.size, : columns.size].contiguous()


def scaled_mask_crop(mask: Tensor, rows: Span, columns: Span) -> Tensor:
    """Crop a resized mask, uint8 (H, W) to (rows.size, columns.size): each pixel takes the nearest to its centre."""
    # NumPy's take is several times as fast on uint8 as torch's index_select.
    taken = mask.numpy().take(rows.nearest(mask.shape[0]), 0).take(columns.nearest(mask.shape[1]), 1)
    return torch.from_numpy(taken)


class RandomScaledCrop(v2.Transform):
    """Scale at random, then crop at random, trying again while one class fills too much of the pixels that count.

    The scale is relative to the size at which the shorter side is `short_side` or the longer one `long_side`, or to the
    image's own size where both are None.
    The tenth crop is taken as it is. A side that is smaller than the crop stays whole. Only what the crop shows is
    resampled; therefore its corner lies on a corner of one of the image's own pixels.
    """

    def __init__(
        self,
        size: tuple[int, int],
        short_side: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        long_side: int | None = None,
    ):
        super().__init__()
        if short_side is not None and long_side is not None:
            raise ValueError(f"short_side is {short_side} and long_side {long_side}; give one of them")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {scale}; give (smallest, largest), both above 0")
        _require_positive("crop_size", *size)
        _require_positive("short_side", short_side)
        _require_positive("long_side", long_side)
        self.size = size
        self.short_side, self.long_side = short_side, long_side
        self.scale = scale
        self.cat_max_ratio = cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the scale and the crop: its `Span`s `rows` and `columns`, and the cropped `mask`."""
        (mask,) = (item.as_subclass(Tensor) for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        factor = torch.empty(()).uniform_(*self.scale).item()
        if self.short_side is not None:
            factor *= self.short_side / min(mask.shape)
        if self.long_side is not None:
            factor *= self.long_side / max(mask.shape)
        axes = [
            (length, *_scale_axis(length, factor, crop)) for length, crop in zip(mask.shape, self.size, strict=True)
        ]
        for _ in range(CROP_TRIES):
            rows, columns = (
                Span(int(torch.randint(int(length - size * step) + 1, ())), step, size) for length, step, size in axes
            )
            cropped = scaled_mask_crop(mask, rows, columns)
            if self.cat_max_ratio >= 1 or self.is_varied(cropped):
                break
        return {"rows": rows, "columns": columns, "mask": cropped}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one input."""
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(params["mask"], like=inpt)
        return tv_tensors.wrap(scaled_crop(inpt.as_subclass(Tensor), params["rows"], params["columns"]), like=inpt)

    def is_varied(self, mask: Tensor) -> bool:
        """Whether every class has less than `cat_max_ratio` of the pixels of a mask (H, W) that count."""
        counts = torch.bincount(mask.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        return bool(counts.max() < self.cat_max_ratio * counts.sum())


def _scale_axis(length: int, factor: float, crop: int) -> tuple[float, int]:
    """The step and size of the `Span` on an axis of `length` pixels that is scaled by `factor` and then cropped."""
    scaled = max(1, round(length * factor))
    if abs(scaled - length) * min(crop, length) < length:
        # Over the whole crop the scale moves no pixel by one. torch leaves such an axis alone, and the mask must match.
        scaled = length
    return length / scaled, min(crop, scaled)


class PadTo(v2.Transform):
    """Pad right and below to `size`: the image with color `fill`, the mask with 255."""

    def __init__(self, size: tuple[int, int], fill: Sequence[int] = MEAN_COLOR):
        super().__init__()
        self.size = size
        self.fill = fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad one input."""
        height, width = inpt.shape[-2:]
        if height >= self.size[0] and width >= self.size[1]:
            return inpt
        padded = torch.empty(*inpt.shape[:-2], max(height, self.size[0]), max(width, self.size[1]), dtype=inpt.dtype)
        if isinstance(inpt, tv_tensors.Mask):
            padded.fill_(IGNORE_INDEX)
        else:
            for channel, value in zip(padded, self.fill, strict=True):
                channel.fill_(value)
        padded[..., :height, :width] = inpt
        return tv_tensors.wrap(padded, like=inpt)


class ResizeImage(v2.Transform):
    """Resize the image's shorter side to `short_side`; the mask stays as it is."""

    def __init__(self, short_side: int):
        super().__init__()
        _require_positive("short_side", short_side)
        self.short_side = short_side

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input."""
        return inpt if isinstance(inpt, tv_tensors.Mask) else F.resize(inpt, [self.short_side], antialias=True)


def _require_positive(name: str, *values: int | None) -> None:
    """Raise ValueError if any of the values is neither None nor at least 1."""
    for value in values:
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
