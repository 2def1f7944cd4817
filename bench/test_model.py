"""Whole networks: training step, inference, multi-scale inference.

On CUDA everything is compiled and under bfloat16 autocast; on a CPU eager, in float32, at a reduced size. Peak memory
is what a step needs beyond weights and optimiser state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unept.inference import PAPER_SCALES, InferenceConfig, predict_ids
from unept.kernels import use_backend

from .baselines import needs_cuda
from .harness import DEVICE, Group, Unavailable, Variant
from .models import AMP, BUILDERS, CLASSES, PACKAGES, REFERENCE, VIT_HEADS, Network, as_reference, sample_batch

VARIANTS = list(BUILDERS)
BASELINE = "unept torch"
RESNET, DEIT = "resnet50", "deit_base_distilled_patch16_384"
LOSS_LIMIT = 0.05  # relative: dropout, bfloat16 and the points that Mask2Former's loss draws
AGREEMENT = 0.9  # of class ids with those of the reference; random weights make near ties
COMPILED = DEVICE == "cuda"


@dataclass(frozen=True)
class Case:
    """One group: what is run, on which backbone, at which batch and image size."""

    task: str
    backbone: str
    batch: int
    size: int

    @property
    def name(self) -> str:
        """The group's name in the report, unique to it."""
        kind = "compiled, bfloat16" if DEVICE == "cuda" else "eager, float32"
        return f"{self.task}, {self.backbone.split('_')[0]}, {self.batch}x{self.size}x{self.size}, {kind}"


def cases(full: bool, device: str) -> list[Case]:
    """The paper's batch and image size, or as much as a CPU can do in a minute."""
    batch, size = (16, 480) if full else (2, 128)
    both = [Case(task, backbone, batch, size) for task in ("train step", "inference") for backbone in (RESNET, DEIT)]
    return [*both, Case("multi-scale inference", RESNET, 1, size)]


# --- variants ---------------------------------------------------------------------------------------------------------


def train_step(network: Network, images: Tensor, labels: Tensor) -> Variant:
    """Loss, backward, AdamW."""
    network.module.train()
    loss = torch.compile(network.loss, dynamic=False) if COMPILED and network.compiles else network.loss
    optimizer = torch.optim.AdamW(network.module.parameters(), lr=1e-4)

    def step() -> None:
        loss(images, labels, AMP).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def gate() -> None:
        with as_reference(network.module, network.reference), torch.no_grad():
            expected = network.loss(images.to(network.reference), labels, False).item()
        actual = loss(images, labels, AMP).item()
        assert abs(actual - expected) <= LOSS_LIMIT * expected, (
            f"loss is {actual}, eager and in {network.reference} {expected}"
        )

    return Variant(step, gate)


def inference(network: Network, images: Tensor) -> Variant:
    """Class ids of every pixel."""
    network.module.eval()
    ids = torch.inference_mode()(network.ids)
    with as_reference(network.module, network.reference):
        expected = ids(images.to(network.reference), False)
    if COMPILED and network.compiles:
        network.module.compile(dynamic=False)
    step = partial(ids, images, AMP)
    return Variant(step, partial(assert_agree, step, expected))


def multi_scale(network: Network, images: Tensor) -> Variant:
    """The paper's 12 views: six scales, each mirrored too. Not compiled: each view has its own size."""
    views = {"scales": PAPER_SCALES, "flip": True}
    with as_reference(network.module):
        expected = predict_ids(network.module, images.to(REFERENCE), InferenceConfig(**views, amp="off"))
    step = partial(predict_ids, network.module, images, InferenceConfig(**views, amp="bf16" if AMP else "off"))
    return Variant(step, partial(assert_agree, step, expected))


def assert_agree(step: Callable[[], Tensor], expected: Tensor) -> None:
    """Most class ids are those of the reference."""
    agreement = (step() == expected).float().mean().item()
    assert agreement >= AGREEMENT, f"{agreement:.1%} of the ids are those of the reference"


def prepare(case: Case, name: str) -> Variant:
    """The variant `name` of a case; the same weights for each backend."""
    if name == "unept triton":
        needs_cuda("Triton")
    ours = name.startswith("unept")
    if not ours and (case.task.startswith("multi") or case.backbone != (DEIT if name in VIT_HEADS else RESNET)):
        raise Unavailable("baselines join in training and inference, SETR on DeiT and the others on ResNet-50")
    torch.manual_seed(0)
    network = BUILDERS[name](case.backbone)
    images, labels = sample_batch(case.batch, case.size)
    if case.task == "train step":
        variant = train_step(network, images, labels)
    else:
        variant = (inference if case.task == "inference" else multi_scale)(network, images)
    variant.context = partial(use_backend, "triton" if name == "unept triton" else "torch")
    return variant


def test_model(samples, case, variant):
    group = Group(
        name=case.name,
        prepare=partial(prepare, case),
        baseline=BASELINE,
        info={
            "shape": f"{case.batch}x3x{case.size}x{case.size} K={CLASSES}",
            "dtype": "bfloat16 autocast" if AMP else "float32",
        },
        images=case.batch,
        max_rounds=10,
    )
    samples(group, package=PACKAGES.get(variant))
