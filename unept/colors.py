"""Class ids as colors, without matplotlib: palettes, overlays, and the image files that show them.

Letters: H, W height and width, K number of classes. A palette holds a color (r, g, b) per class, 0..255. Ids from 0 to
K - 1 are classes; pixels with any other id are ignored, and shown in black.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .files import temporary_file

Palette = Sequence[Sequence[int]]


def default_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """`num_classes` (r, g, b) colors, neighbours far apart: hues step by the golden ratio, brightness varies."""
    colors = []
    for k in range(num_classes):
        red, green, blue = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, (1.0, 0.7, 0.85)[k % 3])
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colors)


def colorize(ids: Tensor, palette: Palette) -> Tensor:
    """Turn class ids (H, W) of any integer dtype into their colors, uint8 (3, H, W)."""
    table = torch.zeros(len(palette) + 1, 3, dtype=torch.uint8, device=ids.device)
    table[:-1] = torch.tensor(palette, dtype=torch.uint8, device=ids.device)
    valid = (ids >= 0) & (ids < len(palette))
    return table[torch.where(valid, ids.long(), len(palette))].permute(2, 0, 1)


def as_rgb(image: Tensor) -> Tensor:
    """Show an image of any number of channels, (C, H, W), as (3, H, W): the first three, of fewer the first."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def overlay(image: Tensor, ids: Tensor, palette: Palette, alpha: float = 0.5) -> Tensor:
    """Mix an image with the colors of its class ids; ignored pixels stay as they are.

    Args:
        image: uint8 (3, H, W), RGB; of other numbers of channels, what `as_rgb` shows.
        ids: (H, W), any integer dtype, on the same device.
        palette: K colors.
        alpha: the weight of the colors, from 0 to 1.

    Returns:
        uint8 (3, H, W).
    """
    image = as_rgb(image)
    valid = (ids >= 0) & (ids < len(palette))
    mixed = image.float().lerp(colorize(ids, palette).float(), alpha).round().to(torch.uint8)
    return torch.where(valid, mixed, image)


def to_pil(picture: Tensor) -> Image.Image:
    """Convert a picture, uint8 (3, H, W), RGB, on any device, to a PIL image."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as the suffix of the path says, whole or not at all.

    Raises:
        OSError: the disk is full or not writable; the file that was there before, if any, is intact.
    """
    with temporary_file(path) as temporary:
        picture.save(temporary)


def save_palette_png(ids: Tensor, palette: Palette, path: Path) -> None:
    """Write class ids (H, W) as a PNG whose pixels are the ids (mode P) and whose palette shows them in color.

    Raises:
        ValueError: if an id does not fit into 8 bits.
        OSError: see `save_picture`.
    """
    if ids.numel() and (ids.min() < 0 or ids.max() > 255):
        raise ValueError(f"ids go from {int(ids.min())} to {int(ids.max())}; a palette PNG holds 0 to 255")
    picture = Image.fromarray(ids.to("cpu", torch.uint8).numpy())
    colors = torch.zeros(256, 3, dtype=torch.uint8)  # all 256: for a shorter palette PIL writes fewer bits per pixel
    colors[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    picture.putpalette(colors.numpy().tobytes())
    save_picture(picture, path)
