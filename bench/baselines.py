"""Multi-scale deformable attention of other projects, each behind one signature.

    op(value (B, S, M, D), maps, locations (B, Q, M, L, N, 2), weights (B, Q, M, L, N)) -> (B, Q, M * D)

Locations are (x, y) in [0, 1], float32; weights are normalised, float32; value has any dtype. A baseline that takes
one dtype for all gets a float32 copy of value, as under autocast, and the copy is timed: bfloat16 locations would miss
by a quarter of a pixel.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from unept.kernels import reference

from .harness import DEVICE, Unavailable


@dataclass
class Maps:
    """The levels' sizes in each of the forms that the ops ask for."""

    shapes: list[tuple[int, int]]
    """(height, width) of each level."""

    def __post_init__(self) -> None:
        self.tensor = torch.tensor(self.shapes, device=DEVICE)
        areas = self.tensor.prod(1)
        self.starts = areas.cumsum(0) - areas
        self.sizes = self.tensor.flip(1)[:, None].float()  # (L, 1, 2), (width, height)


Op = Callable[[Tensor, Maps, Tensor, Tensor], Tensor]


def imported(module: str, package: str, path: Sequence[str] | None = None) -> ModuleType:
    """A module, looked for in `path` or sys.path; Unavailable names its pip package where it is not installed."""
    if path is None:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise Unavailable(f"pip install {package} ({error})") from error
    spec = PathFinder.find_spec(module, list(path))
    if spec is None or spec.loader is None:
        raise Unavailable(f"pip install {package}")
    found = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def needs_cuda(what: str) -> None:
    """Raise Unavailable on a CPU."""
    if DEVICE != "cuda":
        raise Unavailable(f"{what} runs on CUDA only")


def grid_sample(value: Tensor, maps: Maps, locations: Tensor, weights: Tensor) -> Tensor:
    """The definition by F.grid_sample (`unept.kernels.reference`): the fallback in PyTorch, and the gates' measure."""
    dtype = locations.dtype
    out = reference.ms_deform_attn(value.to(dtype), maps.shapes, None, locations, weights.to(dtype))
    return out.to(value.dtype)


def torch_ms_deform_attn() -> Op:
    """The op of Deformable DETR as a C++ and CUDA extension on PyPI."""
    op = imported("torch_ms_deform_attn", "torch-ms-deform-attn").ms_deform_attn

    def run(value: Tensor, maps: Maps, locations: Tensor, weights: Tensor) -> Tensor:
        return op(value.float(), maps.tensor, maps.starts, locations, weights).to(value.dtype)

    return run


def transformers() -> Op:
    """Hugging Face's op, as its models run it without hub kernels."""
    imported("transformers", "transformers")
    mask2former = imported("transformers.models.mask2former.modeling_mask2former", "transformers torchvision scipy")

    def run(value: Tensor, maps: Maps, locations: Tensor, weights: Tensor) -> Tensor:
        out = mask2former.multi_scale_deformable_attention(value.float(), maps.shapes, locations, weights)
        return out.to(value.dtype)

    return run


def hub_kernel() -> Op:
    """Hugging Face's op, as its models run it with the package `kernels`, which fetches it from the hub."""
    needs_cuda("the hub's kernel")
    # Not this repository's folder of that name.
    root = Path(__file__).parents[1].resolve()
    package = imported("kernels", "kernels", path=[p for p in sys.path if Path(p).resolve() != root])
    try:
        layers = package.get_kernel("kernels-community/deformable-detr", version=1).layers
    except (OSError, ValueError) as error:  # no network; it then can't verify the publisher either
        raise Unavailable(f"kernels-community/deformable-detr can't be had from the hub: {error}") from error
    layer = layers.MultiScaleDeformableAttention()

    def run(value: Tensor, maps: Maps, locations: Tensor, weights: Tensor) -> Tensor:
        out = layer(value.float(), maps.tensor, maps.shapes, maps.starts, locations, weights, 64)
        return out.to(value.dtype)

    return run


def msda_triton() -> Op:
    """Another Triton implementation."""
    needs_cuda("msda-triton")
    # Not the package's public function, which runs grid_sample without a word where the kernels fail.
    frontend = imported("msda_triton.frontend", "msda-triton (from github.com/rziga/msda-triton)")

    def run(value: Tensor, maps: Maps, locations: Tensor, weights: Tensor) -> Tensor:
        out = frontend.triton_multiscale_deformable_attention(
            value.float(), maps.tensor, locations, weights, padding_mode="zeros", align_corners=False
        )
        return out.flatten(2).to(value.dtype)

    return run


def dcnv4() -> Op:
    """DCNv4's FlashDeformAttn: takes logits (B, Q, M, L, N) in place of weights, float16 throughout, N of 4 or 8."""
    needs_cuda("DCNv4")
    function = imported("DCNv4", "DCNv4").FlashDeformAttnFunction

    def run(value: Tensor, maps: Maps, locations: Tensor, logits: Tensor) -> Tensor:
        both = torch.cat([locations.half().flatten(3), logits.half().flatten(3)], dim=-1)
        return function.apply(value, maps.tensor, maps.starts, both, value.shape[0], logits.shape[-1]).flatten(2)

    return run


def deformops(fp32acc: bool, softmax: bool = False) -> Op:
    """The Triton backend of deformops, all tensors in the dtype of value.

    Args:
        fp32acc: sum the gradient of value in float32, not in value's dtype.
        softmax: take logits (B, Q, M, L, N) in place of weights.
    """
    needs_cuda("deformops")
    registry = imported("deformops.registry", "deformops (with Python 3.12 or newer)")
    options = {"backend": registry.Backend.TRITON, "fp32acc": fp32acc, "softmax": softmax}

    def run(value: Tensor, maps: Maps, locations: Tensor, scores: Tensor) -> Tensor:
        tensors = (locations.to(value.dtype).contiguous(), scores.to(value.dtype).contiguous())
        return registry.msda(value, maps.tensor, maps.starts, *tensors, **options)

    return run
