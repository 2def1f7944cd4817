"""The transform of training samples that the options of a run ask for: this package's own, or somebody else's.

Somebody else's is a callable on `(image, mask)`, such as a transform of torchvision.transforms.v2, or a `Compose` of
Albumentations. It takes the place of all of `transforms.train_transform`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from ..plugins import load_object
from .loader import Transform
from .transforms import train_transform


def build_transform(data: Any, mean: Sequence[float], custom: Any = None) -> Transform:
    """Return the transform of training samples.

    Args:
        data: the options of the data set, a `unept.config.DataConfig`.
        mean: mean of each channel of images in [0, 1], with which `unept`'s own transform pads.
        custom: a transform that takes its place; None means the one that `data.augmentation` names, if it names one.

    Raises:
        ValueError: `data.augmentation` names nothing that can be called.
    """
    if custom is None and data.augmentation is not None:
        custom = load_object(data.augmentation, "augmentation")
    if custom is not None and not callable(custom):
        raise ValueError(
            f"augmentation is a {type(custom).__name__}, which can't be called: give what takes an image and a mask"
        )
    if custom is not None:
        return CustomTransform(custom, data.crop_size)
    return train_transform(
        data.crop_size,
        short_side=data.short_side,
        long_side=data.long_side,
        scale=data.scale,
        cat_max_ratio=data.cat_max_ratio,
        flip=data.flip,
        photometric=data.photometric,
        fill=tuple(round(255 * channel) for channel in mean),
    )


class CustomTransform:
    """Calls somebody else's transform, and checks what it returns.

    Its random numbers follow from the seed of each sample, so that a run repeats and resumes exactly: those of torch,
    as transforms of torchvision use them, and those of a `Compose` of Albumentations. A transform that draws others
    (`random`, `numpy.random`) breaks that.

    Args:
        transform: takes a `tv_tensors.Image`, uint8 (C, H, W), and a `tv_tensors.Mask`, uint8 (H, W), and returns both;
            or a `Compose` of Albumentations.
        size: (h, w) that every result must have.
    """

    def __init__(self, transform: Callable[..., Any], size: tuple[int, int]):
        self.transform, self.size = transform, tuple(size)
        self.is_albumentations = any(
            base.__module__.partition(".")[0] == "albumentations" for base in type(transform).__mro__
        )

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Transform a sample: uint8 (C, h, w) and (h, w)."""
        sample = self._albumentations(image, mask) if self.is_albumentations else self.transform(image, mask)
        if not (isinstance(sample, (tuple, list)) and [isinstance(item, Tensor) for item in sample] == [True, True]):
            raise ValueError(
                f"the augmentation returned a {type(sample).__name__}; it must return the image and the mask"
            )
        image, mask = sample
        shapes = (tuple(image.shape[-2:]), tuple(mask.shape[-2:]))
        if shapes != (self.size, self.size) or image.dtype != torch.uint8 or mask.dtype != torch.uint8:
            raise ValueError(
                f"the augmentation returned an image of {image.dtype} {tuple(image.shape)} and a mask of {mask.dtype} "
                f"{tuple(mask.shape)}; both must be uint8 and of crop_size {self.size}: end it with a crop to that "
                "size that pads (masks with 255), and leave normalisation to the model"
            )
        return image, mask

    def _albumentations(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        transform: Any = self.transform
        transform.set_random_seed(int(torch.randint(2**31, ())))
        done = transform(image=np.ascontiguousarray(image.permute(1, 2, 0).numpy()), mask=mask.numpy())
        pixels, ids = (torch.as_tensor(np.ascontiguousarray(done[name])) for name in ("image", "mask"))
        return tv_tensors.Image(pixels.permute(2, 0, 1)), tv_tensors.Mask(ids)
