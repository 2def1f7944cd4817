"""What attention costs before it runs: machine instructions per sample, compiled for a GPU that is not there.

    python -m bench.static_counts

Compiles the attention of this project and, where it is installed, of `deformops` for sm_90 at the paper's encoder
(B=2, 3 levels of 60x60 pixels, M=8, D=32, N=16), and counts the instructions that a warp executes for a sample in the
hot loops of all kernels of a pass. This says nothing of memory and waiting: the timed comparison is
`bench/test_attention.py`, on a GPU.

    instructions  of a warp per sample; a gather of D channels from four pixels and their sum, and what comes with it
    atomics       how many of these add into memory atomically

Kernels that walk over pixels rather than samples (ours copies maps into a frame of zeros first) are not in the sums.
`deformops` needs Python 3.12: `pip install deformops`. Its kernels alone can be compiled under an older Python as well:
`pip install --no-deps --ignore-requires-python deformops`.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from tests.helpers import offline
from tests.helpers.offline import ONE_ATOMIC_PER_ELEMENT, OPS, compiled_rows, recorded_launches

SHAPES = [(60, 60)] * 3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KERNELS_OF_PIXELS = ("pad_kernel",)


@dataclass
class Count:
    """A pass of an implementation."""

    name: str
    dtype: str
    direction: str
    instructions: float
    atomics: float

    def row(self) -> str:
        """A row of the table."""
        return f"| {self.name} | {self.dtype} | {self.direction} | {self.instructions:.1f} | {self.atomics:.2f} |"


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the paper's encoder, without memory; those of Deformable DETR's signature."""
    length = sum(height * width for height, width in SHAPES)

    def meta(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    return {
        "value": meta(2, length, 8, 32),
        "spatial_shapes": meta(len(SHAPES), 2, dtype=torch.int64),
        "level_start_index": meta(len(SHAPES), dtype=torch.int64),
        "sampling_locations": meta(2, length, 8, len(SHAPES), 16, 2),
        "attention_weights": meta(2, length, 8, len(SHAPES), 16),
    }


def ours(dtype_name: str) -> Iterator[Count]:
    """Both passes of `sparse_sampling_attention`, whose softmax is inside."""
    launches, _ = recorded_launches(partial(OPS["sparse_sampling"][0], DTYPES[dtype_name]))
    sums = {"forward": [0.0, 0.0], "backward": [0.0, 0.0]}
    direction = "forward"
    for launched, arguments in launches:
        name = getattr(launched, "fn", launched).__name__
        if name not in KERNELS_OF_PIXELS:
            row = next(compiled_rows(launched, arguments, everything=False))
            sums[direction][0] += row["instructions"]
            sums[direction][1] += atomics_of(name, row)
        if name == "forward_kernel":
            direction = "backward"
    for direction, (instructions, atomics) in sums.items():
        yield Count("unept, softmax included", dtype_name, direction, instructions, atomics)


def atomics_of(name: str, row: dict[str, Any]) -> float:
    """Atomic instructions of a warp per sample."""
    config = dict(row["config"])
    warps = config.pop("num_warps")
    found = sum(count for opcode, count in row["opcodes"].items() if opcode.startswith(("RED", "ATOM")))
    # Where each thread has samples of its own, `offline` counts 32 of them per atomic instruction.
    return 1 / 32 if found and name.endswith(ONE_ATOMIC_PER_ELEMENT) else found * warps / math.prod(config.values())


def deformops(dtype_name: str) -> Iterator[Count]:
    """The query-tiled kernels of `deformops`, which it takes by default on Hopper, in both settings of fp32acc."""
    launch = importlib.import_module("deformops.backends.triton._launch")
    kernels = importlib.import_module("deformops.backends.triton._kernels.msda_query_tiled")
    # Wrapped, a kernel becomes an operator that runs nothing on tensors without memory.
    launch.wrap_triton = kernels.wrap_triton = lambda kernel: kernel
    tensors = inputs(DTYPES[dtype_name])
    grad_out = torch.empty_like(tensors["value"])
    for name, aggregate in (("deformops, softmax outside", 0), ("deformops, softmax included", 1)):
        forward = partial(launch.query_tiled_forward_launch, *tensors.values(), aggregate)
        yield count(name, dtype_name, "forward", forward)
    for name, backward in (
        ("deformops, softmax outside", kernels.atomic_backward_launch),
        ("deformops, fp32acc, softmax outside", kernels.float32_backward_launch),
    ):
        yield count(name, dtype_name, "backward", partial(backward, grad_out, *tensors.values()))


def count(name: str, dtype_name: str, direction: str, call: Callable[[], Any]) -> Count:
    """Compile the one kernel that a call launches, whose hot loop takes one sample of each of BLOCK_SIZE_Q queries."""
    ((kernel, arguments),), _ = recorded_launches(call)
    warps = arguments.get("num_warps", 4)
    config = triton.Config({}, num_warps=warps)
    binary = offline.compiled(kernel, arguments, config, offline.TARGETS["sm_90"])
    opcodes = offline.hot_loop(offline.disassembled(binary.asm["cubin"], "-sass"))
    samples = arguments["BLOCK_SIZE_Q"] / warps
    atomic = sum(opcode.startswith(("RED", "ATOM")) for opcode in opcodes)
    return Count(name, dtype_name, direction, len(opcodes) / samples, atomic / samples)


def counts() -> Iterator[Count]:
    """All rows; those of packages that cannot be imported are left out with a line on stderr."""
    for dtype_name in DTYPES:
        yield from ours(dtype_name)
        try:
            yield from deformops(dtype_name)
        except (ImportError, SyntaxError) as error:
            print(f"without deformops ({error}): pip install deformops, with Python 3.12 or newer", file=sys.stderr)


def main() -> None:
    """Print the table."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("kernels cannot be compiled where TRITON_INTERPRET is set: unset it")
    print("| implementation | dtype | pass | instructions per sample | atomics per sample |")
    print("|---|---|---|---|---|")
    for found in counts():
        print(found.row(), flush=True)


if __name__ == "__main__":
    main()
