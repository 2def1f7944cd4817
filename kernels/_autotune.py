"""Autotuning: which configuration of a kernel, and which of several ways to compute something, runs fastest.

Each is measured once for every key and device, and the choice is kept in Triton's cache on disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ._triton import INTERPRETED, triton

# UNEPT_AUTOTUNE=0 takes the first configuration of each pool and the first of several ways, without measuring.
TUNES = os.environ.get("UNEPT_AUTOTUNE", "1") != "0"

_choices: dict[tuple[Any, ...], str] = {}


def forget_choices() -> None:
    """Forget what `fastest` chose in this process; what is kept on disk is read again."""
    _choices.clear()


def autotune_pool(*configs: "triton.Config") -> list["triton.Config"]:
    """The configurations to try, the best guess first; only that one in the interpreter, which cannot be timed."""
    return list(configs if TUNES and not INTERPRETED else configs[:1])


def _brief_bench(run: Callable[[], Any], quantiles: Sequence[float] | None = None) -> Any:
    """The time of `run` in milliseconds at the given quantiles, or its median.

    Measured for a fifth of the time that Triton takes by default, since users wait for it; that is still several runs
    of the largest kernel.
    """
    how = {"quantiles": quantiles} if quantiles else {"return_mode": "median"}
    return triton.testing.do_bench(run, warmup=5, rep=20, **how)


def fastest(name: str, candidates: Mapping[str, Callable[[], Any]], key: tuple[Any, ...]) -> Callable[[], Any]:
    """The candidate that runs fastest, timed once for each `key` and device and kept in Triton's cache on disk.

    Where nothing can be timed (in the interpreter, without tuning, while a CUDA graph is captured) it is the first.

    Args:
        name: what is chosen; part of the key, and the name of the file in the cache.
        candidates: functions without arguments that compute the same thing, by name.
        key: what the choice depends on. Its `repr` must be the same in every process.
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


def size_bucket(lanes: int) -> int:
    """The size of a problem as a part of every autotune key: 0 leaves a GPU mostly idle, 1 is an image, 2 a batch.

    Choices are kept on disk: a tiny problem must not decide for the real ones, nor may each image size tune anew.

    Args:
        lanes: the number of elements that run side by side, such as pixels or queries of all heads.
    """
    return (lanes >= 1 << 14) + (lanes >= 1 << 18)


def autotuned(
    configs: Sequence["triton.Config"],
    key: Sequence[str],
    adds_into: Sequence[str] = (),
    unspecialised: Sequence[str] = (),
    fit: Callable[["triton.Config", Mapping[str, Any]], "triton.Config"] | None = None,
) -> Callable[[Callable], Any]:
    """Compile a kernel for each new `key` and `size_bucket`, an argument that it takes, with the fastest of `configs`.

    Args:
        configs: an `autotune_pool`.
        key: names of the kernel's arguments, whose values JSON can hold: choices are kept on disk.
        adds_into: those that are a `ScatterBuffer`'s data, which every trial has to find at zero.
        unspecialised: names of integer arguments of which all values share one compiled kernel: Triton otherwise
            compiles anew where one is 1 or a multiple of 16. `size_bucket` always is.
        fit: makes the configuration to try of one in the pool and the kernel's arguments by name; the same one is tried
            once.
    """

    def fitted(pool: list["triton.Config"], arguments: Mapping[str, Any], **more: Any) -> list["triton.Config"]:
        return list(dict.fromkeys(fit(config, {**arguments, **more}) for config in pool)) if fit else pool

    def decorate(kernel: Callable) -> Any:
        compiled = triton.jit(kernel, do_not_specialize=[*unspecialised, "size_bucket"])
        key_names = [*key, "size_bucket"]
        return triton.autotune(
            list(configs),
            key_names,
            prune_configs_by={"early_config_prune": fitted} if fit else None,
            reset_to_zero=list(adds_into),
            do_bench=_brief_bench,
            cache_results=True,
        )(compiled)

    return decorate
