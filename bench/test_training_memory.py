"""What one training step keeps for its backward: `pytest bench/test_training_memory.py --benchmark-only -s`.

Where there is no GPU, the bytes are counted on tensors without contents (`bench.counting`), which are as many.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from unept.model.network import UNEPT

from .counting import counted, kept_for_backward
from .table8 import loss_of

# GB that the released code keeps at batch 2, 480x480, 150 classes, float32, its full-resolution logits included.
RELEASED_GB = {"resnet50": 5.42, "deit_base_distilled_patch16_384": 3.55}


# The boundary and direction heads, and logits, of the preset camvid in a network of the paper's size.
SUBPIXEL = {"boundary_upsampling": "subpixel", "boundary_features": "spatial+decoder", "logits_stride": 2}


def model_of(build: Callable[[], UNEPT], device: str) -> contextlib.AbstractContextManager[Any]:
    """A network in training mode, on a CPU without contents."""
    return counted(lambda: build().train()) if device == "cpu" else contextlib.nullcontext(build().to(device).train())


def training_step(model: UNEPT, size: int, amp: bool) -> Callable[[], Any]:
    """A training step on two images, up to the loss."""
    device = next(model.parameters()).device
    images = torch.zeros(2, 3, size, size, device=device)
    labels = torch.zeros(2, size, size, dtype=torch.long, device=device)
    return partial(loss_of, model, images, labels, amp)


@pytest.mark.parametrize("amp", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("heads", [{}, SUBPIXEL], ids=["bilinear", "subpixel"])
@pytest.mark.parametrize("backbone", sorted(RELEASED_GB))
def test_training_memory(benchmark, backbone, heads, amp):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with model_of(partial(UNEPT, 150, backbone, **heads), device) as model:
        gigabytes = benchmark.pedantic(kept_for_backward, (model, training_step(model, 480, amp)), rounds=1) / 1e9
    benchmark.group, benchmark.name = (
        "kept for the backward, 2x3x480x480 K=150",
        f"{backbone} {'bf16' if amp else 'float32'}{', sub-pixel heads' if heads else ''}",
    )
    benchmark.extra_info.update(kept_gb=gigabytes, released_gb=RELEASED_GB[backbone], device=device)
    print(f"\n{benchmark.name} on {device}: {gigabytes:.2f} GB kept for the backward")
    if amp and backbone == "resnet50":
        assert gigabytes <= 2.6


def test_gradient_checkpointing(benchmark):
    """What `set_grad_checkpointing` saves, at 240x240, in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with model_of(partial(UNEPT, 150, "resnet50"), device) as model:
        step = training_step(model, 240, amp=True)
        without = kept_for_backward(model, step) / 1e9
        model.set_grad_checkpointing()
        gigabytes = benchmark.pedantic(kept_for_backward, (model, step), rounds=1) / 1e9
    benchmark.group, benchmark.name = (
        "kept for the backward, 2x3x240x240 K=150",
        "resnet50 bf16, gradient checkpointing",
    )
    benchmark.extra_info.update(kept_gb=gigabytes, without_gb=without, device=device)
    print(f"\nresnet50 bf16 on {device}: {without:.2f} GB, with gradient checkpointing {gigabytes:.2f} GB")
    assert gigabytes <= 0.4 * without
