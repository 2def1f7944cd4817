"""`amp="auto"` computes in bfloat16 where the device multiplies in it, in training and in inference."""

import warnings

import pytest
import torch

from tests.helpers.runs import small_model
from unept import precision
from unept.config import ModelConfig, TrainConfig
from unept.inference import InferenceConfig, infer
from unept.training.trainer import Trainer

REAL = precision.cpu_multiplies_bfloat16  # tests see a CPU without


@pytest.mark.parametrize("fast", [True, False])
def test_auto_follows_the_cpu(monkeypatch, tmp_path, fast):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: fast)
    assert precision.uses_bfloat16("auto", "cuda")
    assert precision.uses_bfloat16("auto", "cpu") == fast
    with warnings.catch_warnings() if fast else pytest.warns(UserWarning, match="emulates it.*use --amp auto"):
        warnings.simplefilter("error" if fast else "always")
        assert precision.uses_bfloat16("bf16", "cpu")
    assert not precision.uses_bfloat16("off", "cuda")
    output = infer(small_model(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), InferenceConfig())
    assert output.logits.dtype == (torch.bfloat16 if fast else torch.float32)
    network = ModelConfig("resnet10t", pretrained_backbone=False, d_model=32, num_heads=2, num_points=2, ffn_dim=32)
    assert Trainer(TrainConfig(network, device="cpu"), tmp_path).amp == fast


def test_what_the_cpu_says(monkeypatch):
    for found, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert REAL.__wrapped__() == expected
