"""Which implementation the ops run on: `UNEPT_BACKEND` and `use_backend`.

`auto` (the default) runs CUDA tensors through Triton and everything else through PyTorch. `triton` and `torch` are
requests, not hints: where one cannot be met, the op raises an error that says what to do.
"""

import os
from types import TracebackType

from torch import Tensor, float64

from ._triton import HAS_TRITON, INTERPRETED

BACKENDS = ("auto", "triton", "torch")


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; the backends are {', '.join(BACKENDS)}")
    return name


_requested = _validated(os.environ.get("UNEPT_BACKEND", "auto"), "UNEPT_BACKEND")


class use_backend:
    """Choose the backend of every op from now on, or inside a `with` block.

    Args:
        name: `"auto"`, `"triton"` or `"torch"`.

    Raises:
        ValueError: for any other name.

    Example:
        >>> use_backend("torch")                # from here on
        >>> with use_backend("triton"): ...     # in the block; the previous choice comes back after it
    """

    def __init__(self, name: str):
        global _requested
        self._previous = _requested
        _requested = _validated(name, "use_backend's argument")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


def requested_backend() -> str:
    """The backend that was requested: `auto`, `triton` or `torch`."""
    return _requested


def runs_on_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` runs through Triton under the current choice.

    Raises:
        RuntimeError: if the choice is `triton`, and Triton is not installed or cannot run on the tensor's device.
        TypeError: if the choice is `triton` and the tensor is float64.
    """
    if _requested == "torch":
        return False
    if _requested == "auto":
        return HAS_TRITON and tensor.is_cuda and tensor.dtype != float64
    if not HAS_TRITON:
        raise RuntimeError(
            "the backend is set to 'triton', but the package triton is not installed: install it (Linux only), "
            "or set UNEPT_BACKEND=torch"
        )
    if not (tensor.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"the backend is set to 'triton', but the tensors are on {tensor.device}: move them to a CUDA device, set "
            "TRITON_INTERPRET=1 before the first import to debug the kernels on a CPU, or set UNEPT_BACKEND=torch"
        )
    if tensor.dtype == float64:
        raise TypeError(
            "the Triton kernels accumulate in float32 and take float32, float16 or bfloat16, not float64: "
            "convert the tensors, or set UNEPT_BACKEND=torch for a float64 check"
        )
    return True
