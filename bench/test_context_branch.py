"""How the context branch scales with the image: 4 times the pixels may cost at most 4.4 times."""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from unept.kernels import use_backend

from .harness import DEVICE, Group, Measured, Variant, assert_close
from .models import AMP, autocast, sample_batch, unept

VARIANTS = ["480 pixels", "960 pixels"]
LIMIT = 4.4


@dataclass(frozen=True)
class Case:
    """The one group."""

    name: str


def cases(full: bool, device: str) -> list[Case]:
    """480 and 960 pixels, or half of that each way."""
    return [Case(f"context branch, ResNet-50 features, batch 1, {'bfloat16 autocast' if AMP else 'float32'}, forward")]


def context_branch(name: str) -> Variant:
    """All that follows the backbone but for boundaries: queries, pyramid, encoder, decoder, classifier; forward."""
    size = int(name.split()[0])
    torch.manual_seed(0)
    model = unept("resnet50").module.eval()
    images, _ = sample_batch(1, size)
    features = [torch.randn(1, c, size // 8, size // 8, device=DEVICE) for c in model.backbone.channels]

    @torch.inference_mode()
    def step(amp: bool = AMP) -> Tensor:
        with autocast(amp):
            tokens, shapes = model.pyramid(features)
            return model.classifier(model.decoder(model.queries(images), model.encoder(tokens, shapes), shapes))

    def gate() -> None:
        with use_backend("torch"):
            expected = step(amp=False)
        assert_close(step().float(), expected, "logits", limit=0.1 if AMP else None)

    return Variant(step, gate, partial(use_backend, "auto"))


def test_context_branch_is_linear_in_pixels(samples, case, variant):
    results = samples(Group(case.name, context_branch, baseline=VARIANTS[0], images=1, max_rounds=10))
    small, large = (results.get(name) for name in VARIANTS)
    if isinstance(small, Measured) and isinstance(large, Measured) and variant == VARIANTS[1]:
        ratio = statistics.median(large.seconds) / statistics.median(small.seconds)
        assert ratio <= LIMIT, f"4 times the pixels take {ratio:.2f} times as long"
