"""The network in the transforms and exporters of PyTorch, with no step of this project's in between."""

import io

import pytest
import torch

from unept import UNEPT
from unept.model.loss import UNEPTLoss


@pytest.fixture(scope="module")
def model() -> UNEPT:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_heads": 2, "num_levels": 2, "num_points": 2, "ffn_dim": 16}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    return UNEPT(3, "resnet10t", output_stride=32, **sizes, **layers).eval()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace(model):
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, torch.randn(1, 3, 64, 96)), file)
        file.seek(0)
        traced = torch.jit.load(file)
        for size in ((1, 3, 64, 96), (2, 3, 96, 64)):
            images = torch.randn(size)
            for found, wanted in zip(traced(images), model(images), strict=False):
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_torch_func(model):
    """The gradient of the loss as a function of the parameters, and that of each image alone."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))

    def loss(parameters, images, labels):
        output = torch.func.functional_call(model, parameters, (images[None],))
        return UNEPTLoss()(output, labels[None])["loss"]

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for i in range(2):
        model.zero_grad()
        UNEPTLoss()(model(images[i : i + 1]), labels[i : i + 1])["loss"].backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
