"""Triton, or a stand-in where it is not installed, and what all kernels share.

Deterministic scatter: floating-point atomics add in whatever order the programs finish, so their sum changes from run
to run. Under `torch.use_deterministic_algorithms(True)` the kernels add integers instead, whose sum has no order: each
contribution is multiplied by `2**38 / bound` and truncated to int64; `bound` is at least the largest contribution. One
element then holds up to 2**25 contributions without overflow, each exact to `bound * 2**-38`. Integers hold no NaN: one
that is met makes the whole result NaN.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        """Stands for `triton` and `tl` at import; the backend choice never lets a kernel of it run."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: object, **kwargs: object) -> "_Absent":
            return self

    triton = tl = _Absent()
    HAS_TRITON = INTERPRETED = False


# UNEPT_AUTOTUNE=0 takes the first of each pool of configurations, without looking which is fastest.
TUNES = os.environ.get("UNEPT_AUTOTUNE", "1") != "0"

FIXED_POINT_ONE = 2.0**38

# Of float32, and finite: logits that take no part are often set to it.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# Three products of TensorFloat-32 are as exact as one of float32, which tensor cores don't have.
PRECISION = "ieee" if torch.version.hip else "tf32x3"

_choices: dict[tuple[Any, ...], str] = {}


def autotune_pool(*configs: "triton.Config") -> list["triton.Config"]:
    """The configurations to try, the best guess first. The interpreter has no clock to choose by: it gets the first."""
    return list(configs if TUNES and not INTERPRETED else configs[:1])


# Arguments of which every value shares one compiled kernel, 1 and multiples of 16 too.
UNSPECIALISED = [
    "size_class",
    "num_levels",
    "num_queries",
    "num_pixels",
    "num_cells",
    "num_windows",
    "num_rows",
]


def _brief_bench(run: Callable[[], Any], quantiles: Sequence[float] | None = None) -> Any:
    """Milliseconds of `run`: at these quantiles, the median without. A fifth of Triton's own time, several times a run
    of the largest kernel: users wait for it."""
    how = {"quantiles": quantiles} if quantiles else {"return_mode": "median"}
    return triton.testing.do_bench(run, warmup=5, rep=20, **how)


def fastest(name: str, candidates: Mapping[str, Callable[[], Any]], key: tuple[Any, ...]) -> Callable[[], Any]:
    """The candidate that runs fastest, timed once for each `key` and device and kept in Triton's cache on disk.

    Where nothing can be timed (in the interpreter, without tuning, while a CUDA graph is captured) it is the first.
    """
    if not INTERPRETED:
        key = (torch.cuda.get_device_properties(torch.cuda.current_device()).name, *key)
    key = (name, *key)
    if key not in _choices and (INTERPRETED or not TUNES or torch.cuda.is_current_stream_capturing()):
        return next(iter(candidates.values()))
    if key not in _choices:
        identity = repr((key, triton.__version__, torch.__version__, list(candidates)))
        cache = triton.runtime.cache.get_cache_manager(hashlib.sha256(identity.encode()).hexdigest())
        path = cache.get_file(f"{name}.json")
        if path is None:
            time_of = {candidate: _brief_bench(run) for candidate, run in candidates.items()}
            cache.put(json.dumps({"times": time_of}), f"{name}.json", binary=False)
        else:
            time_of = json.loads(Path(path).read_text())["times"]
        _choices[key] = min(time_of, key=time_of.__getitem__)
    return candidates[_choices[key]]


def size_class(lanes: int) -> int:
    """Part of every autotune key, for `lanes`, the elements that run side by side: 0 what leaves a GPU mostly idle,
    1 an image, 2 a batch of them. The choice is kept on disk: a tiny problem's must not decide for the real ones, nor
    each size of image tune anew."""
    return (lanes >= 1 << 14) + (lanes >= 1 << 18)


def autotuned(
    configs: Sequence["triton.Config"],
    key: Sequence[str],
    adds_into: Sequence[str] = (),
    fit: Callable[["triton.Config", Mapping[str, Any]], "triton.Config"] | None = None,
) -> Callable[[Callable], Any]:
    """Compile a kernel for each new `key` and `size_class`, an argument that it takes, with the fastest of `configs`.

    Args:
        configs: an `autotune_pool`.
        key: names of the kernel's arguments, whose values JSON can hold: choices are kept on disk.
        adds_into: those that are a `ScatterBuffer`'s data, which every trial has to find at zero.
        fit: makes the configuration to try of one in the pool and the kernel's arguments by name; the same one is tried
            once.
    """

    def fitted(pool: list["triton.Config"], arguments: Mapping[str, Any], **more: Any) -> list["triton.Config"]:
        return list(dict.fromkeys(fit(config, {**arguments, **more}) for config in pool)) if fit else pool

    def decorate(kernel: Callable) -> Any:
        compiled = triton.jit(kernel, do_not_specialize=UNSPECIALISED)
        key_names = [*key, "size_class"]
        return triton.autotune(
            list(configs),
            key_names,
            prune_configs_by={"early_config_prune": fitted} if fit else None,
            reset_to_zero=list(adds_into),
            do_bench=_brief_bench,
            cache_results=True,
        )(compiled)

    return decorate


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def operand(dtype: torch.dtype) -> "tl.dtype":
    """What matrix products of a dtype are made of. The interpreter's products of bfloat16 are wrong."""
    if dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


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
        bound: computes, () on the device, at least the largest magnitude of one contribution. Called only when results
            must repeat: it takes a pass over the incoming gradient.
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
            # And 1, until a contribution makes it NaN.
            self.scale = torch.stack([FIXED_POINT_ONE / self.bound, torch.ones_like(self.bound)])

    def result(self, dtype: torch.dtype) -> Tensor:
        """The accumulated gradient."""
        if self.bound is None or self.scale is None:
            return self.data.to(dtype)
        unit = self.bound.to(torch.float64) * self.scale[1] / FIXED_POINT_ONE
        return (self.data.to(torch.float64) * unit).to(dtype)
