"""Which implementation the ops run on: `UNEPT_BACKEND`, `set_default_backend` and `use_backend`.

`auto` (the default) runs CUDA tensors through Triton and everything else through PyTorch. `triton` and `torch` are
requests, not hints: where one cannot be met, the op raises an error that says what to do.

The choice of `use_backend` is a context variable: it holds in its thread or asyncio task and in no other. Below it lies
one default for the whole process. A gradient is computed by autograd's own threads, which see neither the context nor
its choice, so ops with a gradient take the backend as an argument, and their backward gets that of their forward.
"""

import os
from contextvars import ContextVar
from types import TracebackType

import torch
import torch._dynamo.source
from torch import Tensor, float64

from ._triton import HAS_TRITON, INTERPRETED

BACKENDS = ("auto", "triton", "torch")


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; the backends are {', '.join(BACKENDS)}")
    return name


_default = _validated(os.environ.get("UNEPT_BACKEND", "auto"), "UNEPT_BACKEND")
_chosen: ContextVar[str | None] = ContextVar("unept_backend", default=None)  # None: as `_default` says


class use_backend:
    """Choose the backend of every op of this thread or asyncio task, from now on or inside a `with` block.

    Other threads are not affected; see `set_default_backend`. The gradient of an op runs on the backend on which the op
    ran, wherever `backward` is called.

    Args:
        name: `"auto"`, `"triton"` or `"torch"`.

    Raises:
        ValueError: for any other name.

    Example:
        >>> use_backend("torch")                # from here on
        >>> with use_backend("triton"): ...     # in the block; the previous choice comes back after it
    """

    def __init__(self, name: str):
        self._previous = _chosen.get()
        _chosen.set(_validated(name, "use_backend's argument"))

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.set(self._previous)


def set_default_backend(name: str) -> None:
    """Choose the backend of all threads that have not chosen one with `use_backend`, instead of `UNEPT_BACKEND`.

    Args:
        name: `"auto"`, `"triton"` or `"torch"`.

    Raises:
        ValueError: for any other name.
    """
    global _default
    _default = _validated(name, "set_default_backend's argument")


def requested_backend() -> str:
    """The backend that this thread has requested: `auto`, `triton` or `torch`."""
    return _chosen.get() or _default


# Whether `torch.compile` compiles anew where a context variable has another value; without it a graph holds no choice.
_GUARDED = hasattr(torch._dynamo.source, "ContextVarGetSource")


def backend_argument() -> str | None:
    """The backend that this thread has requested, for an op and its gradient.

    In code that is being compiled it is a constant of the graph, which is compiled anew for another choice. It is None,
    for what is requested when the op runs, in a graph that is exported or traced, and under a `torch.compile` that does
    not look at context variables.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return None
    if torch.compiler.is_compiling() and not _GUARDED:
        return None
    return requested_backend()


def runs_on_triton(tensor: Tensor, backend: str | None = None) -> bool:
    """Whether an op on `tensor` runs through Triton under the choice `backend`; None is the current one.

    Raises:
        RuntimeError: if the choice is `triton`, and Triton is not installed or cannot run on the tensor's device.
        TypeError: if the choice is `triton` and the tensor is float64.
    """
    requested = backend or requested_backend()
    if requested == "torch":
        return False
    if requested == "auto":
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
