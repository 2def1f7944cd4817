"""How everything here is measured: gates, then rounds of A, B, C, A, B, C, ... that drift hits alike.

A `Group` is a problem and the variants that solve it. `measure` prepares the variants one after another (each has to
pass its gate), reads their peak memory, then times them in turns. Each variant's test hands its own samples to
pytest-benchmark, whose clock is set by them (`ReplayClock`): so its tables, JSON and comparisons work as ever.
"""

import ctypes
import importlib.metadata
import importlib.util
import math
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Bytes a second that a GPU's data sheet promises, by the name that torch.cuda.get_device_name gives.
BANDWIDTH = {
    "NVIDIA B200": 8.0e12,
    "AMD Instinct MI300X": 5.3e12,
    "NVIDIA GH200 144G HBM3e": 4.9e12,
    "NVIDIA GH200 480GB": 4.0e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA L40S": 0.864e12,
    "NVIDIA GeForce RTX 4090": 1.008e12,
}

MIB = 2**20
MIN_ROUND = 5e-3  # seconds; synchronising costs microseconds
ROUNDS = (3, 30)  # the fewest and the most
FLUSHED_BYTES = 256 * MIB  # more than any L2 cache holds
MAX_CLOCK = 2e9  # cycles a second, at the most
SECONDS = 4.0  # that a group's rounds take about, unless the fewest take longer

# What a variant may raise and thereby fail its own row only, not the other variants' of its group.
VARIANT_ERRORS: tuple[type[Exception], ...] = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
)
VARIANT_ERRORS += (OSError, RuntimeError, TypeError, ValueError)
if importlib.util.find_spec("triton"):
    from triton.errors import TritonError

    VARIANT_ERRORS += (TritonError,)


class Unavailable(Exception):
    """A variant can't run here; the message says why, and which pip package it lacks."""


@dataclass
class Variant:
    """One way to solve a group's problem."""

    step: Callable[[], object]
    """What is timed."""
    gate: Callable[[], None]
    """Raises AssertionError where the result is wrong."""
    context: Callable[[], AbstractContextManager] = nullcontext
    """Entered around gate and steps, outside the clock: the backend choice."""
    on_gpu: bool = True
    """Whether a step runs on the GPU, where there is one, and so takes time there."""


@dataclass
class Group:
    """A problem, by its name and what the report says of it."""

    name: str
    prepare: Callable[[str], Variant]
    """Makes the variant of a name; raises Unavailable."""
    baseline: str
    """The variant that the report's ratios refer to."""
    info: dict[str, object] = field(default_factory=dict)
    """shape, dtype and the like."""
    min_bytes: int = 0
    """That have to cross the memory bus at the least: each input read once, each output written once. 0: unknown."""
    images: int = 0
    """A step's images, for images/s. 0: not stated."""
    max_rounds: int = ROUNDS[1]


@dataclass
class Measured:
    """What a variant took."""

    seconds: list[float]
    """A step, a round each, as the host's clock sees them: small problems take as long as the host needs to launch."""
    peak_mib: float
    """Memory beyond what was allocated before a step."""
    device_seconds: float = math.nan
    """See `device_seconds`."""


class ReplayClock:
    """A timer that shows the times measured earlier."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: list[float] = []

    def __call__(self) -> float:
        """Seconds, as time.perf_counter gives them."""
        return self.now

    def load(self, seconds: Iterable[float]) -> None:
        """Have the next `tick`s take so long, one after another."""
        self.pending = list(seconds)

    def tick(self) -> None:
        """What pytest-benchmark times: one round."""
        self.now += self.pending.pop(0)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], object], iterations: int) -> float:
    """Seconds a call, of one synchronised round."""
    synchronize()
    start = perf_counter()
    for _ in range(iterations):
        step()
    synchronize()
    return (perf_counter() - start) / iterations


def device_seconds(step: Callable[[], object], host_seconds: float, rounds: int = 10) -> float:
    """Seconds that the GPU works on a step, whatever the host takes to launch it; NaN without a GPU.

    The median over rounds in which nothing of the step lies in the GPU's L2 cache at first.

    Args:
        step: must not wait for the GPU.
        host_seconds: a step takes at most, of the host's time. The GPU sleeps for twice as long in each round, so that
            everything is queued before it begins.
        rounds: how many.
    """
    if DEVICE != "cuda":
        return math.nan
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2 * host_seconds * MAX_CLOCK))
        flushed.zero_()
        start.record()
        step()
        end.record()
        synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def interleaved(variants: dict[str, Variant], max_rounds: int = ROUNDS[1]) -> dict[str, list[float]]:
    """Seconds a step of each variant, in rounds that take turns; the variants have been run before."""
    iterations, total = {}, 0.0
    for name, variant in variants.items():
        with variant.context():
            once = timed(variant.step, 1)
            if once < MIN_ROUND:
                once = timed(variant.step, 3)
        iterations[name] = max(1, math.ceil(MIN_ROUND / once))
        total += once * iterations[name]
    rounds = min(max_rounds, max(ROUNDS[0], int(SECONDS / total))) if variants else 0
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            with variant.context():
                samples[name].append(timed(variant.step, iterations[name]))
    return samples


def _resident(key: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def peak_mib(step: Callable[[], object]) -> float:
    """MiB that a step needs at its peak beyond what was there before; on a CPU, by the process's resident set."""
    if DEVICE == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if platform.system() != "Linux":
        step()
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier steps left, or this one would find it and not grow
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before) / MIB


def measure(group: Group, names: Iterable[str]) -> dict[str, Measured | Exception]:
    """Gate, peak memory and samples of each variant; for those that can't run or fail, the reason."""
    results: dict[str, Measured | Exception] = {}
    ready: dict[str, Variant] = {}
    torch.compiler.reset()  # or compiled variants of many groups pass Dynamo's limit and run eagerly
    for name in names:
        try:
            variant = group.prepare(name)
            with variant.context():
                variant.gate()
                variant.step()  # what autotuning, compiling and an optimiser's first step allocate is no part of a step
                results[name] = Measured([], peak_mib(variant.step))
            ready[name] = variant
        except Unavailable as reason:
            results[name] = reason
        except torch.OutOfMemoryError as error:
            # A baseline that takes more memory than there is has no row; a variant of this project fails.
            results[name] = error if name.startswith("unept") else Unavailable(f"out of memory: {error}")
        except VARIANT_ERRORS as error:
            results[name] = error.with_traceback(None)  # a traceback would keep its tensors
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    for name, seconds in interleaved(ready, group.max_rounds).items():
        results[name].seconds.extend(seconds)
        if ready[name].on_gpu:
            with ready[name].context():
                results[name].device_seconds = device_seconds(ready[name].step, statistics.median(seconds))
    return results


# --- gates ------------------------------------------------------------------------------------------------------------

FLOAT32_LIMIT = 1e-5


def assert_close(actual: Tensor, exact: Tensor, name: str, limit: float | None = None) -> None:
    """The accuracy gate of tests/helpers/accuracy.py, computed on the tensors' device: these are large.

    Args:
        actual: what a variant computed.
        exact: the float64 reference, of the same shape.
        name: for the message.
        limit: relative to the largest element (max-abs) and to the RMS (RMS). None: 1e-5, and for half precision at
            most twice the error of the exact result rounded to that dtype.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} is not {tuple(exact.shape)}"
    exact = exact.double()

    def size(t: Tensor) -> tuple[float, float]:
        return t.abs().max().item(), t.square().mean().sqrt().item()

    errors, limits = size(actual.double() - exact), tuple((limit or FLOAT32_LIMIT) * s for s in size(exact))
    if limit is None and actual.dtype in (torch.float16, torch.bfloat16):
        rounding = size(exact.to(actual.dtype).double() - exact)
        floor = torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item()
        limits = (max(2 * rounding[0], floor), 2 * rounding[1])
    for kind, error, bound in zip(("max-abs", "RMS"), errors, limits, strict=True):
        assert error <= bound, f"{name}: {kind} error {error:.3g} is over {bound:.3g}"  # fails for NaN too


# --- what a result carries --------------------------------------------------------------------------------------------


def device_name() -> str:
    """The GPU's name, or the CPU's and how many threads PyTorch uses."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].split(': ')[1] if models else platform.machine()}, {torch.get_num_threads()} thread(s)"


Key = TypeVar("Key")


def seconds_in_turn(functions: Mapping[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Return the median seconds of functions that wait for their result, by the keys of the functions.

    They take turns, so that what else the machine does slows all of them. One more round, before, is not counted.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in functions}
    for _ in range(rounds + 1):
        for key, function in functions.items():
            start = perf_counter()
            function()
            seconds[key].append(perf_counter() - start)
    return {key: statistics.median(of[1:]) for key, of in seconds.items()}


def version(package: str) -> str:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def revision() -> str:
    """The commit that is measured, marked where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if not shutil.which("git"):
        return "unknown"

    # Results are no part of what is measured.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def extra_info(group: Group, name: str, measured: Measured, package: str | None = None) -> dict[str, object]:
    """Return what the report reads besides the samples (`bench.report`); `package` is the source of a baseline."""
    median = statistics.median(measured.seconds)
    info: dict[str, object] = {
        "variant": name,
        "baseline": group.baseline,
        "peak_mib": round(measured.peak_mib, 1),
        "device": device_name(),
        "revision": revision(),
        "torch": torch.__version__,
        "triton": version("triton"),
        **group.info,
    }
    if package:
        info["package"] = f"{package} {version(package)}"
    if group.images:
        info["images_per_second"] = group.images / median
    if not math.isnan(measured.device_seconds):
        info["device_seconds"] = measured.device_seconds
    if group.min_bytes:
        info["gb_per_second"] = group.min_bytes / median / 1e9
        if "device_seconds" in info and (bandwidth := BANDWIDTH.get(device_name())):
            # Of the GPU's own time: where the host is slower, its time says nothing about the kernels.
            info["share_of_bound"] = group.min_bytes / measured.device_seconds / bandwidth
    return info
