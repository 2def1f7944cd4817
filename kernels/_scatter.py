"""Sums that kernels add into side by side, deterministic where results must repeat.

Floating-point atomics add in whatever order the programs finish, so their sum changes from run to run. Under
`torch.use_deterministic_algorithms(True)` the kernels add integers instead, whose sum has no order: each contribution
is multiplied by `2**38 / bound` and truncated to int64; `bound` is at least the largest contribution. One element then
holds up to 2**25 contributions without overflow, each exact to `bound * 2**-38`. Integers hold no NaN: one that is met
makes the whole result NaN.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import tl, triton

FIXED_POINT_ONE = 2.0**38


@triton.jit
def scatter_add(pointers, contributions, mask, scale_ptr, DETERMINISTIC: tl.constexpr):
    """Add float32 `contributions` into a buffer of `ScatterBuffer`, whatever else adds there at the same time."""
    if DETERMINISTIC:
        scale = tl.load(scale_ptr)
        # Integers hold neither NaN nor infinity: these make the factor NaN that the result is multiplied by. Compared,
        # not subtracted: of a product a * b the compiler makes fma(a, b, -(a * b)), the rounding error, of x - x.
        finite = tl.abs(contributions) < float("inf")
        not_a_number = tl.full(pointers.shape, float("nan"), tl.float32)
        tl.store(scale_ptr + 1 + tl.zeros(pointers.shape, tl.int32), not_a_number, mask=mask & (finite == 0))
        tl.atomic_add(pointers, (contributions * scale).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(pointers, contributions, mask=mask, sem="relaxed")


class ScatterBuffer:
    """A zeroed buffer that kernels add into: float32, or int64 fixed-point when results must repeat to the bit.

    Args:
        shape: of the gradient.
        device: of the gradient.
        bound: computes a number, () on the device, that is at least the largest magnitude of one contribution. Called
            only when results must repeat: it takes a pass over the incoming gradient.
    """

    def __init__(self, shape: torch.Size | tuple[int, ...], device: torch.device, bound: Callable[[], Tensor]):
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        dtype = torch.int64 if self.deterministic else torch.float32
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.bound: Tensor | None = None
        self.scale: Tensor | None = None
        if self.deterministic:
            # A NaN or infinite bound makes scale and result NaN, as a floating-point sum would be.
            self.bound = bound().to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny * FIXED_POINT_ONE)
            # The second number is 1 until a contribution that is not finite makes it NaN.
            self.scale = torch.stack([FIXED_POINT_ONE / self.bound, torch.ones_like(self.bound)])

    def result(self, dtype: torch.dtype) -> Tensor:
        """The sum in a dtype."""
        if self.bound is None or self.scale is None:
            return self.data.to(dtype)
        unit = self.bound.to(torch.float64) * self.scale[1] / FIXED_POINT_ONE
        return (self.data.to(torch.float64) * unit).to(dtype)
