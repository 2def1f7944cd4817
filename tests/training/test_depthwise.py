"""The depthwise convolutions for CPU training against PyTorch's own."""

import copy

import pytest
import timm
import torch
from torch import nn

from unept.training.depthwise import DepthwiseConv, prepare_for_cpu_bfloat16


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2), (7, 3), ((2, 4), (1, 2))])
def test_values_and_gradients_are_those_of_the_convolution(kernel, stride, amp):
    padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    conv = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=False).to(memory_format=torch.channels_last)
    image = torch.randn(2, 6, 13, 17)
    found = {}
    for name, module in (("want", conv), ("found", DepthwiseConv(copy.deepcopy(conv)))):
        x = image.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp and name == "found"):
            out = module(x)
        (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found[name] = (out.float(), x.grad, module.weight.grad)
    assert found["found"][0].dtype == torch.float32
    tolerance = {"rtol": 0.02, "atol": 0.02} if amp else {"rtol": 1e-5, "atol": 1e-4}
    for actual, wanted in zip(found["found"], found["want"], strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(actual / scale, wanted / scale, **tolerance)


def test_a_prepared_network_computes_the_same_and_keeps_its_names():
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()  # "same" padding, strides 1 and 2
    prepared = copy.deepcopy(network)
    prepare_for_cpu_bfloat16(prepared)
    assert sum(isinstance(m, DepthwiseConv) for m in prepared.modules()) == 16
    assert list(prepared.state_dict()) == list(network.state_dict())
    image = torch.randn(2, 3, 49, 65)
    outputs = []
    for model in (network, prepared):
        output = model(image)
        output.square().sum().backward()
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-6)
    for (name, a), b in zip(network.named_parameters(), prepared.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max()), msg=name)
