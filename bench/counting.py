"""What a network costs, counted without running it: on tensors that have shapes and a device, but no contents.

A network is built on PyTorch's meta device and run under FakeTensorMode as if on a CPU. In float32 the bytes kept for
the backward pass are those of a real CPU to the byte; `tests/bench/test_heads.py` compares them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unept.kernels import use_backend

PRODUCTS = ("bmm", "scaled_dot_product", "_scaled_dot_product")  # of activations with activations


@dataclass(frozen=True)
class Cost:
    """What a network costs at one image size, batch 1."""

    parameters: int
    layer_macs: float
    """Multiplications of convolutions and linear layers: what the tools behind Table 7 count."""
    product_macs: float
    """Multiplications of attention's products. Sampling (sparse attention, PointRend's points) is not counted."""


@contextlib.contextmanager
def counted(build: Callable[[], nn.Module], *, fused: bool = True) -> Iterator[nn.Module]:
    """Build a network without contents; within the context, tensors that are made have none either.

    Args:
        build: builds the network.
        fused: whether scaled_dot_product_attention runs as a fused kernel or plainly, with all its weights.
    """
    with torch.device("meta"):
        model = build()
    backend = SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    with FakeTensorMode(), use_backend("torch"), sdpa_kernel(backend):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield model


def cost(build: Callable[[], nn.Module], size: tuple[int, int]) -> Cost:
    """Count a network in evaluation mode on one image.

    Args:
        build: builds the network.
        size: (H, W) of the image.
    """
    with counted(build, fused=False) as model, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, *size))
    macs = {str(op).removeprefix("aten."): flops / 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in macs.items() if op.startswith(PRODUCTS))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, sum(macs.values()) - products, products)


def kept_for_backward(model: nn.Module, step: Callable[[], Any]) -> int:
    """Count the bytes of the distinct storages that autograd saves during `step`, without the model's parameters."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = (storage.nbytes(), tensor)  # holding it keeps its identity from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(size for size, _ in storages.values())
