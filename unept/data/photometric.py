"""Photometric distortion in two halves: parameters are drawn with each sample, images are distorted as a batch.

The pixels are changed where the network runs, all samples at once, so that the loader's processes spend no time on it.
The parameters come from each sample's own seed, so that a run still repeats.

Letters: B batch, H, W height and width of the images, P = `NUM_PARAMS`. Parameters are float32 (B, P). Their columns:
    0..2  factors of brightness, contrast and saturation; 1 where none was drawn
    3     shift of the hue in turns; 0 where none was drawn
    4     1 if contrast comes last, 0 if it comes before saturation
    5, 6  height and width of the image without its padding, which lies right and below
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

NUM_PARAMS = 7
GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


class DrawDistortion(v2.RandomPhotometricDistort):
    """Append a sample's distortion parameters, float32 (P,), to `(image, mask)`; comes before any padding.

    Image and mask stay as they are. Brightness, contrast, saturation and hue are drawn with probability 0.5 each, in
    the ranges and the order of SSD (Liu et al., "SSD: Single Shot MultiBox Detector", 2016). Channels are not permuted,
    because colors tell classes apart.
    """

    def forward(self, *inputs: Any) -> Any:
        """`(image, mask)` to `(image, mask, params)`."""
        drawn = self.make_params(list(inputs))
        factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]
        params = [1.0 if factor is None else factor for factor in factors]
        params += [drawn["hue_factor"] or 0.0, float(not drawn["contrast_before"]), *F.get_size(inputs[0])]
        return *inputs, torch.tensor(params)


def distort(images: Tensor, params: Tensor) -> Tensor:
    """Distort images as torchvision's functions of the same factors do; padding keeps its color.

    Nothing is copied to the host, and `torch.compile` makes few kernels of it. Each step rounds down, as torchvision's
    does, so that the two differ by rounding alone.

    Args:
        images: uint8 (B, 3, H, W), padded right and below.
        params: float32 (B, P), as described at the top of this file, on the same device.

    Returns:
        uint8 (B, 3, H, W).

    Raises:
        TypeError: if images are not uint8.
        ValueError: if the shapes don't fit together.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images have dtype {images.dtype}; colors are distorted before normalisation, as uint8")
    if images.dim() != 4 or images.shape[1] != 3 or params.shape != (len(images), NUM_PARAMS):
        raise ValueError(
            f"images have shape {tuple(images.shape)} and params {tuple(params.shape)}; they must be "
            f"(B, 3, H, W) and (B, {NUM_PARAMS})"
        )
    # Each is (B, 1, 1, 1).
    brightness, contrast, saturation, hue, is_last, height, width = params.reshape(-1, NUM_PARAMS, 1, 1, 1).unbind(1)
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    mask = (rows[:, None] < height) & (columns < width)  # (B, 1, H, W): the pixels that are not padding
    area = height * width
    is_first = is_last == 0

    pixels = images.to(torch.float32)
    out = _quantize(pixels * brightness)
    out = _adjust_contrast(out, torch.where(is_first, contrast, 1.0), mask, area)
    out = _blend(out, _to_gray(out), saturation)
    out = torch.where(hue == 0, out, _shift_hue(out, hue))
    out = _adjust_contrast(out, torch.where(is_first, 1.0, contrast), mask, area)
    return torch.where(mask, out, pixels).to(torch.uint8)


def _quantize(pixels: Tensor) -> Tensor:
    """Round down to whole levels in 0..255."""
    return pixels.clamp(0, 255).trunc()


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Mix `pixels`, which a factor of 1 leaves exactly as they are, with `other`, which a factor of 0 gives."""
    return _quantize(pixels * factor + other * (1 - factor))


def _to_gray(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * GRAY[0] + green * GRAY[1] + blue * GRAY[2]).trunc()


def _adjust_contrast(pixels: Tensor, factor: Tensor, mask: Tensor, area: Tensor) -> Tensor:
    """Blend with the mean gray of the pixels in `mask`, of which there are `area`."""
    mean = torch.where(mask, _to_gray(pixels), 0.0).sum(dim=(1, 2, 3), keepdim=True) / area
    return _blend(pixels, mean, factor)


def _shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Move the hue by `shift` turns, and keep value and chroma."""
    red, green, blue = pixels.split(1, dim=1)
    low, high = pixels.aminmax(dim=1, keepdim=True)
    chroma = high - low
    divisor = torch.where(chroma == 0, 1.0, chroma)
    # In sixths of a turn from red. Where all three are equal, any hue will do, as chroma is zero.
    of_red, of_green, of_blue = (green - blue) / divisor, 2 + (blue - red) / divisor, 4 + (red - green) / divisor
    hue = torch.where(high == red, of_red, torch.where(high == green, of_green, of_blue)) + 6 * shift
    # A channel falls from the highest value to the lowest over one sixth, and stays there over two of the six.
    sixths = [torch.remainder(hue + n, 6) for n in (5, 3, 1)]
    shares = torch.cat([torch.minimum(k, 4 - k).clamp(0, 1) for k in sixths], dim=1)
    # As torchvision turns shares of 1 into 0..255: up to 0.004 below a whole number counts as that number.
    return _quantize((high - chroma * shares) * (255.999 / 255))
