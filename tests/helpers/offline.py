"""Compile the Triton kernels for GPUs that are not there, at the paper's shapes.

    python -m tests.helpers.offline [--all] [--record]

Each entry of OPS in `offline_ops` calls the launchers of an op on tensors without memory. The launches are recorded
instead of run, and the kernels of the ops OF_THE_PAPER are compiled for sm_90 in the first configuration of their
autotune pool. `--all` compiles the kernels of all ops, in all configurations, for all TARGETS.

Prints one JSON row per launch, which says how it is tuned, and one per compiled kernel: op, kernel, dtype, target,
config, shared memory in bytes per program, seconds of a CPU that compiling took (none where Triton's cache has it), and
on NVIDIA the registers and the stack in bytes per thread (a stack means that registers were spilled). On sm_90 it also
says what the machine code does:

    instructions    in the hot loop of a warp, divided by the elements (samples, records, pixels) that the warp handles
                    in a turn: what the kernel costs the GPU's schedulers. Where the compiler unrolls a loop, all its
                    turns count
    opcodes         how often the hot loop reads, writes and adds to memory, by instruction
    layouts_across_barrier    of what a thread writes, and reads after a barrier: one layout, or it reads what another
                    thread wrote, which on AMD's GPUs takes more than a barrier
    summed_products    axes along which products are summed, without being rounded before
    differences     how often the kernel subtracts a value from itself. That is zero, or NaN, only while the compiler
                    does not make one multiply-add of a product and the subtraction: no test may rest on it

The hot loop is the innermost one with the most instructions, or the whole kernel if it has no loop. `--all --record`
writes the counts to instructions.json; `tests/kernels/test_compile_offline.py` allows at most 10 % more.

Kernels are compiled only in a process without TRITON_INTERPRET.
"""

import collections
import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, KernelParam

import unept.kernels
from tests.helpers.offline_ops import OPS
from unept.kernels._autotune import Tuner
from unept.kernels._scatter import ScatterBuffer

# Bytes of shared memory that a program can have.
SHARED_MEMORY = {"sm_90": 227 << 10, "sm_80": 163 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
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

    originals = Tuner.run, JITFunction.run
    make_buffer = ScatterBuffer.__init__
    Tuner.run = JITFunction.run = record
    ScatterBuffer.__init__ = make
    try:
        call()
    finally:
        Tuner.run, JITFunction.run = originals
        ScatterBuffer.__init__ = make_buffer
    return launches, buffers


@dataclass
class Specialisation:
    """What Triton's launcher says to the compiler about one parameter's arguments."""

    parameter: KernelParam
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]

    def type_of(self, argument: Any, path: tuple[int, ...]) -> Any:
        """The argument's type; fills in constants and known divisibility by 16."""
        if isinstance(argument, tuple):
            return tuple(self.type_of(item, (*path, i)) for i, item in enumerate(argument))
        if isinstance(argument, Tensor):
            self.attributes[path] = [["tt.divisibility", 16]]
            return POINTER_TYPES[argument.dtype]
        if isinstance(argument, float):
            return "fp32"
        if argument is None or (argument == 1 and not self.parameter.do_not_specialize):
            self.constants[path] = argument
            return "constexpr"
        if argument % 16 == 0 and not (
            self.parameter.do_not_specialize or self.parameter.do_not_specialize_on_alignment
        ):
            self.attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= argument < 2**31 else "i64"


def compiled(kernel: JITFunction, arguments: dict[str, Any], config: triton.Config, target: GPUTarget) -> Any:
    arguments = {**arguments, **config.all_kwargs()}
    if target.backend == "hip":
        # The launchers look for the GPU that is here; AMD's have no such mode.
        arguments = {name: "ieee" if argument == "tf32x3" else argument for name, argument in arguments.items()}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        argument = arguments.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", argument
        else:
            signature[parameter.name] = Specialisation(parameter, constants, attributes).type_of(argument, (i,))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: option for name, option in arguments.items() if option is not None}
    return triton.compile(source, target=target, options=options)


def measured(*arguments: Any) -> tuple[Any, dict[str, Any]]:
    """What `compiled` gives, and what that cost."""
    cpu_seconds = lambda: sum(os.times()[:4])  # ptxas is a process of its own
    start = cpu_seconds()
    binary = compiled(*arguments)
    return binary, {"seconds": round(cpu_seconds() - start, 2), "shared": binary.metadata.shared}


def disassembled(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    usage = disassembled(cubin, "-res-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return {"registers": int(match[1]), "stack": int(match[2])}


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*);", re.M)


def hot_loop(machine_code: str) -> list[str]:
    """The opcodes of the innermost loop that has the most of them; all opcodes if there is no loop."""
    lines = [(int(address, 16), opcode, rest) for address, opcode, rest in INSTRUCTION.findall(machine_code)]
    at = {address: i for i, (address, _, _) in enumerate(lines)}
    loops = []
    for i, (address, opcode, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        # The last branch of a kernel jumps to itself.
        if target and int(target[1], 16) < address:
            loops.append((at[int(target[1], 16)], i))
    innermost = [loop for loop in loops if not any(loop != o and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, len(lines) - 1))
    return [opcode for _, opcode, _ in lines[start : end + 1] if opcode != "NOP"]


MEMORY = re.compile(r"LD|ST|RED|ATOM|BAR|SHFL")


SELF_DIFFERENCE = re.compile(r"arith\.subf (%[\w#]+), \1 ")


DEFINITION = re.compile(r"^\s+(%\w+)(?::\d+)? = ([\w.\"]+)", re.M)
REDUCTION = re.compile(r'"tt\.reduce"\((%\w+)\) <\{axis = (\d+)')


def summed_products(ttir: str) -> list[int]:
    """The axes along which a kernel sums or compares products that are not rounded before: the compiler may make
    multiply-adds of the products and the sum, others in each lane."""
    operation = dict(DEFINITION.findall(ttir))
    return [int(axis) for operand, axis in REDUCTION.findall(ttir) if operation.get(operand) == "arith.mulf"]


BARRIER = re.compile(r"^\s+(?:ttg|gpu)\.barrier", re.M)
# The last store before a barrier, and the loads of `grad_weight` after it, each with its layout.
STORE = re.compile(r"tt\.store .*!tt\.ptr<\w+>, (#\w+)>")
LOAD_AGAIN = re.compile(r"%grad_weight\w* = tt\.load .*!tt\.ptr<\w+>, (#\w+)>")


def layouts_across_barrier(ttgir: str) -> list[str]:
    """In which layouts a kernel writes and then reads what lies between its passes; empty without two passes."""
    before, *after = BARRIER.split(ttgir)
    return sorted({*STORE.findall(before)[-1:], *LOAD_AGAIN.findall("".join(after))}) if after else []


# Kernels that execute one atomic instruction per element: their number tells how often the assembler unrolled the loop.
ONE_ATOMIC_PER_ELEMENT = ("bin_backward_kernel",)


def work(name: str, cubin: bytes, config: triton.Config) -> dict[str, Any]:
    machine_code = disassembled(cubin, "-sass")
    opcodes = hot_loop(machine_code)
    elements = math.prod(config.kwargs.values()) / config.num_warps
    if name.endswith(ONE_ATOMIC_PER_ELEMENT):
        elements = 32 * sum(opcode.startswith(("RED", "ATOM")) for opcode in opcodes)
    return {
        "instructions": round(len(opcodes) / elements, 3),
        "opcodes": collections.Counter(opcode for opcode in opcodes if MEMORY.match(opcode)),
        "compare_and_swap": sum("CAS" in opcode for _, opcode, _ in INSTRUCTION.findall(machine_code)),
    }


# The ops as the network of the paper calls them on a GPU; the other entries are variants of their kernels.
OF_THE_PAPER = ("sparse_sampling", "bilinear_gather", "upsample_cross_entropy", "boundary_targets")


def report(everything: bool) -> Iterator[dict[str, Any]]:
    """The rows of all launches, and of the kernels that are compiled."""
    for op, (call, dtype_names) in OPS.items():
        for dtype_name in dtype_names:
            launches, buffers = recorded_launches(partial(call, DTYPES[dtype_name]))
            for launch, (launched, arguments) in enumerate(launches):
                row = {"op": op, "kernel": qualified_name(launched), "dtype": dtype_name, "launch": launch}
                yield {**row, **autotuning(launched, arguments, buffers)}
                if everything or op in OF_THE_PAPER:
                    for compiled_row in compiled_rows(launched, arguments, everything):
                        yield {**row, **compiled_row}


def compiled_rows(launched: Any, arguments: dict[str, Any], everything: bool) -> Iterator[dict[str, Any]]:
    """What compiling one launch gives: in the first configuration for sm_90, or in all for all TARGETS."""
    kernel = launched.fn if isinstance(launched, Autotuner) else launched
    configs = configurations(launched, arguments)
    for config in configs if everything else configs[:1]:
        binary, costs = measured(kernel, arguments, config, TARGETS["sm_90"])
        assembly = binary.asm
        cubin, differences = assembly["cubin"], len(SELF_DIFFERENCE.findall(assembly["ttir"]))
        sizes = {**config.kwargs, "num_warps": config.num_warps}
        found = {**resources(cubin), **work(kernel.__name__, cubin, config), "differences": differences}
        found["summed_products"] = summed_products(assembly["ttir"])
        found["layouts_across_barrier"] = layouts_across_barrier(assembly["ttgir"])
        yield {"target": "sm_90", "config": sizes, **costs, **found}
    for name, target in list(TARGETS.items())[1:] if everything else []:
        binary, costs = measured(kernel, arguments, configs[0], target)
        used = resources(binary.asm["cubin"]) if target.backend == "cuda" else {}
        layouts = layouts_across_barrier(binary.asm["ttgir"])
        yield {"target": name, "config": configs[0].kwargs, "layouts_across_barrier": layouts, **costs, **used}


def configurations(launched: Any, arguments: dict[str, Any]) -> list[triton.Config]:
    """The configurations of a launch, as they are tried."""
    if not isinstance(launched, Autotuner):
        return [fixed_config(arguments)]
    launched.nargs = {}
    return launched.prune_configs(arguments)


def fixed_config(arguments: dict[str, Any]) -> triton.Config:
    """What a launch that isn't tuned was called with, as a configuration."""
    blocks = {name: size for name, size in arguments.items() if re.match("BLOCK_[NQRPS]$", name)}
    return triton.Config(blocks, num_warps=arguments.get("num_warps", 4))


def autotuning(launched: Any, arguments: dict[str, Any], buffers: list[ScatterBuffer]) -> dict[str, Any]:
    """The names of the arguments that are added into, that each trial finds at zero, and that a choice holds for; and
    whether the launch says if multiply-adds may be formed, whose default changes between versions of Triton."""
    data = {id(buffer.data) for buffer in buffers}
    return {
        "added_into": [name for name, argument in arguments.items() if id(argument) in data],
        "reset_to_zero": getattr(launched, "reset_to_zero", []),
        "says_fusion": "enable_fp_fusion" in arguments,
        "key": getattr(launched, "keys", []),
        "key_values": [repr_or_value(arguments[name]) for name in getattr(launched, "keys", [])],
    }


def repr_or_value(argument: Any) -> Any:
    """What JSON can hold; a list with its representation for all else."""
    return argument if isinstance(argument, bool | int | str) else [repr(argument)]


def qualified_name(launched: Any) -> str:
    kernel = launched.fn if isinstance(launched, Autotuner) else launched
    return f"{kernel.__module__}.{kernel.__name__}"


def members_of_the_package() -> list[Any]:
    """What the modules of the package hold, some of it several times."""
    names = [found.name for found in pkgutil.walk_packages(unept.kernels.__path__, "unept.kernels.")]
    return [item for name in names for item in vars(importlib.import_module(name)).values()]


def kernels_of_the_package() -> set[str]:
    """The names of all kernels; the functions that kernels call are not named `..._kernel`."""
    found = {qualified_name(item) for item in members_of_the_package() if isinstance(item, Autotuner | JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


def size_of_largest_pool() -> int:
    """The number of configurations in the largest pool of any kernel."""
    return max(len(item.configs) for item in members_of_the_package() if isinstance(item, Tuner))


RECORD = Path(__file__).with_name("instructions.json")


def record_key(row: dict[str, Any]) -> str:
    kernel, sizes = row["kernel"].split(".")[-1], row["config"].values()
    return " ".join([row["op"], str(row["launch"]), kernel, row["dtype"], *map(str, sizes)])


def record(rows: list[dict[str, Any]]) -> None:
    """Write the instruction counts of this version of Triton into RECORD."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    version = ".".join(triton.__version__.split(".")[:2])
    recorded[version] = {record_key(row): row["instructions"] for row in rows if "instructions" in row}
    RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    rows = []
    for line in report("--all" in sys.argv):
        rows.append(line)
        print(json.dumps(line), flush=True)
    print(json.dumps({"kernels": sorted(kernels_of_the_package())}))
    if "--record" in sys.argv:
        record(rows)
