"""Sparse sampling attention for the tests: random inputs, both ops on them, and the check against the paper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.helpers import reference
from tests.helpers.accuracy import assert_accurate
from unept.kernels import ms_deform_attn, requested_backend, sparse_sampling_attention
from unept.kernels._triton import INTERPRETED

SHAPES = [(5, 7), (3, 4), (1, 6)]


@dataclass
class Case:
    """One op's differentiable inputs by name, what else it takes, and the gradient that comes back into it."""

    spatial_shapes: list[tuple[int, int]]
    inputs: dict[str, Tensor]
    grad_out: Tensor

    def to(self, device: str, dtype: torch.dtype) -> "Case":
        moved = {name: t.detach().to(device, dtype).requires_grad_() for name, t in self.inputs.items()}
        return Case(self.spatial_shapes, moved, self.grad_out.to(device, dtype))


def make_case(
    *,
    batch=2,
    heads=3,
    channels=5,
    queries=11,
    levels=2,
    num_points=3,
    shared=False,
    normalised=False,
    shapes=None,
) -> Case:
    """Random inputs, exact in bfloat16, whose samples stay away from integer positions, where slopes jump."""
    shapes = shapes or SHAPES[:levels]
    levels = len(shapes)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels)
    centres = torch.rand(1 if shared else batch, queries, 2)
    points = torch.randn(batch, queries, heads, levels, num_points, 2) * 2.5
    scores = torch.randn(batch, queries, heads, levels, num_points) * 2
    value, centres, points, scores = (t.bfloat16().double() for t in (value, centres, points, scores))
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    pixels = centres[:, :, None, None, None] * sizes - 0.5
    for _ in range(50):
        position = pixels + points
        near = (position - position.round()).abs() < 2e-3
        points = torch.where(near, torch.randn(points.shape).bfloat16().double(), points)
    assert not near.any()
    grad_out = torch.randn(batch, queries, heads * channels).bfloat16().double()
    if normalised:
        locations = (pixels + points + 0.5) / sizes
        return Case(shapes, {"value": value, "sampling_locations": locations, "attention_weights": scores}, grad_out)
    inputs = {"value": value, "offsets": points, "logits": scores, "reference_points": centres}
    return Case(shapes, inputs, grad_out)


def attention(case: Case) -> Tensor:
    value, *others = case.inputs.values()
    return sparse_sampling_attention(value, case.spatial_shapes, *others)


def deformable(case: Case) -> Tensor:
    value, *others = case.inputs.values()
    return ms_deform_attn(value, case.spatial_shapes, None, *others)


def with_gradients(op: Callable[[Case], Tensor], case: Case) -> dict[str, Tensor]:
    out = op(case)
    return {"output": out, **gradients(out, case)}


def gradients(out: Tensor, case: Case) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, list(case.inputs.values()), case.grad_out)
    return dict(zip(case.inputs, grads, strict=True))


def expected(case: Case) -> dict[str, Tensor]:
    """Of the inputs as they are after rounding to their dtype."""
    value, *others = case.inputs.values()
    arguments: tuple[Any, ...] = (value, case.spatial_shapes, *others, case.grad_out)
    normalised = "logits" not in case.inputs
    results = (reference.ms_deform_attn if normalised else reference.sparse_sampling_attention)(*arguments)
    return dict(zip(["output", *case.inputs], results, strict=True))


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact result in a dtype: no computation by torch in that dtype comes closer."""
    if dtype == torch.bfloat16 and INTERPRETED and requested_backend() == "triton":
        # Triton's interpreter cuts the low bits off where GPUs round to nearest.
        return (exact.float().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return exact.to(dtype)


def check(op: Callable[[Case], Tensor], case: Case) -> None:
    results, references = with_gradients(op, case), expected(case)
    for name, result in results.items():
        same_dtype = rounded(references[name], result.dtype)
        assert_accurate(result, references[name], same_dtype=same_dtype, name=name)
        assert result.dtype == case.inputs.get(name, case.inputs["value"]).dtype


def dtypes_of(backend: tuple[str, str]) -> list[torch.dtype]:
    halves = [torch.float32, torch.float16, torch.bfloat16]
    return halves if backend[0] == "triton" else [torch.float64, *halves]
