"""Triton, or a stand-in where it is not installed, and what all kernels take from it."""

import contextlib

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    # Triton reads TRITON_INTERPRET once, when a kernel is decorated: a later change has no effect.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ModuleNotFoundError:

    class _Absent:
        """Stands for `triton` and `tl` while modules are imported; the choice of backend lets no kernel of it run."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: object, **kwargs: object) -> "_Absent":
            return self

    triton = tl = _Absent()
    HAS_TRITON = INTERPRETED = False


# The lowest finite float32: logits that take no part are often set to it.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# For products of float32 matrices: three products in TensorFloat-32 are as exact as one in float32, which tensor cores
# do not have.
PRECISION = "ieee" if torch.version.hip else "tf32x3"


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def operand(dtype: torch.dtype) -> "tl.dtype":
    """The dtype in which matrices of a dtype are multiplied; the interpreter's products of bfloat16 are wrong."""
    if dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
