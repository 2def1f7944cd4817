"""What the networks have in common that UNEPT is compared with: the same code trains and evaluates all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unept.model.network import UNEPT
from unept.model.output import STRIDE, padded_size


class ComparedNetwork(nn.Module):
    """A `TrainableModel` that predicts class logits alone. A subclass has a `backbone` and the `forward`.

    Args:
        classes: names of the K classes.
        palette: an (r, g, b) per class.
        mean, std: of RGB in [0, 1], that the weights of the backbone expect.
        divisor: height and width of an image are padded to multiples of it.
    """

    refines = False
    normalized = UNEPT.normalized
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        palette: Sequence[Any],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        divisor: int,
    ):
        super().__init__()
        self.num_classes, self.classes, self.palette = len(classes), list(classes), list(palette)
        self.divisor = divisor
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255, persistent=False)
        self.preprocessing: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}

    def pad(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, H, W) and pad them right and below to multiples of `divisor`."""
        height, width = padded_size(images.shape[2:], self.divisor)
        return F.pad(self.normalized(images), (0, width - images.shape[3], 0, height - images.shape[2]))

    def save_pretrained(self, folder: Path) -> None:
        """Save the weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "model.pt")


def crop(logits: Tensor, padded: Sequence[int], size: Sequence[int]) -> Tensor:
    """Crop logits (B, K, h, w) of an image of size `padded` (H, W) to its upper left part of `size`, a multiple of 8.

    Logits coarser than 1/8, such as SETR's at 1/16, are up-sampled to 1/8 first, where every such part ends at a pixel.
    """
    if padded[0] > STRIDE * logits.shape[2]:
        logits = resize(logits, (padded[0] // STRIDE, padded[1] // STRIDE))
    stride = padded[0] // logits.shape[2]
    return logits[:, :, : size[0] // stride, : size[1] // stride]


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resample maps (B, C, h, w) bilinearly to `size` (H, W)."""
    return F.interpolate(maps, (size[0], size[1]), mode="bilinear", align_corners=False)
