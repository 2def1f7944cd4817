"""torch.compile of evaluation: what eager gives, for a bounded number of sizes, and by an option of the commands."""

import functools
import gc
import weakref

import pytest
import torch
import tyro
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.models import StandIn
from tests.helpers.runs import small_model
from unept import compilation
from unept.config import TrainConfig
from unept.evaluate import EvaluateConfig
from unept.inference import InferenceConfig, infer, predict_ids
from unept.model.output import UNEPTOutput
from unept.predict import PredictConfig


@pytest.fixture
def counter(monkeypatch):
    """Counts the graphs that Dynamo traces; they run as they are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


class Means(StandIn):
    """Predicts the mean colours of blocks, in one graph."""

    def __init__(self):
        super().__init__(3, refines=False)

    def forward(self, images: torch.Tensor) -> UNEPTOutput:
        images = torch.nn.functional.pad(self.normalized(images), (0, -images.shape[3] % 8, 0, -images.shape[2] % 8))
        return UNEPTOutput(torch.nn.functional.avg_pool2d(images, 8), None, None)


def images_of(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)


def test_the_number_of_compilations_is_bounded(counter):
    model, on, off = Means(), InferenceConfig(compile="on"), InferenceConfig(compile="off")
    with torch._dynamo.config.patch(cache_size_limit=64):  # Dynamo's own bound, which costs a warning
        for size in [*range(16, 16 + compilation.MAX_SIZES + 4)] * 2:
            images = images_of(size, 24)
            assert torch.equal(infer(model, images, on).logits, infer(model, images, off).logits)
    assert counter.frame_count == compilation.MAX_SIZES
    infer(Means(), images_of(16, 24), on)  # another model has sizes of its own
    assert counter.frame_count == compilation.MAX_SIZES + 1


def test_only_frequent_sizes_are_compiled_where_nothing_else_is_asked(counter, monkeypatch):
    monkeypatch.setattr(compilation, "FREQUENT", 3)
    model = Means()
    for config, expected in (({}, 0), ({"compile": "auto"}, 1)):
        for n in range(3):
            infer(model, images_of(16, 24), InferenceConfig(**config))
            infer(model, images_of(16, 32 + n), InferenceConfig(**config))
        assert counter.frame_count == expected
        monkeypatch.setattr(compilation, "compiles", lambda option, device: option != "off")  # as on CUDA


@pytest.mark.parametrize(("option", "device", "expected"), [
    ("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True), ("off", "cuda", False),
])  # fmt: skip
def test_where_auto_compiles(option, device, expected):
    assert compilation.compiles(option, device) == expected


def test_windows_and_mirrored_views_are_compiled_too(counter):
    model, images = Means(), images_of(64, 96)
    config = {"scales": (0.5, 1.0), "flip": True, "window": 64, "window_batch": 2}
    expected = infer(model, images, InferenceConfig(**config))
    assert counter.frame_count == 0
    found = infer(model, images, InferenceConfig(**config, compile="on"))
    assert counter.frame_count == 2  # a view of 32x48 pixels, and a window of 64x64, both with their mirror images
    torch.testing.assert_close(found.probabilities, expected.probabilities)


def test_a_model_that_was_compiled_is_freed(counter):
    model = Means()
    infer(model, images_of(16, 24), InferenceConfig(compile="on"))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.exhaustive
def test_compiled_by_inductor_equals_eager():
    torch._dynamo.reset()
    model, images = small_model(), images_of(61, 90)
    expected = infer(model, images, InferenceConfig())
    found = infer(model, images, InferenceConfig(compile="on"))
    for want, value in zip(expected[:3], found[:3], strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4)
    ids, plain = (predict_ids(model, images, InferenceConfig(compile=option)) for option in ("on", "off"))
    assert (ids == plain).float().mean() > 0.99
    torch._dynamo.reset()


def test_the_option_of_the_commands():
    assert tyro.cli(EvaluateConfig, args=["run", "--compile", "on"]).inference.compile == "on"
    assert tyro.cli(PredictConfig, args=["a.png", "--compile", "off"]).inference.compile == "off"
    assert tyro.cli(PredictConfig, args=["a.png"]).inference.compile == "auto"
    assert TrainConfig(compile="on").inference().compile == "on"
