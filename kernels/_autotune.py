"""Autotuning: which configuration of a kernel, and which of several ways to compute something, runs fastest.

Each is measured once for every key and device, and the choice is kept in Triton's cache on disk.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ._triton import HAS_TRITON, INTERPRETED, is_recording, jit, record, record_launches, refuse_capture, triton

# UNEPT_AUTOTUNE=0 takes the first configuration of each pool and the first of several ways, without measuring.
TUNES = os.environ.get("UNEPT_AUTOTUNE", "1") != "0"

LOCK_SECONDS = 120

_choices: dict[tuple[Any, ...], str] = {}
_announced: list[bool] = []
_forced: int | None = None


def forget_choices() -> None:
    """Forget what `fastest` chose in this process; what is kept on disk is read again."""
    _choices.clear()


def announce() -> None:
    """Say once per process what its user waits for."""
    if not _announced:
        _announced.append(True)
        print(
            f"Compiling and timing kernels for this GPU; what is chosen is kept in {triton.knobs.cache.dir}. "
            "UNEPT_AUTOTUNE=0 takes the best guesses instead.",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def one_process_at_a_time(what: str) -> Iterator[None]:
    """Let one process of those that share Triton's cache on disk run the block for `what`, while the others wait.

    They wait for two minutes at most, since the one inside may itself wait for a collective of theirs, and not at all
    where the file system has no locks.
    """
    folder = Path(triton.knobs.cache.dir) / "unept-locks"
    lock = FileLock(folder / f"{hashlib.sha256(what.encode()).hexdigest()}.lock", timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def force_configuration(number: int) -> Iterator[None]:
    """Launch kernels in the configuration with this number of their pool, or its last, inside a block: for tests."""
    global _forced
    before, _forced = _forced, number
    try:
        yield
    finally:
        _forced = before


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
    if is_recording():  # what each of them would launch
        first, *others = candidates.values()
        for run in others if TUNES else ():
            run()
        return first
    if not INTERPRETED:
        key = (torch.cuda.get_device_properties(torch.cuda.current_device()).name, *key)
    key = (name, *key)
    if key not in _choices and (INTERPRETED or not TUNES or torch.cuda.is_current_stream_capturing()):
        return next(iter(candidates.values()))
    if key not in _choices:
        identity = repr((key, triton.__version__, torch.__version__, list(candidates)))
        with one_process_at_a_time(identity):
            time_of = _times_on_disk(name, identity, candidates)
        _choices[key] = min(time_of, key=time_of.__getitem__)
    return candidates[_choices[key]]


def _times_on_disk(name: str, identity: str, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The time of each candidate, read from Triton's cache, or measured and written there."""
    cache = triton.runtime.cache.get_cache_manager(hashlib.sha256(identity.encode()).hexdigest())
    path = cache.get_file(f"{name}.json")
    if path is not None:
        return json.loads(Path(path).read_text())["times"]
    time_of = {candidate: _brief_bench(run) for candidate, run in candidates.items()}
    cache.put(json.dumps({"times": time_of}), f"{name}.json", binary=False)
    return time_of


def size_bucket(lanes: int, turns: int = 1) -> int:
    """The size of a problem as a part of every autotune key: 0 leaves a GPU mostly idle, 1 is an image, 2 a batch; and
    3 more, or 6, for loops of more turns.

    Choices are kept on disk: a tiny problem must not decide for the real ones, nor may each image size tune anew.

    Args:
        lanes: the number of elements that run side by side, such as pixels or queries of all heads.
        turns: how often each loops, such as over channels or classes; up to 32, up to 256, or more.
    """
    return (lanes >= 1 << 14) + (lanes >= 1 << 18) + 3 * ((turns > 32) + (turns > 256))


CHOOSING = threading.RLock()  # held while a kernel is tuned: Triton keeps the launch in the tuner meanwhile


class Tuner(triton.runtime.autotuner.Autotuner):
    """Triton's autotuner, which compiles a pool side by side before it is timed, and fits what is not tuned too.

    Processes that share Triton's cache on disk compile and time a pool once: the others wait for the first, and read.
    """

    fit: Callable[["triton.Config", Mapping[str, Any]], "triton.Config"] | None = None
    """See `autotuned`."""
    chosen: dict[tuple[Any, ...], dict[str, Any]]
    """The options of the configuration that was chosen, by what the choice depends on."""
    pointers: list[str]
    """The names of the arguments that are tensors."""

    def prune_configs(self, kwargs: dict[str, Any]) -> list["triton.Config"]:
        """The configurations to try for a launch with these arguments by name, besides those by position."""
        return self.fitted({**self.nargs, **kwargs})

    def fitted(self, arguments: Mapping[str, Any]) -> list["triton.Config"]:
        """The configurations to try for these arguments."""
        fitted = self.configs if self.fit is None else [self.fit(config, arguments) for config in self.configs]
        return list(dict.fromkeys(fitted))

    def options_to_try(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """The options of the configurations that a first launch compiles: all that are timed, or the first."""
        configs = self.fitted(arguments)
        return [config.all_kwargs() for config in (configs if TUNES else configs[:1])]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Launch the kernel in the fastest configuration."""
        if is_recording():
            return record(self, kwargs)
        # What Triton looks a choice up by takes it as long as the launch: the same, without making strings.
        key = (_forced, *map(kwargs.get, self.keys), *[getattr(kwargs[name], "dtype", None) for name in self.pointers])
        chosen = self.chosen.get(key)
        if chosen is not None:
            return self.fn.run(*args, **kwargs, **chosen)
        with CHOOSING:
            return self._first_run(key, *args, **kwargs)

    def _first_run(self, key: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        """Choose the configuration, unless another thread has done so meanwhile, and launch the kernel in it."""
        if (chosen := self.chosen.get(key)) is not None:
            return self.fn.run(*args, **kwargs, **chosen)
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        if _forced is None and TUNES and not INTERPRETED:
            self.launch = kwargs
            try:
                launched = super().run(*args, **kwargs)
            finally:
                self.launch = {}  # or its tensors would live on
            if best := getattr(self, "best_config", None):
                self.chosen[key] = best.all_kwargs()
            return launched
        pool = self.prune_configs(kwargs)
        options = pool[min(_forced or 0, len(pool) - 1)].all_kwargs()
        if not INTERPRETED:  # where a test may switch tuning on later
            self.chosen[key] = options
        return self.fn.run(*args, **kwargs, **options)

    def check_disk_cache(self, tuning_key: Any, configs: list["triton.Config"], bench_fn: Callable[[], None]) -> Any:
        """Take the choice from disk, or measure and keep it."""
        refuse_capture(f"{self.base_fn.__name__} has not been tuned for these sizes")

        def bench() -> None:
            announce()
            self.compile(configs)
            # Trials find a buffer at zero and leave it so: an earlier launch may have added something.
            kept = [(self.launch[name], self.launch[name].clone()) for name in self.reset_to_zero]
            bench_fn()
            for buffer, contents in kept:
                buffer.copy_(contents)

        with one_process_at_a_time(repr((self.base_fn.__name__, tuning_key))):
            return super().check_disk_cache(tuning_key, configs, bench)

    def compile(self, configs: list["triton.Config"]) -> None:
        """Compile the kernel for the arguments of this launch in all configurations, in threads."""
        launch = {name: argument for name, argument in self.launch.items() if name != "warmup"}
        compile_in_threads([(self.fn, {**launch, **config.all_kwargs()}) for config in configs])


def compile_in_threads(launches: Sequence[tuple[Any, dict[str, Any]]], workers: int | None = None) -> None:
    """Compile kernels for these arguments, side by side.

    LLVM and ptxas, which take most of the time, hold no lock of Python's. What cannot be compiled raises where it is
    launched, or is passed over where it is timed.
    """
    workers = min(max(1, len(launches)), workers or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for kernel, arguments in launches:
            kernel.warmup(**{"grid": (1,), **arguments})


def compile_ahead(step: Callable[[], Any], workers: int | None = None, quiet: bool = False) -> None:
    """Compile everything that a step launches on the current GPU, in all configurations, side by side: what the step
    itself would compile kernel by kernel, as it comes to each. `unept.train` does so for its own steps.

    Kernels otherwise wait for each other, as only the configurations of one are compiled side by side. By calculation
    from the seconds of each compilation (40 of them, 28 s of a CPU core, in a training step of tf_efficientnet_lite0;
    Triton's frontend, a tenth, holds Python's lock) eight cores finish 6.4 times as early as one, and kernel by kernel
    2.0 times as early.

    The step is run with its tensors on the GPU, but without launching any kernel of this package: what these would have
    written holds anything. So it must leave nothing behind that counts, such as the statistics of batch normalisation:
    give the step of a copy of the model. Class ids and directions are zeros. Other threads may use these ops meanwhile.
    The step has to run eagerly; under `torch.compile` the ops launch the same kernels. Processes that share Triton's
    cache on disk compile once, and the others read.

    Args:
        step: runs a training step, or any other.
        workers: how many kernels are compiled at the same time; None for as many as there are cores.
        quiet: do not say what the user waits for.

    Example:
        >>> model, loss = copy.deepcopy(network).cuda(), UNEPTLoss()
        >>> compile_ahead(lambda: loss(model(images), labels)["loss"].backward())
    """
    if not HAS_TRITON or INTERPRETED:
        return
    refuse_capture("compile_ahead compiles kernels")
    with record_launches() as launches:
        step()
    wanted = [
        (launched.fn, {**arguments, **options}) if isinstance(launched, Tuner) else (launched, arguments)
        for launched, arguments in launches
        for options in (launched.options_to_try(arguments) if isinstance(launched, Tuner) else [{}])
    ]
    if not quiet:
        announce()
    with one_process_at_a_time(repr(sorted({kernel.__name__ for kernel, _ in wanted}))):
        compile_in_threads(wanted, workers)


def autotuned(
    configs: Sequence["triton.Config"],
    key: Sequence[str],
    adds_into: Sequence[str] = (),
    unspecialised: Sequence[str] = (),
    fit: Callable[["triton.Config", Mapping[str, Any]], "triton.Config"] | None = None,
) -> Callable[[Callable], Any]:
    """Compile a kernel for each new `key` and `size_bucket`, an argument that it takes, with the fastest of `configs`.

    Args:
        configs: the pool, the best guess first: that one is taken where nothing can be timed.
        key: names of the kernel's arguments, whose values JSON can hold: choices are kept on disk.
        adds_into: those that are a `ScatterBuffer`'s data, which every trial has to find at zero. After the trials they
            hold what they held before.
        unspecialised: see `jit`; `size_bucket` always is.
        fit: makes the configuration to try of one in the pool and the kernel's arguments by name; the same one is tried
            once.
    """

    def decorate(kernel: Callable) -> Any:
        compiled = jit(unspecialised=[*unspecialised, "size_bucket"])(kernel)
        if not HAS_TRITON:
            return compiled
        tuner = Tuner(
            compiled,
            compiled.arg_names,
            list(configs),
            [*key, "size_bucket"],
            reset_to_zero=list(adds_into),
            restore_value=None,
            do_bench=_brief_bench,
            cache_results=True,
        )
        tuner.fit = fit
        tuner.chosen = {}
        tuner.pointers = [name for name in compiled.arg_names if name.endswith("_ptr")]
        return tuner

    return decorate
