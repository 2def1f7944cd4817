"""Photometric distortion in two halves: the strengths are drawn with the sample, the images distorted as a batch.

The pixels are changed where the network runs, all samples at once, so that no worker spends time on it; the strengths
come from each sample's own seed, so that a run still repeats. Letters: B batch, H, W height and width of the images.

Strengths are float32 (B, 7): brightness, contrast and saturation as factors, 1 where not drawn; hue as a shift in
turns, 0 where not drawn; 1 if contrast comes last, 0 if it comes before saturation; height and width of the image
without its padding, which lies right and below.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

STRENGTHS = 7
GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


class DrawDistortion(v2.RandomPhotometricDistort):
    """Append a sample's strengths, float32 (7,), to `(image, mask)`, which stay as they are; comes before any padding.

    Brightness, contrast, saturation and hue, each with probability 0.5, in the ranges and the order of SSD (Liu et al.,
    "SSD: Single Shot MultiBox Detector", 2016). Channels are not permuted: colour tells classes apart.
    """

    def forward(self, *inputs: Any) -> Any:
        """`(image, mask)` to `(image, mask, strengths)`."""
        drawn = self.make_params(list(inputs))
        factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]
        strengths = [1.0 if factor is None else factor for factor in factors]
        strengths += [drawn["hue_factor"] or 0.0, float(not drawn["contrast_before"]), *F.get_size(inputs[0])]
        return *inputs, torch.tensor(strengths)


def distort(images: Tensor, strengths: Tensor) -> Tensor:
    """Images distorted as torchvision's functions of the same strengths do, padding left as it is; uint8 (B, 3, H, W).

    No value comes to the host, and `torch.compile` makes few kernels of it. Rounds down after each of the steps, as
    torchvision does, so that the two differ by rounding alone.

    Args:
        images: uint8 (B, 3, H, W), padded right and below.
        strengths: float32 (B, 7), see above, on the same device.

    Raises:
        TypeError: images are not uint8.
        ValueError: the shapes don't belong together.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images have dtype {images.dtype}; colours are distorted before normalisation, as uint8")
    if images.dim() != 4 or images.shape[1] != 3 or strengths.shape != (len(images), STRENGTHS):
        raise ValueError(
            f"images have shape {tuple(images.shape)} and strengths {tuple(strengths.shape)}; they must be "
            f"(B, 3, H, W) and (B, {STRENGTHS})"
        )
    # Each (B, 1, 1, 1).
    brightness, contrast, saturation, hue, last, height, width = strengths.view(-1, STRENGTHS, 1, 1, 1).unbind(1)
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside = (rows[:, None] < height) & (columns < width)  # (B, 1, H, W)
    area = height * width
    first = last == 0

    pixels = images.to(torch.float32)
    out = _quantized(pixels * brightness)
    out = _with_contrast(out, torch.where(first, contrast, 1.0), inside, area)
    out = _blended(out, _gray(out), saturation)
    out = torch.where(hue == 0, out, _with_hue(out, hue))
    out = _with_contrast(out, torch.where(first, 1.0, contrast), inside, area)
    return torch.where(inside, out, pixels).to(torch.uint8)


def _quantized(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 255).trunc()


def _blended(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """`pixels` at factor 1, exactly, and `other` at 0."""
    return _quantized(pixels * factor + other * (1 - factor))


def _gray(pixels: Tensor) -> Tensor:
    """(B, 1, H, W)."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * GRAY[0] + green * GRAY[1] + blue * GRAY[2]).trunc()


def _with_contrast(pixels: Tensor, factor: Tensor, inside: Tensor, area: Tensor) -> Tensor:
    """Blended with the mean gray of the pixels inside, of which there are `area`."""
    mean = torch.where(inside, _gray(pixels), 0.0).sum(dim=(1, 2, 3), keepdim=True) / area
    return _blended(pixels, mean, factor)


def _with_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Hue moved by `shift` turns, value and chroma kept."""
    red, green, blue = pixels.split(1, dim=1)
    low, high = pixels.aminmax(dim=1, keepdim=True)
    chroma = high - low
    divisor = torch.where(chroma == 0, 1.0, chroma)
    # Sixths of a turn from red; where all three are equal, hue is anything, as chroma is zero.
    of_red, of_green, of_blue = (green - blue) / divisor, 2 + (blue - red) / divisor, 4 + (red - green) / divisor
    hue = torch.where(high == red, of_red, torch.where(high == green, of_green, of_blue)) + 6 * shift
    # A channel falls from the highest value to the lowest over one sixth, and stays there over two of the six.
    sixths = [torch.remainder(hue + n, 6) for n in (5, 3, 1)]
    shares = torch.cat([torch.minimum(k, 4 - k).clamp(0, 1) for k in sixths], dim=1)
    # As torchvision turns shares of 1 into 0..255: up to 0.004 below a whole number counts as that number.
    return _quantized((high - chroma * shares) * (255.999 / 255))
