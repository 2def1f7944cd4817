"""Read images and labels from files: any mode in which people have them, of any size, or a message that says why not.

Letters: H, W height and width.
"""

import re
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .base import DatasetError

# Pixels of one image: as many as the kernels count, and 3 GiB of memory. PIL's own limit, a sixth of this, is against
# images that others upload; those of a local folder may be larger.
MAX_PIXELS = 1 << 30
MAX_LABEL_ID = (1 << 16) - 1
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")  # formats that change ids; lossless WebP and TIFF are told apart below

# What PIL raises for a file that is truncated or corrupt.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
_SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"P5", b"P6")
_opening = threading.Lock()


def open_image(path: Path) -> Image.Image:
    """Open an image file; its pixels are read later, by `decode`.

    Raises:
        DatasetError: if the file is missing or can't be opened, is no image, is damaged, or has more than 2**30 pixels;
            the message says which.
    """
    try:
        with _opening:  # PIL knows its limit only as a variable of its module
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except FileNotFoundError as error:
        raise DatasetError(f"{path} can't be read (there is no such file): check its name, or restore it") from error
    except UnidentifiedImageError as error:
        raise DatasetError(_not_an_image(path)) from error
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DatasetError(
                f"{path} can't be opened ({error.strerror}): it must be a file that you may read"
            ) from error
        raise DatasetError(_damaged(path, error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise DatasetError(_too_large(path, width, height))
    return image


def decode(image: Image.Image, path: Path | str) -> None:
    """Read the pixels of an image that `open_image` returned.

    Raises:
        DatasetError: if the file is truncated or corrupt, or does not fit into memory.
    """
    try:
        image.load()
    except MemoryError as error:
        raise DatasetError(_too_large(path, *image.size)) from error
    except DAMAGED as error:
        raise DatasetError(_damaged(path, error)) from error


def read_image(path: Path) -> Tensor:
    """Read an image as uint8 (3, H, W), RGB, upright as its EXIF tag says; transparency is dropped.

    Raises:
        DatasetError: see `open_image`, `decode` and `image_to_tensor`.
    """
    return read_channels_last(path).contiguous()


def read_channels_last(path: Path) -> Tensor:
    """As `read_image`, but with the channels innermost in memory, as PIL has them: resampling is faster on these."""
    with open_image(path) as image:
        return upright_tensor(image, path, in_place=True)


def upright_tensor(image: Image.Image, name: str | Path, in_place: bool = False) -> Tensor:
    """Convert a PIL image as `image_to_tensor` does, turned upright as its EXIF tag says.

    Args:
        image: the image, whose pixels may not have been read yet.
        name: what messages call it.
        in_place: whether `image` itself may be turned, which saves a copy.

    Raises:
        DatasetError: see `decode` and `image_to_tensor`; or the EXIF tag is damaged.
    """
    decode(image, name)
    try:
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
    except DAMAGED as error:
        raise DatasetError(_damaged(name, error)) from error
    return image_to_tensor(image, name)


def image_to_tensor(image: Image.Image, name: str | Path) -> Tensor:
    """Convert a PIL image of any mode to uint8 (3, H, W), RGB; transparency is dropped.

    Raises:
        DatasetError: if the image holds floating-point pixels; the message calls it `name`.
    """
    if image.mode == "F":
        raise DatasetError(f"{name} holds floating-point pixels: save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would clip at 255 instead of taking the high byte
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Labels


def read_label(path: Path, colors: bool = False) -> np.ndarray:
    """Read the ids of a label file as they are stored, or its colors.

    Gray files may have 1, 2, 4, 8 or 16 bits, and palette files any number of colors; an RGB file whose channels are
    equal is returned as it is, for the caller to decide.

    Args:
        path: the file.
        colors: return the colors of a palette file instead of its ids.

    Returns:
        Ids (H, W), uint8 or uint16, or colors (H, W, 3) uint8.

    Raises:
        DatasetError: see `open_image` and `decode`; if the file was compressed with loss; or if it holds neither ids
            from 0 to 65535 nor colors.
    """
    with open_image(path) as file:
        lossy = file.format in LOSSY or _is_lossy_container(file, path)
        rawmode = _rawmode(file)
        decode(file, path)
        if lossy:
            raise DatasetError(
                f"{path} was compressed with loss ({file.format}), which changes class ids at the edges: save labels "
                "as PNG, from their source"
            )
        if file.mode in ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr") or (colors and file.mode in ("P", "PA")):
            return np.array(file.convert("RGB"))
        pixels = np.array(file)
    if file.mode in ("LA", "PA"):
        pixels = pixels[..., 0]
    if file.mode not in ("1", "L", "P", "LA", "PA", "I") and not file.mode.startswith("I;16"):
        raise DatasetError(
            f"{path} has mode {file.mode}, but a label must hold one class id per pixel: save it as a gray or palette "
            "PNG"
        )
    return _unscaled(_in_16_bits(pixels, path), rawmode)


def _rawmode(image: Image.Image) -> str:
    """How the pixels lie in the file, in PIL's words, such as "L;4" for gray of 4 bits; empty if PIL does not say."""
    tile: Any = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _unscaled(pixels: np.ndarray, rawmode: str) -> np.ndarray:
    """Undo what PIL does to gray of few bits, which it stretches to 0..255, and to gray whose 0 is white."""
    kind = re.fullmatch(r"[1L](?:;([248]))?(I?)R?", rawmode)
    if kind is None:
        return pixels
    bits = 1 if rawmode[0] == "1" else int(kind[1] or 8)
    ids = pixels if bits in (1, 8) else pixels // (255 // ((1 << bits) - 1))
    return ((1 << bits) - 1 - ids).astype(np.uint8) if kind[2] else ids


def _in_16_bits(pixels: np.ndarray, path: Path) -> np.ndarray:
    """The ids as uint8 or uint16."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= MAX_LABEL_ID):
        raise DatasetError(
            f"{path} holds values from {pixels.min()} to {pixels.max()}; class ids go from 0 to {MAX_LABEL_ID}"
        )
    return pixels.astype(np.uint16)


def _is_lossy_container(image: Image.Image, path: Path) -> bool:
    """Whether a TIFF or WebP file, which may be either, was compressed with loss."""
    if image.format == "WEBP":
        with path.open("rb") as file:
            return b"VP8L" not in file.read(1 << 12)
    return "jpeg" in str(image.info.get("compression", "")) or image.info.get("compression") == "webp"


# Messages


def _not_an_image(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        return f"{path} can't be read (it is empty): restore or remove it"
    if start.startswith(_SIGNATURES):
        return f"{path} can't be read (it begins like an image): the file is damaged; restore or remove it"
    return f"{path} can't be read (it is not an image of a known format): convert it to PNG, or remove it"


def _damaged(path: Path | str, error: Exception) -> str:
    return f"{path} can't be read ({error}): the file is damaged; restore or remove it"


def _too_large(path: Path | str, width: int, height: int) -> str:
    return (
        f"{path} is too large: it has {width}x{height} pixels, and an image may have at most {MAX_PIXELS} and as many "
        "as fit into memory; cut it into parts"
    )
