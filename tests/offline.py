"""Compile the Triton kernels for GPUs that are not there, at the paper's shapes: `python tests/offline.py [--all]`.

Each entry of OPS in tests/offline_ops.py calls an op's launchers on tensors without memory. The launches are recorded
instead of run, and their kernels compiled for what they were called with. Prints one JSON row a launch, about its
autotuning, and one a compiled kernel: op, kernel, dtype, target, config, and on NVIDIA registers and stack (bytes a
thread; a stack means that registers were spilled). On sm_90 it goes through the autotune pool up to the first
configuration that doesn't spill, with `--all` to the end.

Needs a process without TRITON_INTERPRET: the interpreter leaves nothing to compile.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import unept.kernels
from offline_ops import OPS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from unept.kernels._triton import ScatterBuffer

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POINTER_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def recorded_launches(call: Callable[[], None]) -> tuple[list[tuple[Any, dict[str, Any]]], list[ScatterBuffer]]:
    """The kernels that `call` launches and their arguments by name, and the buffers for adding into; nothing runs."""
    launches: list[tuple[Any, dict[str, Any]]] = []
    buffers: list[ScatterBuffer] = []

    def make(self: ScatterBuffer, *args: Any, **kwargs: Any) -> None:
        buffers.append(self)
        make_buffer(self, *args, **kwargs)

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}))

    originals = Autotuner.run, JITFunction.run
    make_buffer = ScatterBuffer.__init__
    Autotuner.run = JITFunction.run = record
    ScatterBuffer.__init__ = make
    try:
        call()
    finally:
        Autotuner.run, JITFunction.run = originals
        ScatterBuffer.__init__ = make_buffer
    return launches, buffers


def specialised(argument: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """The type that Triton's launcher gives an argument; fills in constants and known divisibility by 16."""
    if isinstance(argument, tuple):
        return tuple(specialised(item, (*path, i), constants, attributes) for i, item in enumerate(argument))
    if isinstance(argument, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTER_TYPES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    if argument is None or argument == 1:
        constants[path] = argument
        return "constexpr"
    if argument % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def compiled(kernel: JITFunction, arguments: dict[str, Any], config: triton.Config, target: GPUTarget) -> Any:
    arguments = {**arguments, **config.all_kwargs()}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        argument = arguments.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", argument
        else:
            signature[parameter.name] = specialised(argument, (i,), constants, attributes)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: option for name, option in arguments.items() if option is not None}
    return triton.compile(source, target=target, options=options)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return {"registers": int(match[1]), "stack": int(match[2])}


def report(every_config: bool) -> Iterator[dict[str, Any]]:
    """Rows for all kernels: on sm_90 the configurations in order, on the other targets the first that spills least."""
    for op, (call, dtype_names) in OPS.items():
        for dtype_name in dtype_names:
            launches, buffers = recorded_launches(partial(call, DTYPES[dtype_name]))
            for launched, arguments in launches:
                kernel = launched.fn if isinstance(launched, Autotuner) else launched
                configs = launched.configs if isinstance(launched, Autotuner) else [triton.Config({})]
                row = {"op": op, "kernel": qualified_name(launched), "dtype": dtype_name}
                yield {**row, **autotuning(launched, arguments, buffers)}
                best, least_stack = configs[0], sys.maxsize
                for config in configs:
                    used = resources(compiled(kernel, arguments, config, TARGETS["sm_90"]).asm["cubin"])
                    yield {**row, "target": "sm_90", "config": str(config), **used}
                    if used["stack"] < least_stack:
                        best, least_stack = config, used["stack"]
                    if least_stack == 0 and not every_config:
                        break
                for name, target in list(TARGETS.items())[1:]:
                    binary = compiled(kernel, arguments, best, target)
                    used = resources(binary.asm["cubin"]) if target.backend == "cuda" else {}
                    yield {**row, "target": name, "config": str(best), **used}


def autotuning(launched: Any, arguments: dict[str, Any], buffers: list[ScatterBuffer]) -> dict[str, list[str]]:
    """The names of the arguments that are added into, that each trial finds at zero, and that a choice holds for."""
    data = {id(buffer.data) for buffer in buffers}
    return {
        "added_into": [name for name, argument in arguments.items() if id(argument) in data],
        "reset_to_zero": getattr(launched, "reset_to_zero", []),
        "key": getattr(launched, "keys", []),
    }


def qualified_name(launched: Any) -> str:
    kernel = launched.fn if isinstance(launched, Autotuner) else launched
    return f"{kernel.__module__}.{kernel.__name__}"


def kernels_of_the_package() -> set[str]:
    """The names of all kernels; the functions that kernels call are not named `..._kernel`."""
    names = [found.name for found in pkgutil.iter_modules(unept.kernels.__path__)]
    members = [item for name in names for item in vars(importlib.import_module(f"unept.kernels.{name}")).values()]
    found = {qualified_name(item) for item in members if isinstance(item, Autotuner | JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


if __name__ == "__main__":
    for line in report(every_config="--all" in sys.argv):
        print(json.dumps(line), flush=True)
    print(json.dumps({"kernels": sorted(kernels_of_the_package())}))
