"""Training and evaluation transforms (Sec. 4.2), on uint8 tv_tensors.

Each takes `(image, mask)`: a `tv_tensors.Image`, uint8 (3, H, W), and a `tv_tensors.Mask`, uint8 (H, W), and gives the
same. Randomness comes from torch's global generator. Colours are distorted later, on the device (`photometric`), and
normalisation is the model's, by its backbone's mean and std.
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

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: what a normalised image holds zero for
CROP_TRIES = 10


def train_transform(
    crop_size: int | tuple[int, int],
    short_side: int | None = None,
    scale: tuple[float, float] = (0.5, 2.0),
    category_cap: float = 0.75,
    flip: bool = True,
    photometric: bool = True,
    fill: Sequence[int] = MEAN_COLOUR,
) -> v2.Compose:
    """Random scale, random crop, horizontal flip, padding to the crop size; strengths of a photometric distortion.

    Args:
        crop_size: of the result, (height, width) or one int for both.
        short_side: the size that `scale` 1 brings an image's shorter side to; None: its own.
        scale: the smallest and the largest random scale, uniform in between.
        category_cap: draw up to 10 crops until no class has this share of the pixels that count; 1 or more: the first.
        flip: mirror half of the images.
        photometric: give `(image, mask, strengths)`, for `photometric.distort` to change brightness, contrast,
            saturation and hue of the batch.
        fill: (r, g, b) of the padding right of and below a small image; the mask is padded with 255.

    Raises:
        ValueError: if crop_size, short_side or scale is not positive, or scale's bounds are swapped.
    """
    size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    steps: list[v2.Transform] = [RandomScaledCrop(size, short_side, scale, category_cap)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if photometric:
        steps.append(DrawDistortion())
    steps.append(PadTo(size, fill))
    return v2.Compose(steps)


def eval_transform(short_side: int | None = None) -> v2.Transform:
    """Resize the image's shorter side to `short_side`, or nothing if None. The mask keeps its size in either case."""
    return v2.Identity() if short_side is None else ResizeImage(short_side)


class Span(NamedTuple):
    """One axis of a crop that is also resampled: `size` pixels, `step` pixels of the image each, from `start` on."""

    start: int
    step: float
    size: int

    def source(self, length: int) -> slice:
        """The image's pixels that the crop's are made of, on an axis of `length`; at least what interpolation reads."""
        return slice(self.start, min(length, self.start + ceil((self.size + 1) * self.step) + 1))

    def nearest(self, length: int) -> np.ndarray:
        """The image's pixel at the centre of each of the crop's."""
        centres = self.start + (np.arange(self.size) + 0.5) * self.step
        return np.minimum(centres.astype(np.int64), length - 1)


def scaled_crop(image: Tensor, rows: Span, columns: Span) -> Tensor:
    """A crop of a resized image, uint8 (3, H, W) to (3, rows.size, columns.size), without resizing all of it.

    Bilinear with antialiasing. Pixels before the first row and column are not looked at, as at an image's border.
    """
    source = image[:, rows.source(image.shape[1]), columns.source(image.shape[2])]
    # One billionth: the size below is rounded down, and must not fall short of the crop.
    factors = (1 / rows.step * (1 + 1e-9), 1 / columns.step * (1 + 1e-9))
    # Channels innermost, as decoders give them: torch fails on others where the result is a single pixel.
    source = source[None].contiguous(memory_format=torch.channels_last)
    resized = interpolate(source, scale_factor=factors, mode="bilinear", antialias=True)[0]
    return resized[:, : rows.size, : columns.size].contiguous()


def scaled_mask_crop(mask: Tensor, rows: Span, columns: Span) -> Tensor:
    """The same of a mask, uint8 (H, W): each pixel takes the nearest by centres, so that none is shifted."""
    # NumPy's take is several times as fast on uint8 as torch's index_select.
    taken = mask.numpy().take(rows.nearest(mask.shape[0]), 0).take(columns.nearest(mask.shape[1]), 1)
    return torch.from_numpy(taken)


class RandomScaledCrop(v2.Transform):
    """Scale at random, then crop at random, trying again while one class fills too much of the pixels that count.

    The scale is relative to the size where the shorter side is `short_side`, None: the image's own. The tenth crop is
    taken as it is. A side that is smaller than the crop stays whole. Only what the crop shows is resampled; for that
    its corner lies on a corner of one of the image's own pixels.
    """

    def __init__(
        self,
        size: tuple[int, int],
        short_side: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        category_cap: float = 0.75,
    ):
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {scale}; give (smallest, largest), both above 0")
        self.size = tuple(_positive("crop_size", side) for side in size)
        self.short_side = _positive("short_side", short_side)
        self.scale = scale
        self.category_cap = category_cap

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the scale and the crop, and take the mask's."""
        (mask,) = (item.as_subclass(Tensor) for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        factor = torch.empty(()).uniform_(*self.scale).item()
        if self.short_side is not None:
            factor *= self.short_side / min(mask.shape)
        axes = [(length, *_scaled(length, factor, crop)) for length, crop in zip(mask.shape, self.size, strict=True)]
        for _ in range(CROP_TRIES):
            rows, columns = (
                Span(int(torch.randint(int(length - size * step) + 1, ())), step, size) for length, step, size in axes
            )
            cropped = scaled_mask_crop(mask, rows, columns)
            if self.category_cap >= 1 or self._is_varied(cropped):
                break
        return {"rows": rows, "columns": columns, "mask": cropped}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one input."""
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(params["mask"], like=inpt)
        return tv_tensors.wrap(scaled_crop(inpt.as_subclass(Tensor), params["rows"], params["columns"]), like=inpt)

    def _is_varied(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        return bool(counts.max() < self.category_cap * counts.sum())


def _scaled(length: int, factor: float, crop: int) -> tuple[float, int]:
    """A `Span`'s step and size on an axis of `length` that is scaled and then cropped."""
    scaled = max(1, round(length * factor))
    if abs(scaled - length) * min(crop, length) < length:
        # Over the crop it moves no pixel by one: torch would take such an axis as it is, and the mask must match it.
        scaled = length
    return length / scaled, min(crop, scaled)


class PadTo(v2.Transform):
    """Pad right and below to `size`: the image with colour `fill`, the mask with 255."""

    def __init__(self, size: tuple[int, int], fill: Sequence[int] = MEAN_COLOUR):
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
        self.short_side = _positive("short_side", short_side)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input."""
        return inpt if isinstance(inpt, tv_tensors.Mask) else F.resize(inpt, [self.short_side], antialias=True)


def _positive(name: str, value: int | None) -> Any:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value
