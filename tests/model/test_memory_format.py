"""Every path of inference sees images and weights channels-last, on CUDA and in bfloat16 on CPUs."""

import pytest
import torch

from tests.helpers.runs import save_run, small_model
from unept.inference import InferenceConfig, infer
from unept.outputs.tiled import predict_rows
from unept.pretrained import load

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """`amp="auto"` computes in bfloat16."""
    monkeypatch.setattr("unept.precision.cpu_multiplies_bfloat16", lambda: True)


def is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class Part:
    """An image of which parts can be read."""

    size = (48, 64)

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def see_whole(model, **options):
    infer(model, torch.randint(0, 256, (2, 3, 41, 50), dtype=torch.uint8), InferenceConfig(**options))


@pytest.mark.parametrize(
    "options",
    [{}, {"flip": True}, {"scales": (0.5, 1.0)}, {"window": 32}, {"window": 32, "flip": True}, {"tiled": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_backbone_sees_images_channels_last(options):
    model, seen = small_model(), []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(is_channels_last(args[0])))
    if options.pop("tiled", False):
        list(predict_rows(model, Part(), InferenceConfig(window=32), CPU))
    else:
        see_whole(model, **options)
    assert seen
    assert all(seen)


def test_a_loaded_model_has_its_weights_channels_last(tmp_path):
    save_run(tmp_path / "run", small_model())
    weights = [p for p in load(tmp_path / "run", CPU).backbone.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert weights
    assert all(is_channels_last(weight) for weight in weights)
