"""Segment images from Python: `Segmenter("runs/camvid")("street.jpg").overlay().show()`."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .colors import overlay, to_pil
from .data.reading import read_image, upright_tensor
from .distributed import choose_device
from .inference import InferenceConfig, InferenceOptions, predict, resolve
from .memory import require_memory_for_images
from .model.network import UNEPT
from .pretrained import DEMO, DEMO_NOTICE, load

File: TypeAlias = str | Path | Image.Image
Pixels: TypeAlias = np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One segmented image, H x W pixels. Tensors are on the CPU."""

    ids: Tensor
    """(H, W) int64: class ids."""
    confidence: Tensor
    """(H, W) float32: probability of that class, from 0 to 1."""
    boundary: Tensor | None
    """(H, W) float32: probability of "closer to another class than 5 pixels"; None without a spatial branch."""
    image: Tensor = field(repr=False)
    """(3, H, W) uint8, RGB: the image, turned upright."""
    classes: tuple[str, ...]
    """Name of every id."""
    palette: tuple[tuple[int, int, int], ...] = field(repr=False)
    """(r, g, b) of every id, 0..255."""

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image mixed with the colors of its classes, which have weight alpha, from 0 to 1."""
        return to_pil(overlay(self.image, self.ids, self.palette, alpha))


class Segmenter:
    """A trained model that segments images of any kind and size, and answers at their size.

    Args:
        source: a run folder of `unept.train`, a folder that `save_pretrained` wrote, ORG/NAME of a repository on the
            Hugging Face hub, or a model. None is the demo model that ships with the package: street scenes in the 11
            classes of CamVid, for research; a warning says so.
        device: device of the model. `"auto"` is CUDA if there is a device; a given model stays where it is.
        options: fields of `unept.inference.InferenceOptions` (`scales`, `flip`, `window`, ...); what is left out is
            done as the model was trained, as its config.json says.

    Attributes:
        model: the model, in evaluation mode.
        inference: how images are seen.
        classes: names of the K classes.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it has no model; see `unept.pretrained.load`.
        ValueError: an option has a bad value, or the model cannot be read by this version.
        TypeError: there is no such option.

    Example:
        >>> segmenter = Segmenter("runs/camvid", flip=True)
        >>> result = segmenter("street.jpg")
        >>> result.ids, result.confidence, result.boundary  # each (H, W)
        >>> result.overlay().save("overlay.png")
    """

    def __init__(self, source: str | Path | UNEPT | None = None, device: str | torch.device = "auto", **options: Any):
        chosen = InferenceOptions(**options)
        if source is None:
            warnings.warn(f"no source is given; this is {DEMO_NOTICE}", stacklevel=2)
            source = DEMO
        if isinstance(source, UNEPT):
            self.model = (source if device == "auto" else source.to(device)).eval()
        else:
            self.model = load(source, choose_device("auto") if device == "auto" else torch.device(device))
        self.inference: InferenceConfig = resolve(chosen, self.model)
        self.classes = tuple(self.model.classes)

    @overload
    def __call__(self, image: File) -> Segmentation: ...  # type: ignore[overload-overlap]  # a str is a sequence

    @overload
    def __call__(self, image: Pixels) -> Any: ...  # its number of dimensions says whether it is one or many

    @overload
    def __call__(self, image: Sequence[File | Pixels]) -> list[Segmentation]: ...

    def __call__(self, image: File | Pixels | Sequence[File | Pixels]) -> Any:
        """Segment one image, or several.

        Args:
            image: a path, a PIL image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8, RGB; a list of any of
                these, which are seen one by one; an array (B, H, W, 3) or a tensor (B, 3, H, W), seen at once. Files
                and PIL images are turned upright as their EXIF tag says. A model with other channels than RGB takes
                arrays and tensors of as many.

        Returns:
            A `Segmentation`; a list of them for a list or a batch.

        Raises:
            TypeError: something else, or another dtype.
            ValueError: another shape, or (DatasetError) a file that can't be read.
            MemoryError: a CPU has too little memory to see the image whole.
        """
        if isinstance(image, (list, tuple)):
            return [result for item in image for result in self._segment(_one_image(item, self.model.in_chans))]
        if isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4:
            return self._segment(_batch(image, self.model.in_chans))
        return self._segment(_one_image(image, self.model.in_chans))[0]

    def _segment(self, images: Tensor) -> list[Segmentation]:
        """Segment images (B, 3, H, W) uint8."""
        device, (height, width) = self.model.mean.device, images.shape[2:]
        count = f"{len(images)} images of " if len(images) > 1 else ""
        advice = f"with {count}{width}x{height} pixels: Segmenter(..., window=512) sees images in parts"
        require_memory_for_images((len(images), height, width), self.inference, device, advice)
        found = predict(self.model, images.to(device), self.inference)
        ids, confidence = found.ids.cpu(), found.confidence.cpu()
        boundary = [None] * len(images) if found.boundary is None else found.boundary.cpu()
        palette = tuple((r, g, b) for r, g, b in self.model.palette)
        return [
            Segmentation(*maps, classes=self.classes, palette=palette)
            for maps in zip(ids, confidence, boundary, images.cpu(), strict=True)
        ]


def _one_image(image: Any, channels: int) -> Tensor:
    """Convert a single image of any kind to (1, 3, H, W) uint8; with other channels than 3 an array or a tensor."""
    if isinstance(image, (str, Path, Image.Image)) and channels != 3:
        raise ValueError(
            f"files and PIL images are RGB, and the model takes {channels} channels: give an array (H, W, C)"
        )
    if isinstance(image, (str, Path)):
        return read_image(Path(image))[None]
    if isinstance(image, Image.Image):
        return upright_tensor(image, "the image")[None]
    if not isinstance(image, (np.ndarray, Tensor)):
        raise TypeError(
            f"an image is of type {type(image).__name__}; give a path, a PIL image, a uint8 array (H, W, 3) or tensor "
            "(3, H, W), or a list of these"
        )
    return _batch(image[None], channels)


def _batch(images: Pixels, channels: int) -> Tensor:
    """Copy an array (B, H, W, C) or tensor (B, C, H, W) to a tensor (B, C, H, W) uint8."""
    wanted = f"(H, W, {channels})" if isinstance(images, np.ndarray) else f"({channels}, H, W)"
    axis = 3 if isinstance(images, np.ndarray) else 1
    if images.dtype not in (np.uint8, torch.uint8):
        raise TypeError(
            f"an image has dtype {images.dtype}; give uint8, 0 to 255; values from 0 to 1 become that by "
            "(255 * image).round()"
        )
    if images.ndim != 4 or images.shape[axis] != channels or 0 in images.shape[1:]:
        turned = images.ndim == 4 and images.shape[4 - axis] == channels
        hint = "; put the channels " + ("last" if axis == 3 else "first") if turned else ""
        raise ValueError(
            f"an image has shape {tuple(images.shape[1:])}; it must be {wanted}{', RGB' * (channels == 3)}{hint}"
        )
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return images.clone(memory_format=torch.contiguous_format)  # one layout, so that results are the same to the bit
