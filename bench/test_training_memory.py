"""What one training step keeps for its backward: `pytest bench/test_training_memory.py --benchmark-only -s`."""

import pytest
import torch

from unept.model.loss import UNEPTLoss
from unept.model.network import UNEPT

from .counting import kept_for_backward

# GB that the released code keeps at batch 2, 480x480, 150 classes, float32, its full-resolution logits included.
RELEASED_GB = {"resnet50": 5.42, "deit_base_distilled_patch16_384": 3.55}


@pytest.mark.parametrize("amp", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("backbone", sorted(RELEASED_GB))
def test_training_memory(benchmark, backbone, amp):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, loss = UNEPT(150, backbone).to(device).train(), UNEPTLoss()
    images = torch.randn(2, 3, 480, 480, device=device)
    labels = torch.randint(0, 150, (2, 60, 60), device=device).repeat_interleave(8, 1).repeat_interleave(8, 2)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            output = model(images)
        return loss(output, labels)["loss"]

    gigabytes = benchmark.pedantic(kept_for_backward, (model, step), rounds=1) / 1e9
    benchmark.group, benchmark.name = (
        "kept for the backward, 2x3x480x480 K=150",
        f"{backbone} {'bf16' if amp else 'float32'}",
    )
    benchmark.extra_info.update(kept_gb=gigabytes, released_gb=RELEASED_GB[backbone], device=device)
    print(f"\n{backbone} {'bf16' if amp else 'float32'} on {device}: {gigabytes:.2f} GB kept for the backward")
    if amp and backbone == "resnet50":
        assert gigabytes <= 2.6


def test_gradient_checkpointing(benchmark):
    """What `set_grad_checkpointing` saves, at 240x240, in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, loss = UNEPT(150, "resnet50").to(device).train(), UNEPTLoss()
    images = torch.randn(2, 3, 240, 240, device=device)
    labels = torch.randint(0, 150, (2, 30, 30), device=device).repeat_interleave(8, 1).repeat_interleave(8, 2)

    def step():
        with torch.autocast(device, torch.bfloat16):
            output = model(images)
        return loss(output, labels)["loss"]

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
