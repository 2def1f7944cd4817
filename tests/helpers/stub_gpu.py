"""A GPU that is not there: Triton's JIT and autotuner run on CPU tensors as they do on a GPU, and kernels do nothing.

    log = stub_gpu.install()            # before any launch, in a process without TRITON_INTERPRET
    ...                                 # every op runs through Triton; what it returns is what the memory held
    log.compilations, log.launches      # counted by kernel

What that finds: arguments that don't bind, options that a launch refuses, grids over the limits, autotuning and its
choices on disk, compilations that another size causes, launches that a step makes, the host's time for a launch. By
default nothing is compiled, and a second holds thousands of launches. `install(compiles=True)` compiles for sm_90, and
launches by Triton's own launcher over stub_cuda.c, a libcuda of empty functions; that needs gcc.
"""

import collections
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime.jit import JITFunction

import unept.kernels
from unept.kernels import backend

SOURCE = Path(__file__).with_name("stub_cuda.c")
LARGEST_GRID = 2**31 - 1, 65535, 65535


@dataclass
class Log:
    """What has happened since `install` or `clear`, by kernel."""

    compilations: collections.Counter = field(default_factory=collections.Counter)
    launches: collections.Counter = field(default_factory=collections.Counter)

    def clear(self) -> None:
        """Forget it."""
        self.compilations.clear()
        self.launches.clear()


class Event:
    """A CUDA event by the host's clock; kernels take a millisecond at the least, so that few runs are timed."""

    def __init__(self, **_: Any):
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3 + 10.0


def empty_kernel(source: Any) -> Any:
    """What Triton makes of a kernel, without anything in it."""

    def run(x: int, y: int, z: int, *_: Any) -> None:
        assert all(1 <= n <= limit for n, limit in zip((x, y, z), LARGEST_GRID, strict=True)), (source.name, x, y, z)

    return SimpleNamespace(
        name=source.name, run=run, function=None, packed_metadata=None, launch_metadata=lambda *_: None
    )


class Driver(GPUDriver):
    """One device of compute capability 9.0 whose tensors lie in the host's memory."""

    def __init__(self) -> None:
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device=None: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(Event=Event, synchronize=lambda *_: None)

    def get_benchmarker(self) -> Callable:
        return triton.testing.do_bench

    def get_empty_cache_for_benchmark(self) -> Any:
        return torch.empty(8)

    def clear_cache(self, cache: Any) -> None:
        pass


def build(folder: Path) -> ctypes.CDLL:
    """Compile stub_cuda.c into a folder, where Triton then looks for libcuda."""
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", str(SOURCE), "-o", str(library), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, check=True, timeout=60)
    triton.knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def add_launcher(driver: Driver) -> None:
    """Let a driver launch by Triton's own launcher."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils, ty_to_cpp

    build(Path(tempfile.mkdtemp(prefix="stub-gpu-")))
    driver.utils, driver.launcher_cls = CudaUtils(), CudaLauncher
    driver.map_python_to_cpp_type = ty_to_cpp


def count_compilations(log: Log, compiles: bool) -> None:
    """Count what Triton compiles, and compile it or leave it empty."""
    compile_kernel = triton.compiler.compile

    def counted(source: Any, *args: Any, **options: Any) -> Any:
        log.compilations[source.name] += 1
        return compile_kernel(source, *args, **options) if compiles else empty_kernel(source)

    triton.compiler.compile = counted


def count_launches(log: Log) -> None:
    """Count what is launched, by the name of the kernel."""
    run = JITFunction.run

    def counted(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        log.launches[self.__name__] += not warmup
        return run(self, *args, warmup=warmup, **kwargs)

    JITFunction.run = counted


def install(compiles: bool = False) -> Log:
    """Put the stub in the place of the GPU, for the rest of the process: every op on CPU tensors runs on Triton."""
    log, driver = Log(), Driver()
    if compiles:
        add_launcher(driver)
    triton.runtime.driver.set_active(driver)
    count_compilations(log, compiles)
    count_launches(log)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(name="stub", multi_processor_count=132)
    torch.cuda.is_current_stream_capturing = lambda: False
    backend.INTERPRETED = True  # lets CPU tensors through
    unept.kernels.use_backend("triton")
    return log
