"""Training and evaluation transforms (Sec. 4.2), on uint8 tv_tensors.

Each takes `(image, mask)`: a `tv_tensors.Image`, uint8 (3, H, W), and a `tv_tensors.Mask`, uint8 (H, W), and gives the
same. Randomness comes from torch's global generator. Normalisation is the model's, by its backbone's mean and std.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .base import IGNORE_INDEX

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
    """Random scale, random crop, horizontal flip, photometric distortion, padding to the crop size.

    Args:
        crop_size: of the result, (height, width) or one int for both.
        short_side: the size that `scale` 1 brings an image's shorter side to; None: its own.
        scale: the smallest and the largest random scale, uniform in between.
        category_cap: draw up to 10 crops until no class has this share of the pixels that count; 1 or more: the first.
        flip: mirror half of the images.
        photometric: distort brightness, contrast, saturation and hue.
        fill: (r, g, b) of the padding right of and below a small image; the mask is padded with 255.

    Raises:
        ValueError: if crop_size, short_side or scale is not positive, or scale's bounds are swapped.
    """
    height, width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    steps: list[v2.Transform] = [
        RandomShortSide(short_side, scale),
        CategoryCapCrop((height, width), category_cap),
    ]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if photometric:
        steps.append(PhotometricDistortion())
    steps.append(PadTo((height, width), fill))
    return v2.Compose(steps)


def eval_transform(short_side: int | None = None) -> v2.Transform:
    """Resize the image's shorter side to `short_side`, or nothing if None. The mask keeps its size in either case."""
    return v2.Identity() if short_side is None else ResizeImage(short_side)


class RandomShortSide(v2.Transform):
    """Scale image and mask by one random factor, relative to the size where the shorter side is `short_side`.

    The image is resampled bilinearly with antialiasing; the mask takes the nearest pixel by centres, so that it is not
    shifted against the image.
    """

    def __init__(self, short_side: int | None = None, scale: tuple[float, float] = (0.5, 2.0)):
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {scale}; give (smallest, largest), both above 0")
        self.short_side = _positive("short_side", short_side)
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        height, width = F.get_size(flat_inputs[0])
        factor = torch.empty(()).uniform_(*self.scale).item()
        if self.short_side is not None:
            factor *= self.short_side / min(height, width)
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input."""
        if isinstance(inpt, tv_tensors.Mask):
            # v2's own mask resize is mode="nearest", which rounds down: up to half a pixel off the image.
            resized = interpolate(inpt.as_subclass(torch.Tensor)[None, None], params["size"], mode="nearest-exact")
            return tv_tensors.wrap(resized[0, 0], like=inpt)
        return F.resize(inpt, params["size"], antialias=True)


class CategoryCapCrop(v2.Transform):
    """Crop at random, trying again while one class fills `category_cap` or more of the pixels that count.

    The tenth crop is taken as it is. A side that is smaller than the crop stays whole.
    """

    def __init__(self, size: tuple[int, int], category_cap: float = 0.75):
        super().__init__()
        self.height, self.width = (_positive("crop_size", side) for side in size)
        self.category_cap = category_cap

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the crop."""
        (mask,) = (item for item in flat_inputs if isinstance(item, tv_tensors.Mask))
        height, width = F.get_size(mask)
        box = {"height": min(self.height, height), "width": min(self.width, width)}
        for _ in range(CROP_TRIES):
            box["top"] = int(torch.randint(height - box["height"] + 1, ()))
            box["left"] = int(torch.randint(width - box["width"] + 1, ()))
            if self.category_cap >= 1 or self._is_varied(F.crop(mask, **box)):
                break
        return box

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one input."""
        return F.crop(inpt, **params)

    def _is_varied(self, mask: torch.Tensor) -> bool:
        counts = torch.bincount(mask.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        return bool(counts.max() < self.category_cap * counts.sum())


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue, each with probability 0.5, in the ranges and the order of SSD.

    (Liu et al., "SSD: Single Shot MultiBox Detector", 2016.) Channels are not permuted: colour tells classes apart.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the strengths."""
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class PadTo(v2.Transform):
    """Pad right and below to `size`: the image with colour `fill`, the mask with 255."""

    def __init__(self, size: tuple[int, int], fill: Sequence[int] = MEAN_COLOUR):
        super().__init__()
        self.size = size
        self.fill = fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad one input."""
        height, width = F.get_size(inpt)
        padding = [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]
        return F.pad(inpt, padding, fill=IGNORE_INDEX if isinstance(inpt, tv_tensors.Mask) else list(self.fill))


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
