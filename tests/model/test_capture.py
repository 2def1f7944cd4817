"""The network in the transforms and exporters of PyTorch, with no step of this project's in between."""

import copy
import io

import pytest
import torch
from torch import nn

from unept import UNEPT
from unept.model.exportable import WholeImage
from unept.model.loss import UNEPTLoss


def noise(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model() -> UNEPT:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_heads": 2, "num_levels": 2, "num_points": 2, "ffn_dim": 16}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "context_queries": "spatial+encoder"}
    model = UNEPT(3, "resnet10t", output_stride=32, logits_stride=2, boundary_upsampling="subpixel", **sizes, **layers)
    for name, parameter in model.named_parameters():
        if "sampling" in name or "head" in name:  # so that samples, boundaries and directions vary
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace(model):
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, torch.randn(1, 3, 64, 96)), file)
        file.seek(0)
        traced = torch.jit.load(file)
        for size in ((1, 3, 64, 96), (2, 3, 70, 90)):
            images = torch.randn(size)
            for found, wanted in zip(traced(images), model(images), strict=False):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("refined", "dynamo"), [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.exhaustive)]
)
def test_onnx(model, tmp_path, refined, dynamo):
    """The maps, or the refined ids, in ONNX Runtime at batches and sizes that the export has not seen."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = WholeImage(model).eval() if refined else model
    path, example = str(tmp_path / "model.onnx"), noise(2, 3, 70, 90)
    axes = {0: "B", 2: "H", 3: "W"}
    dynamic = {"dynamic_shapes": (axes,)} if dynamo else {"dynamic_axes": {"images": axes}}
    torch.onnx.export(network, (example,), path, dynamo=dynamo, input_names=["images"], verbose=False, **dynamic)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert not any(module.training for module in model.modules()), "the exporter changed the mode of the network"
    for images in (example, noise(1, 3, 64, 128), noise(3, 3, 45, 51)):
        found = [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]
        with torch.no_grad():
            wanted = network(images)
        if refined:
            assert (found[0] == wanted).float().mean() > 0.999
        else:
            for one, other in zip(found, wanted, strict=False):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_meta_device(model):
    """Shapes without values, as counters of operations and memory take them."""
    images = torch.randn(2, 3, 70, 90)
    for found, wanted in zip(copy.deepcopy(model).to("meta")(images.to("meta")), model(images), strict=True):
        assert getattr(found, "shape", found) == getattr(wanted, "shape", wanted)


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
