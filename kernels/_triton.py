"""Triton, or a stand-in where it is not installed, and what all kernels take from it."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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

        def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
            return ()

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


def refuse_capture(what: str) -> None:
    """Raise RuntimeError while a CUDA graph is captured: `what` says what is missing."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what}, which cannot be done while a CUDA graph is captured: run the same step once, with the same "
            "sizes, before the capture"
        )


Launch = tuple[Any, dict[str, Any]]
_recorded: ContextVar[list[Launch] | None] = ContextVar("unept_recorded", default=None)  # set while an op records


class _Recording(TorchDispatchMode):
    """Lets the ops of this thread record their launches, and those that autograd's own threads run for it.

    These see no context variable of this thread, but its dispatch modes. The ops of other threads launch.
    """

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        token = _recorded.set(self.launches)
        try:
            return op(*args, **(kwargs or {}))
        finally:
            _recorded.reset(token)


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Record the kernels that the ops inside a block would launch, and their arguments by name; none is launched."""
    launches: list[Launch] = []
    with _Recording(launches):
        yield launches


def is_recording() -> bool:
    """Whether this op records its launches, so that nothing writes what launchers return."""
    return _recorded.get() is not None


def new_ids(shape: Sequence[int], device: torch.device) -> Tensor:
    """int64 that a kernel fills; zeros where launches are recorded, since others may index by them."""
    return (torch.zeros if is_recording() else torch.empty)(tuple(shape), dtype=torch.int64, device=device)


class Pointer(triton.runtime.jit.MockTensor):
    """Stands for a tensor at an address, without its memory."""

    def __init__(self, dtype: torch.dtype, address: int):
        super().__init__(dtype)
        self.address = address

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def record(kernel: Any, arguments: dict[str, Any]) -> None:
    """Record a launch. Of tensors there remains what Triton compiles for, so that their memory is free again."""
    launches = _recorded.get()
    assert launches is not None
    stand_in = lambda x: Pointer(x.dtype, x.data_ptr()) if isinstance(x, Tensor) else x
    named = {name: stand_in(x) for name, x in arguments.items() if name not in ("grid", "warmup")}
    launches.append((kernel, named))


def watch(kernel: Any) -> None:
    """Let the launches of a kernel be recorded, and let it raise where it would be compiled, and loaded onto the GPU,
    while a CUDA graph is captured."""
    if not hasattr(kernel, "_do_compile"):  # interpreted
        return
    do_compile = kernel._do_compile

    def checked_compile(*args: Any, **kwargs: Any) -> Any:
        refuse_capture(f"{kernel.__name__} has not been compiled for these arguments")
        return do_compile(*args, **kwargs)

    def run(*args: Any, warmup: bool, **kwargs: Any) -> Any:
        if is_recording() and not warmup:
            return record(kernel, kwargs)
        return type(kernel).run(kernel, *args, warmup=warmup, **kwargs)

    kernel._do_compile, kernel.run = checked_compile, run


def jit(unspecialised: Sequence[str] = (), unaligned: Sequence[str] = ()) -> Callable[[Callable], Any]:
    """`triton.jit` for kernels that sizes of images do not compile anew.

    Triton compiles a kernel anew where an integer is 1 or a multiple of 16 and before was not. Strides that are
    arguments of their own, `x_stride_b`, are only known to be 1 or not. Those in a tuple are looked at in full,
    whatever one asks for: they are for tensors of which several elements are loaded at a time.

    Args:
        unspecialised: names of integers of which all values share one compiled kernel.
        unaligned: names of pointers and integers of which it does not matter whether they are multiples of 16.
    """

    def decorate(kernel: Callable) -> Any:
        single_strides = [name for name in inspect.signature(kernel).parameters if "_stride_" in name]
        compiled = triton.jit(
            kernel,
            do_not_specialize=list(unspecialised),
            do_not_specialize_on_alignment=[*single_strides, *unaligned],
        )
        watch(compiled)
        return compiled

    return decorate


def strides(name: str, dimensions: str, tensor: Tensor | None) -> dict[str, int]:
    """The strides of a tensor as a kernel's arguments `name_stride_b`, ...; zeros for one that is not there."""
    numbers = (0,) * len(dimensions) if tensor is None else tensor.stride()
    return {f"{name}_stride_{dimension}": n for dimension, n in zip(dimensions, numbers, strict=True)}


@triton.jit
def split_tf32(x):
    """float32 -> (high, low): x in TensorFloat-32, to the nearest, and what is left; NaN if x is not finite."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a @ b + accumulator, in float32; of float32 operands in the given precision.

    Triton splits for "tf32x3" with twice as many instructions: it rounds the low parts too, which tensor cores cut off
    by themselves, and treats infinity apart, which becomes NaN here.
    """
    if PRECISION == "tf32x3" and a.dtype == tl.float32:
        a_high, a_low = split_tf32(a)
        b_high, b_low = split_tf32(b)
        accumulator = tl.dot(a_low, b_high, accumulator, input_precision="tf32")
        accumulator = tl.dot(a_high, b_low, accumulator, input_precision="tf32")
        return tl.dot(a_high, b_high, accumulator, input_precision="tf32")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


def operand(dtype: torch.dtype) -> "tl.dtype":
    """The dtype in which matrices of a dtype are multiplied; the interpreter's products of bfloat16 are wrong."""
    if dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
