"""How images become what the network computes with: mean and standard deviation per channel, kept in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import check_type


class NormalizedInput(nn.Module):
    """A network that normalises uint8 images itself; `UNEPT` and `Refiner` inherit it.

    Mean and deviation stay in float32 when the weights become float16 or bfloat16, whose rounding would move colours by
    up to half a level. They follow from `preprocessing`, so that they are right again after `to_empty`.

    Attributes:
        in_chans: number of channels of an image, C.
        preprocessing: has the keys `mean` and `std`, C numbers each, of channels in [0, 1].
    """

    in_chans: int
    preprocessing: dict[str, Any]
    mean: Tensor
    std: Tensor

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise uint8 images with this mean and standard deviation of each channel in [0, 1].

        Raises:
            ValueError: there is not one finite number per channel, or a deviation is not positive.
        """
        for name, values in (("mean", mean), ("std", std)):
            check_type(name, values, Sequence[float])
            if len(values) != self.in_chans:
                raise ValueError(
                    f"in_chans is {self.in_chans}, but {name} has {len(values)} numbers: give mean and std "
                    "(--mean, --std), one number per channel, of values in [0, 1]"
                )
            if name == "std" and min(values) <= 0:
                raise ValueError(f"std is {tuple(values)}; each number must be positive")
            self.preprocessing[name] = list(values)
            if not hasattr(self, name):
                self.register_buffer(name, torch.zeros(self.in_chans, 1, 1), persistent=False)
        self._fill_buffers()

    def _fill_buffers(self) -> None:
        """Set the buffers, on their device, in float32, or in float64 where they are that."""
        for name in ("mean", "std"):
            old = getattr(self, name)
            dtype = torch.promote_types(old.dtype, torch.float32)
            values = torch.tensor(self.preprocessing[name], dtype=dtype, device=old.device)
            setattr(self, name, values.view(-1, 1, 1) * 255)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert or move the module, as `to`, `half` and `to_empty` do."""
        result = super()._apply(fn, recurse)
        self._fill_buffers()
        return result

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def normalized(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W): uint8 ones with the mean and standard deviation that the backbone expects, in float32.

        Floating-point images are taken as normalised already and returned as they are.

        Raises:
            ValueError: they have another number of channels.
            TypeError: they are neither uint8 nor floating-point.
        """
        channels = len(self.mean)  # also of those that only borrow this method
        if images.dim() < 3 or images.shape[-3] != channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; they must have {channels} channels, (..., {channels}, H, W)"
            )
        if images.dtype == torch.uint8:
            return (images.to(self.mean.dtype) - self.mean) / self.std
        if not images.is_floating_point():
            raise TypeError(f"images have dtype {images.dtype}; give uint8 images, or normalised floating-point ones")
        return images
