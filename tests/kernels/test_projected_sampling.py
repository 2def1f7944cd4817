"""Attention that projects its offsets and logits itself, in half precision: values, gradients, positions, memory."""

import pytest
import torch
from torch import Tensor

from unept.kernels import reference, sparse_sampling_attention, use_backend
from unept.kernels._triton import HAS_TRITON
from unept.kernels.sparse_attention import project, projected_sampling_attention
from unept.model.attention import SparseSamplingAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(6, 7), (3, 4)]
NAMES = "value", "query", "weight", "bias", "reference_points"

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="other backends project outside")


@pytest.fixture(autouse=True)
def on_triton():
    with use_backend("triton"):
        yield


def make_inputs(
    num_points: int, dtype: torch.dtype, *, heads: int = 2, channels: int = 8, queries: int = 9
) -> dict[str, Tensor]:
    """The tensors by name: value and query in a dtype, the others float32."""
    torch.manual_seed(0)
    B, Q, samples = 2, queries, len(SHAPES) * num_points
    tensors = (
        torch.randn(B, sum(h * w for h, w in SHAPES), heads, channels).to(dtype),
        torch.randn(B, Q, heads, channels).to(dtype),
        torch.randn(heads, channels, 3 * samples) * 0.3,
        torch.randn(heads, 3 * samples),
        torch.rand(1, Q, 2),
    )
    return {name: tensor.to(DEVICE).requires_grad_() for name, tensor in zip(NAMES, tensors, strict=True)}


def with_gradients(op, inputs: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    value, *others = inputs.values()
    out = op(value, SHAPES, *others)
    grads = torch.autograd.grad(out, list(inputs.values()), grad_out.to(out.dtype))
    return {"output": out, **dict(zip(inputs, grads, strict=True))}


def assert_matches_reference(inputs: dict[str, Tensor]) -> None:
    dtype = inputs["value"].dtype
    grad_out = torch.randn(2, 9, inputs["value"].shape[2:].numel(), device=DEVICE).to(dtype).double()
    found = with_gradients(projected_sampling_attention, inputs, grad_out)
    exact = with_gradients(
        reference.projected_sampling_attention,
        {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()},
        grad_out,
    )
    for name, tensor in found.items():
        assert tensor.dtype == (inputs[name].dtype if name in inputs else dtype)
        error = (tensor.double() - exact[name]).square().mean().sqrt() / exact[name].square().mean().sqrt()
        # Positions are rounded to float16, gradients of offsets and logits to bfloat16, whose unit is 1/256.
        assert error < 1 / 128, (name, float(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_points", [4, 3])
def test_values_and_gradients(num_points, dtype):
    assert_matches_reference(make_inputs(num_points, dtype))


def test_positions_and_logits_are_within_a_64th_at_16():
    query = torch.randn(1, 4096, 1, 32, device=DEVICE).bfloat16()
    weight = torch.randn(1, 32, 6, device=DEVICE)
    exact = project(query.double(), weight.double(), torch.zeros(1, 6, device=DEVICE).double(), 1)
    # The largest position is 16 pixels, the largest logit 16.
    scale = torch.cat([(16 / part.abs().amax()).expand(columns) for part, columns in zip(exact, (4, 2), strict=True)])
    bias = 0.05 + torch.rand(1, 6, device=DEVICE)
    arguments = query, weight * scale, bias
    exact, half, brain = (
        project(*(tensor.to(dtype) for tensor in arguments), 1)
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    )
    for wanted, found, coarse in zip(exact, half, brain, strict=True):
        assert wanted.abs().amax() > 14
        assert (found.double() - wanted).abs().amax() < 1 / 64
        assert (coarse - wanted).abs().amax() > 1 / 64
    assert (half[1].double().softmax(-1) - exact[1].softmax(-1)).abs().amax() < 1 / 128


def test_at_most_half_of_the_bytes_are_kept_for_the_backward():
    inputs = make_inputs(16, torch.bfloat16, channels=32, queries=54)
    value, query, weight, bias, references = inputs.values()
    parameters = {weight.data_ptr(), bias.data_ptr()}

    def bytes_kept(run) -> int:
        kept: dict[int, int] = {}
        keep = lambda tensor: kept.update({tensor.data_ptr(): tensor.numel() * tensor.itemsize}) or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
        return sum(size for pointer, size in kept.items() if pointer not in parameters)

    def outside():
        offsets, logits = project(query.float(), weight, bias, len(SHAPES))
        return sparse_sampling_attention(value, SHAPES, offsets, logits, references)

    inside = bytes_kept(lambda: projected_sampling_attention(value, SHAPES, query, weight, bias, references))
    assert 0 < inside <= 0.5 * bytes_kept(outside)


def test_small_gradients_do_not_vanish():
    inputs = make_inputs(4, torch.bfloat16)
    grads = with_gradients(projected_sampling_attention, inputs, torch.full((2, 9, 16), 1e-10, device=DEVICE))
    for name in ("query", "weight", "bias"):
        assert grads[name].abs().amax() > 1e-13, name  # float16 ends at 6e-8


def test_the_layer_keeps_no_projection_under_autocast():
    layer = SparseSamplingAttention(d_model=16, num_heads=2, num_levels=2, num_points=4).to(DEVICE)
    torch.nn.init.normal_(layer.sampling_weight, std=0.1)
    query, value = torch.randn(2, 9, 16, device=DEVICE), torch.randn(2, 54, 16, device=DEVICE)
    references = torch.rand(1, 9, 2, device=DEVICE)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        expected = layer(query, value, SHAPES, references)
        assert any(tensor.numel() == 2 * 2 * 9 * 16 for tensor in kept)  # offsets of 2 heads: 2 * 9 * 2 * 4 * 2 each
        kept.clear()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = layer(query, value, SHAPES, references)
    assert not any(tensor.numel() >= 2 * 2 * 9 * 16 and tensor.shape[-1] in (2, 24) for tensor in kept)
    assert_close = torch.testing.assert_close
    assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_opcheck():
    value, *others = make_inputs(4, torch.bfloat16).values()
    shapes = [size for shape in SHAPES for size in shape]
    op = torch.ops.unept.projected_sampling.default
    torch.library.opcheck(op, (value, shapes, *others), test_utils=("test_schema", "test_faketensor"))


def test_wrong_shapes_get_one_clear_error():
    value, query, weight, bias, centres = make_inputs(4, torch.bfloat16).values()
    with pytest.raises(ValueError, match=r"weight has 23 columns; they must be 3 \* L \* N for 2 levels"):
        projected_sampling_attention(value, SHAPES, query, weight[..., :23], bias, centres)
    with pytest.raises(ValueError, match=r"bias has shape \(2, 23\); it must be \(2, 24\)"):
        projected_sampling_attention(value, SHAPES, query, weight, bias[..., :23], centres)
