"""Sparse sampling attention on every backend: values, gradients and odd inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.attention import Case, attention, check, deformable, dtypes_of, gradients, make_case, with_gradients
from unept.kernels import use_backend
from unept.kernels.sparse_attention import force_form

# --- values and gradients ---------------------------------------------------------------------------------------------

ODD_SIZES = {
    "one-level": {"levels": 1, "num_points": 4, "channels": 8},
    "odd": {"batch": 1, "queries": 67, "heads": 1},
    "three-levels-shared-reference": {"levels": 3, "num_points": 5, "shared": True, "heads": 2, "channels": 3},
    "more-samples-than-pixels": {"batch": 1, "heads": 1, "shapes": [(2, 2)], "num_points": 24, "channels": 4},
    "single": {"batch": 1, "queries": 1, "heads": 1, "channels": 1, "levels": 1, "num_points": 1},
}


@pytest.mark.parametrize("sizes", ODD_SIZES.values(), ids=ODD_SIZES)
def test_matches_the_paper_at_odd_sizes(backend, sizes):
    check(attention, make_case(**sizes).to(backend[1], torch.float32))


def test_matches_the_paper_in_every_dtype(backend):
    case = make_case(heads=2)
    for dtype in dtypes_of(backend):
        check(attention, case.to(backend[1], dtype))


def test_ms_deform_attn_matches_its_definition_in_every_dtype(backend):
    case = make_case(heads=2, normalised=True)
    for dtype in dtypes_of(backend):
        check(deformable, case.to(backend[1], dtype))


def test_float32_offsets_and_logits_with_bfloat16_value(backend):
    case = make_case(heads=2).to(backend[1], torch.float32)
    case.inputs["value"] = case.inputs["value"].detach().bfloat16().requires_grad_()
    case.grad_out = case.grad_out.bfloat16()
    check(attention, case)


@pytest.mark.parametrize("normalised", [False, True])
def test_gradcheck(normalised):
    case = make_case(batch=1, heads=1, channels=2, queries=2, num_points=2, normalised=normalised)
    case = case.to("cpu", torch.float64)
    op = deformable if normalised else attention

    def run(*inputs: Tensor) -> Tensor:
        return op(Case(case.spatial_shapes, dict(zip(case.inputs, inputs, strict=True)), case.grad_out))

    with use_backend("torch"):
        assert torch.autograd.gradcheck(run, tuple(case.inputs.values()))


def test_only_the_wanted_gradients(backend):
    case = make_case(heads=1).to(backend[1], torch.float32)
    full = with_gradients(attention, case)
    for name, tensor in case.inputs.items():
        alone = Case(case.spatial_shapes, {n: t.detach() for n, t in case.inputs.items()}, case.grad_out)
        alone.inputs[name] = tensor
        (grad,) = torch.autograd.grad(attention(alone), tensor, case.grad_out)
        torch.testing.assert_close(grad, full[name])


# --- odd inputs -------------------------------------------------------------------------------------------------------


def test_views_of_one_projection_and_other_strides(backend):
    case = make_case(heads=2).to(backend[1], torch.float32)
    value, offsets, logits, centres = (case.inputs[n] for n in ("value", "offsets", "logits", "reference_points"))
    contiguous = with_gradients(attention, case)
    projection = torch.cat((offsets.flatten(3), logits.flatten(3)), dim=-1).detach().requires_grad_()
    split = offsets[0, 0, 0].numel()
    views = {
        "value": value.transpose(1, 3).contiguous().transpose(1, 3),
        "offsets": projection[..., :split].view(offsets.shape),
        "logits": projection[..., split:].view(logits.shape),
        "reference_points": centres.transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert not any(view.is_contiguous() for view in views.values())
    grad_out = case.grad_out.transpose(0, 1).contiguous().transpose(0, 1)
    strided = with_gradients(attention, Case(case.spatial_shapes, views, grad_out))
    for name, result in strided.items():
        torch.testing.assert_close(result, contiguous[name], msg=name)


def test_samples_outside_count_as_zero_and_have_no_gradient(backend):
    case = make_case(batch=1, queries=9, heads=1, num_points=2).to(backend[1], torch.float32)
    odd = [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 2.0**31, -(2.0**63), 8.5, -8.5]
    with torch.no_grad():
        for query, number in enumerate(odd):
            case.inputs["offsets"][0, query, :, 0, 0, query % 2] = number
    check(attention, case)
    grad = gradients(attention(case), case)["offsets"]
    assert (grad[0, :, :, 0, 0] == 0).all()
    assert (grad[0, :, :, 0, 1] != 0).any()


def test_half_offsets_that_overflow_to_infinity(backend):
    case = make_case(batch=1, queries=3, heads=1).to(backend[1], torch.float16)
    with torch.no_grad():
        case.inputs["offsets"][0, 1] = float("inf")
    check(attention, case)


def test_masked_logits_take_no_part(backend):
    case = make_case(batch=1, heads=2).to(backend[1], torch.float32)
    with torch.no_grad():
        case.inputs["logits"][:, :, :, 0] = float("-inf")  # the whole first level
        case.inputs["logits"][:, :, :, 1] += 200  # would overflow without the maximum taken off
    check(attention, case)


def test_a_query_whose_logits_are_all_the_lowest_number(backend):
    """As models mask what takes no part: the softmax is uniform then."""
    case = make_case(batch=1, queries=3, heads=1).to(backend[1], torch.float32)
    with torch.no_grad():
        case.inputs["logits"][:, 1] = torch.finfo(torch.float32).min
    check(attention, case)


@pytest.mark.parametrize("num_points", [2, 3])
def test_nan_in_a_map_does_not_reach_samples_outside_it(backend, deterministic, num_points):
    case = make_case(batch=2, queries=9, heads=2, num_points=num_points).to(backend[1], torch.float32)
    height, width = case.spatial_shapes[0]

    def beyond(size: int) -> Tensor:
        positions = [-1, -1.01, -2, -7.5, size, size + 0.01, size + 1, 1e30, float("nan")]
        return torch.tensor(positions, device=backend[1])[:, None]  # (Q, 1)

    with torch.no_grad():
        case.inputs["reference_points"].fill_(0.0)
        # In the first map one sample lies outside along x and inside along y, the other the other way round.
        case.inputs["offsets"][..., 0, :, :] = height / 2
        case.inputs["offsets"][..., 0, 2:, :] = 50.0
        case.inputs["offsets"][:, :, :, 0, 0, 0] = beyond(width) + 0.5
        case.inputs["offsets"][:, :, :, 0, 1, 1] = beyond(height) + 0.5
        zero, nan = case.inputs["value"].clone(), case.inputs["value"].clone()
        zero[:, : height * width] = 0
        nan[:, : height * width] = float("nan")
    results = []
    for value in (zero, nan):
        case.inputs["value"] = value.requires_grad_()
        results.append(with_gradients(attention, case))
    for name, expected_result in results[0].items():
        assert torch.equal(results[1][name], expected_result), name
    assert (results[1]["offsets"][..., 0, :, :] == 0).all()
    assert (results[1]["value"][:, : height * width] == 0).all()


@pytest.mark.parametrize("empty", ["batch", "queries", "heads", "channels"])
def test_empty_inputs(backend, empty):
    case = make_case(**{empty: 0}).to(backend[1], torch.float32)
    results = with_gradients(attention, case)
    assert results.pop("output").shape == case.grad_out.shape
    for name, grad in results.items():
        assert grad.shape == case.inputs[name].shape
        assert (grad == 0).all()


def test_unwritten_memory_does_not_leak(backend, monkeypatch):
    case = make_case(batch=1, queries=5, heads=2).to(backend[1], torch.float32)

    def poisoned(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args, **kwargs):
            made = create(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    results = with_gradients(attention, case)
    assert all(torch.isfinite(result).all() for result in results.values())


# --- more elements than 32-bit integers count -------------------------------------------------------------------------

# Two steps of FAR pass 2**31 elements.
FAR = 1_200_000_000


def spread(tensor: Tensor, dimension: int, folder: Path) -> Tensor:
    """A float16 copy whose stride along one dimension, is FAR; on a CPU in a sparse file.

    It starts in the middle of its storage, where a stride that wraps around finds zeros rather than no memory.
    """
    strides = torch.empty(tensor.shape[:dimension] + tensor.shape[dimension + 1 :]).stride()
    strides = (*strides[:dimension], FAR, *strides[dimension:])
    size = 2**31 + (tensor.shape[dimension] - 1) * FAR + tensor.numel()
    if tensor.is_cuda:
        storage = torch.zeros(size, dtype=torch.float16, device=tensor.device)
    else:
        storage = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=torch.float16)
    return storage.as_strided(tensor.shape, strides, 2**31).copy_(tensor.detach())


@pytest.mark.parametrize(
    ("name", "dimension"),
    [("value", 3), ("offsets", 3), ("offsets", 4), ("logits", 3), ("logits", 4)],
    ids=["channels", "offsets-levels", "offsets-points", "logits-levels", "logits-points"],
)
def test_strides_that_pass_32_bits_when_multiplied(backend, tmp_path, name, dimension):
    case = make_case(batch=1, queries=2, heads=1, channels=3, levels=3).to(backend[1], torch.float16)
    near = with_gradients(attention, case)
    case.inputs[name] = spread(case.inputs[name], dimension, tmp_path).requires_grad_()
    for result, found in with_gradients(attention, case).items():
        torch.testing.assert_close(found, near[result], msg=result)


def test_stride_that_passes_32_bits_one_row_outside(backend, tmp_path):
    """A corner outside a map is not read, but its address is computed."""
    case = make_case(batch=1, queries=3, heads=1, levels=1, channels=3).to(backend[1], torch.float16)
    case.spatial_shapes[:] = [(1, 3)]
    case.inputs["value"] = case.inputs["value"].detach()[:, :3].clone()
    near = attention(case)
    storage = spread(torch.zeros(1, 3, 1, 3, dtype=torch.float16, device=backend[1]), 1, tmp_path)
    value = storage.as_strided((1, 3, 1, 3), (0, 800_000_000, 0, 1), storage.storage_offset())
    case.inputs["value"] = value.copy_(case.inputs["value"])
    torch.testing.assert_close(attention(case), near)


def test_rows_of_a_level_that_pass_32_bits(backend, tmp_path):
    """Two rows of pixels lie more than 2**31 elements apart, though no stride is that large."""
    case = make_case(batch=1, queries=9, heads=1, channels=3, num_points=4, shapes=[(2, 2)])
    case = case.to(backend[1], torch.float16)
    near = with_gradients(attention, case)
    case.inputs["value"] = spread(case.inputs["value"], 1, tmp_path).requires_grad_()
    with force_form(padded=False):
        for result, found in with_gradients(attention, case).items():
            torch.testing.assert_close(found, near[result], msg=result)
