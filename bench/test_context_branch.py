"""How the context branch scales with the image: 4 times the pixels may cost at most 4.4 times.

On a CPU that is reported (see `bench.report`), not asserted: there glibc returns blocks over 32 MiB to the system and
gets them back page by page, which the larger image pays for. With MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
in the environment it keeps them.
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unept.kernels import use_backend

from .harness import DEVICE, Group, Measured, Variant, assert_close
from .models import AMP, REFERENCE, as_reference, autocast, sample_batch, unept

VARIANTS = ["small", "large"]
LIMIT = 4.4


@dataclass(frozen=True)
class Case:
    """The one group; `size` pixels a side, and twice as many."""

    size: int

    @property
    def name(self) -> str:
        """The group's name in the report."""
        kind = "bfloat16 autocast" if AMP else "float32"
        return f"context branch, ResNet-50 features, {self.size} and {2 * self.size} pixels, batch 1, {kind}, forward"


def cases(full: bool, device: str) -> list[Case]:
    """480 and 960 pixels; reduced: 240 and 480."""
    return [Case(480 if full else 240)]


def context_branch(case: Case, name: str) -> Variant:
    """All that follows the backbone but for boundaries: queries, pyramid, encoder, decoder, classifier; forward."""
    size = case.size * (2 if name == "large" else 1)
    torch.manual_seed(0)
    model = unept("resnet50").module.eval()
    images, _ = sample_batch(1, size)
    features = [torch.randn(1, c, size // 8, size // 8, device=DEVICE) for c in model.backbone.channels]

    @torch.no_grad()
    def step(images: Tensor = images, features: list[Tensor] = features, amp: bool = AMP) -> Tensor:
        with autocast(amp):
            tokens, shapes = model.pyramid(features)
            return model.classifier(model.decoder(model.queries(images), model.encoder(tokens, shapes), shapes))

    def gate() -> None:
        with as_reference(model):
            expected = step(images.to(REFERENCE), [feature.to(REFERENCE) for feature in features], amp=False)
        assert_close(step(), expected, "logits", limit=0.1 if AMP else 1e-4)

    return Variant(step, gate, partial(use_backend, "auto"))


def test_context_branch_is_linear_in_pixels(samples, case, variant):
    results = samples(Group(case.name, partial(context_branch, case), baseline=VARIANTS[0], images=1, max_rounds=10))
    small, large = (results.get(name) for name in VARIANTS)
    if DEVICE == "cuda" and isinstance(small, Measured) and isinstance(large, Measured):
        ratio = statistics.median(large.seconds) / statistics.median(small.seconds)
        assert ratio <= LIMIT, f"4 times the pixels take {ratio:.2f} times as long"
