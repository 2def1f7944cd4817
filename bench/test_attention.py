"""Sparse sampling attention, forward and with its backward, against the ops of other projects.

`sparse_sampling_attention` groups start from offsets and logits, as a network does: what an op needs made of them
(locations, softmax) is timed with it. `ms_deform_attn` groups start from locations and weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unept.kernels import ms_deform_attn, sparse_sampling_attention, use_backend
from unept.model.attention import ring_offsets

from . import baselines
from .baselines import Maps
from .harness import DEVICE, Group, Unavailable, Variant, assert_close

VARIANTS = [
    "unept triton",
    "unept torch",
    "unept torch, compiled",
    "grid_sample",
    "grid_sample, compiled",
    "transformers",
    "torch-ms-deform-attn",
    "hub kernel",
    "msda-triton",
    "DCNv4",
    "deformops",
    "deformops fp32acc",
    "deformops fp32acc softmax",
]
BASELINE = "grid_sample"
BASELINE_OPS: dict[str, tuple[Callable[[], baselines.Op], str]] = {
    "transformers": (baselines.transformers, "transformers"),
    "torch-ms-deform-attn": (baselines.torch_ms_deform_attn, "torch-ms-deform-attn"),
    "hub kernel": (baselines.hub_kernel, "kernels"),
    "msda-triton": (baselines.msda_triton, "msda-triton"),
    "DCNv4": (baselines.dcnv4, "DCNv4"),
    "deformops": (partial(baselines.deformops, fp32acc=False), "deformops"),
    "deformops fp32acc": (partial(baselines.deformops, fp32acc=True), "deformops"),
    "deformops fp32acc softmax": (partial(baselines.deformops, fp32acc=True, softmax=True), "deformops"),
}
TAKE_LOGITS = ("DCNv4", "deformops fp32acc softmax")
HEADS, CHANNELS = 8, 32
CHECKED_QUERIES = 256
# DCNv4 rounds locations to float16, about 0.02 of 60 pixels, whatever its inputs.
DCNV4_LIMIT = 0.1


@dataclass(frozen=True)
class Case:
    """One group: op, place in the network, sizes, dtype of value, where samples lie, and whether with the backward."""

    op: str
    place: str
    size: int
    batch: int
    dtype: torch.dtype
    offsets: str = "initial"
    backward: bool = False
    points: int = 16
    compiled: bool = False

    @property
    def name(self) -> str:
        """The group's name in the report, unique to it."""
        dtype = str(self.dtype).removeprefix("torch.")
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.op}, {self.place}, B={self.batch} N={self.points} {dtype} {self.offsets}, {direction}"


def cases(full: bool, device: str) -> list[Case]:
    """From the paper's encoder at batch 16 in bfloat16, one thing changed at a time; reduced: batch 1, float32."""
    sparse, deformable = "sparse_sampling_attention", "ms_deform_attn"
    encoder, decoder, deit, cityscapes = (
        ("ResNet-50 encoder", 60),
        ("ResNet-50 decoder", 60),
        ("DeiT encoder", 30),
        ("Cityscapes encoder", 96),
    )
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    chosen: list[tuple] = [
        (sparse, *encoder, 1, fp32, "initial"),
        (sparse, *decoder, 1, fp32, "initial"),
        (sparse, *deit, 1, fp32, "initial"),
        (sparse, *deit, 1, fp32, "sigma 4 px"),
        (sparse, *deit, 1, fp32, "scattered"),
        (sparse, *deit, 1, bf16, "initial"),
        (deformable, *deit, 1, fp32, "initial"),
    ]
    if full:
        chosen = [(sparse, *place, 16, bf16, "initial") for place in (encoder, decoder, deit, cityscapes)]
        chosen += [(sparse, *place, 2, bf16, "initial") for place in (encoder, decoder, deit, cityscapes)]
        chosen += [(sparse, *encoder, 16, bf16, kind) for kind in ("sigma 4 px", "scattered")]
        chosen += [(sparse, *encoder, 16, dtype, "initial") for dtype in (fp32, fp16)]
        chosen += [(deformable, *encoder, 16, dtype, "initial") for dtype in (bf16, fp32)]
    listed = [
        Case(*choice, backward=backward, compiled=choice[:3] == (sparse, *encoder) and choice[5] == "initial")
        for choice in chosen
        for backward in (False, True)
    ]
    if full:
        listed += [Case(sparse, *encoder, 16, fp16, backward=backward, points=8) for backward in (False, True)]
    return listed


# --- inputs -----------------------------------------------------------------------------------------------------------


def centres(maps: Maps, place: str) -> Tensor:
    """Reference points (1, Q, 2) in [0, 1]: of all pixels of all levels, or of the first level for a decoder."""
    grids = []
    for height, width in maps.shapes[: 1 if place.endswith("decoder") else None]:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        grids.append(torch.stack([x / width, y / height], dim=-1).view(-1, 2))
    return torch.cat(grids)[None].to(DEVICE)


def offsets_of(case: Case, kind: str, shape: tuple[int, ...]) -> Tensor:
    """(B, Q, M, L, N, 2) in pixels; `kind` is the case's or, for the gate, "off the grid": where slopes don't jump."""
    if kind == "initial":
        return ring_offsets(HEADS, shape[3], case.points).to(DEVICE).expand(shape).contiguous()
    if kind == "scattered":
        return (torch.rand(shape, device=DEVICE) - 0.5) * 2 * case.size
    offsets = torch.randn(shape, device=DEVICE) * 4
    if kind == "off the grid":
        whole = offsets.round()
        offsets = whole + (offsets - whole).clamp(-0.4, 0.4) + 0.5  # the reference points are pixel centres
    return offsets


def make_inputs(case: Case, kind: str, maps: Maps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value, offsets and logits (views of one projection, as in the network) and reference points."""
    reference = centres(maps, case.place)
    pixels = sum(height * width for height, width in maps.shapes)
    value = torch.randn(case.batch, pixels, HEADS, CHANNELS, device=DEVICE).to(case.dtype)
    levels = len(maps.shapes)
    samples = levels * case.points
    projection = torch.empty(case.batch, reference.shape[1], HEADS, 3 * samples, device=DEVICE)
    offsets = projection[..., : 2 * samples].unflatten(-1, (levels, case.points, 2))
    logits = projection[..., 2 * samples :].unflatten(-1, (levels, case.points))
    offsets.copy_(offsets_of(case, kind, tuple(offsets.shape)))
    logits.normal_()
    return value, offsets, logits, reference


def deformable_inputs(maps: Maps, offsets: Tensor, logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Locations in [0, 1] and normalised weights: what ops under Deformable DETR's signature take."""
    locations = reference[:, :, None, None, None] + offsets / maps.sizes.to(offsets.dtype)
    return locations, logits.flatten(-2).softmax(-1).view(logits.shape)


# --- variants ---------------------------------------------------------------------------------------------------------

Inputs = tuple[Tensor, Tensor, Tensor]  # value; offsets and logits, or locations and weights


def function_of(case: Case, name: str, maps: Maps, reference: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of `Inputs` that a variant stands for."""
    op: baselines.Op = baselines.grid_sample
    if name in BASELINE_OPS:
        op = BASELINE_OPS[name][0]()
    if name.startswith("unept"):
        if case.op == "ms_deform_attn":
            return lambda value, points, scores: ms_deform_attn(value, maps.shapes, None, points, scores)
        return lambda value, points, scores: sparse_sampling_attention(value, maps.shapes, points, scores, reference)
    if case.op == "ms_deform_attn":
        return lambda value, points, scores: op(value, maps, points, scores)

    def run(value: Tensor, points: Tensor, scores: Tensor) -> Tensor:
        locations, weights = deformable_inputs(maps, points, scores, reference.to(points.dtype))
        return op(value, maps, locations, scores if name in TAKE_LOGITS else weights)

    return run


def with_gradients(run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, grad_out: Tensor) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def make_step(run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, grad_out: Tensor | None) -> list[Tensor]:
    """What is timed: forward, and backward if a gradient comes in."""
    if grad_out is None:
        with torch.no_grad():
            return [run(*inputs)]
    return with_gradients(run, inputs, grad_out)


class Problem:
    """A case's inputs, and the gate's: other samples at the same sizes, judged at some queries."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.maps = Maps([(case.size, case.size)] * 3)
        self.inputs, self.reference = self.make(case.offsets)
        queries = self.inputs[1].shape[1]
        shape = (case.batch, queries, HEADS * CHANNELS)
        self.grad_out = torch.randn(shape, device=DEVICE).to(case.dtype) if case.backward else None
        self.checked = torch.randperm(queries, device=DEVICE)[:CHECKED_QUERIES]

    def make(self, kind: str) -> tuple[Inputs, Tensor]:
        value, offsets, logits, reference = make_inputs(self.case, kind, self.maps)
        if self.case.op == "ms_deform_attn":
            offsets, logits = deformable_inputs(self.maps, offsets, logits, reference)
        return (value, offsets, logits), reference

    def gate(self, run: Callable[[Tensor, Tensor, Tensor], Tensor], limit: float | None) -> None:
        """At the size that is timed: random queries, whose gradients alone come back, against float64 grid_sample."""
        inputs, _ = self.make("off the grid")
        grad_out = None
        if self.grad_out is not None:
            grad_out = torch.zeros_like(self.grad_out)
            grad_out[:, self.checked] = self.grad_out[:, self.checked]
        actual = make_step(run, inputs, grad_out)
        some = [inputs[0], *(t[:, self.checked] for t in inputs[1:])]
        doubles = (some[0].double(), some[1].double(), some[2].double())
        definition = function_of(self.case, BASELINE, self.maps, self.reference[:, self.checked])
        exact = make_step(definition, doubles, None if grad_out is None else grad_out[:, self.checked].double())
        names = ("output", "grad_value", "grad_points", "grad_scores")
        for name, tensor, expected in zip(names, actual, exact, strict=False):
            if name != "grad_value":
                tensor = tensor[:, self.checked]
            assert_close(tensor, expected, name, limit)
        for name, tensor in zip(names[2:], actual[2:], strict=False):
            others = tensor.index_fill(1, self.checked, 0).count_nonzero()
            assert others == 0, f"{name}: queries without a gradient coming in have one"


def prepare(case: Case, problem: Callable[[], Problem], name: str) -> Variant:
    """The variant `name` of a case."""
    if name.endswith("compiled") and not case.compiled:
        raise Unavailable("compiled forms are timed at the ResNet-50 encoder's shape only")
    if name == "unept triton":
        baselines.needs_cuda("Triton")
    if name == "DCNv4" and (case.points not in (4, 8) or case.dtype != torch.float16):
        raise Unavailable("DCNv4 takes N of 4 or 8 and float16 only")
    if case.op == "ms_deform_attn" and name in TAKE_LOGITS[1:]:
        raise Unavailable("this form takes logits, and the case gives weights")
    made = problem()
    run = function_of(case, name, made.maps, made.reference)
    if name.endswith("compiled"):
        run = torch.compile(run, dynamic=False)
    backend = "triton" if name == "unept triton" else "torch"
    return Variant(
        step=partial(make_step, run, made.inputs, made.grad_out),
        gate=partial(made.gate, run, DCNV4_LIMIT if name == "DCNv4" else None),
        context=partial(use_backend, backend),
    )


def min_bytes(case: Case) -> int:
    """Read value, offsets, logits, write the output; for the backward read those and grad_out, write the gradients."""
    maps, itemsize = 3 * case.size**2, torch.empty((), dtype=case.dtype).element_size()
    queries = case.size**2 if case.place.endswith("decoder") else maps
    value = case.batch * maps * HEADS * CHANNELS * itemsize
    out = case.batch * queries * HEADS * CHANNELS * itemsize
    samples = case.batch * queries * HEADS * 3 * case.points * 3 * 4
    return value + samples + out + (out + 2 * (value + samples) if case.backward else 0)


def test_attention(samples, case, variant):
    made: list[Problem] = []

    def problem() -> Problem:
        made or made.append(Problem(case))
        return made[0]

    queries = case.size**2 * (1 if case.place.endswith("decoder") else 3)
    group = Group(
        name=case.name,
        prepare=partial(prepare, case, problem),
        baseline=BASELINE,
        info={
            "shape": f"B={case.batch} Q={queries} S={3 * case.size**2} M=8 D=32 L=3 N={case.points}",
            "dtype": str(case.dtype).removeprefix("torch."),
        },
        min_bytes=min_bytes(case),
    )
    samples(group, package=BASELINE_OPS[variant][1] if variant in BASELINE_OPS else None)
