"""`amp="auto"` computes in bfloat16 where the device multiplies in it; what TensorFloat-32 moves."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.runs import small_model
from unept import precision
from unept.config import ModelConfig, TrainConfig
from unept.inference import InferenceConfig, infer
from unept.kernels.sparse_attention import project
from unept.model.attention import SparseSamplingAttention
from unept.training.trainer import Trainer

REAL = precision.cpu_multiplies_bfloat16  # tests see a CPU without


@pytest.mark.parametrize("fast", [True, False])
def test_auto_follows_the_cpu(monkeypatch, tmp_path, fast):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: fast)
    assert precision.uses_bfloat16("auto", "cpu") == fast
    with warnings.catch_warnings() if fast else pytest.warns(UserWarning, match="emulates it.*use --amp auto"):
        warnings.simplefilter("error" if fast else "always")
        assert precision.uses_bfloat16("bf16", "cpu")
    output = infer(small_model(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), InferenceConfig())
    assert output.logits.dtype == (torch.bfloat16 if fast else torch.float32)
    network = ModelConfig("resnet10t", pretrained_backbone=False, d_model=32, num_heads=2, num_points=2, ffn_dim=32)
    assert Trainer(TrainConfig(network, device="cpu"), tmp_path).amp == fast


@pytest.mark.parametrize(("generation", "fast"), [(7, False), (8, True)])
def test_auto_follows_the_gpu(monkeypatch, generation, fast):
    """A T4, of generation 7, emulates bfloat16, and PyTorch says that it supports it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
    assert precision.uses_bfloat16("auto", "cuda") == fast
    assert not precision.uses_bfloat16("off", "cuda")
    with warnings.catch_warnings() if fast else pytest.warns(UserWarning, match="this GPU .*use --amp auto"):
        warnings.simplefilter("error" if fast else "always")
        assert precision.uses_bfloat16("bf16", "cuda")


def test_what_the_cpu_says(monkeypatch):
    for found, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert REAL.__wrapped__() == expected


def tensorfloat32(factor: torch.Tensor) -> torch.Tensor:
    """A factor as tensor cores read it with `matmul_precision="high"`: 11 of float32's 24 bits, rounded to nearest."""
    bits = factor.detach().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def test_factors_have_11_bits():
    for value, expected in (
        (1 + 2**-10, 1 + 2**-10),
        (1 + 2**-11, 1),
        (1 + 1.5 * 2**-10, 1 + 2**-9),
        (-3.1, -3.099609375),
    ):
        assert tensorfloat32(torch.tensor(value)).item() == expected


@torch.no_grad()
def test_tensorfloat32_moves_a_point_16_pixels_away_by_less_than_a_100th():
    """Both products that lead to a position (Eq. 3), of the paper's layer; sums are exact here."""
    layer = SparseSamplingAttention()
    torch.nn.init.normal_(layer.sampling_weight)
    query = torch.randn(1, 1024, 256)

    def offsets(rounded) -> torch.Tensor:
        weight, bias = layer.query_projection.weight, layer.query_projection.bias
        q = torch.addmm(bias.double(), rounded(query[0]).double(), rounded(weight).double().T).float()
        heads, weight = q.view(1, -1, 8, 32), layer.sampling_weight
        bias = torch.zeros_like(layer.sampling_bias).double()
        return project(rounded(heads).double(), rounded(weight).double(), bias, layer.num_levels)[0]

    layer.sampling_weight *= 16 / offsets(lambda factor: factor).abs().amax()
    exact = offsets(lambda factor: factor)
    moved = (offsets(tensorfloat32) - exact).abs().amax()
    assert 15.9 < exact.abs().amax() < 16.1
    assert 1 / 1000 < moved < 1 / 100
    assert (offsets(lambda factor: factor.bfloat16()) - exact).abs().amax() > 1 / 100  # 8 bits would not do
