"""Which devices compute in bfloat16 under `amp="auto"`."""

import functools
import warnings
from typing import Literal

import torch

Amp = Literal["auto", "bf16", "off"]


def uses_bfloat16(amp: Amp, device_type: str) -> bool:
    """Whether to autocast to bfloat16: for `"bf16"`, and for `"auto"` on CUDA and on CPUs that multiply in it."""
    if amp == "bf16" and device_type == "cpu" and not cpu_multiplies_bfloat16():
        warnings.warn(
            "this CPU has no instructions for bfloat16 and emulates it, many times slower than float32: "
            "use --amp auto (amp='auto' in Python)",
            stacklevel=2,
        )
    if amp != "auto":
        return amp == "bf16"
    return device_type == "cuda" or (device_type == "cpu" and cpu_multiplies_bfloat16())


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in old versions
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
