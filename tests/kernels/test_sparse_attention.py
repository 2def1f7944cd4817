"""Sparse sampling attention on every backend: values, gradients, odd inputs, torch.compile, errors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import reference
from tests.helpers.accuracy import assert_accurate
from unept.kernels import (
    MSDeformAttnFunction,
    ms_deform_attn,
    requested_backend,
    sparse_sampling_attention,
    use_backend,
)
from unept.kernels._autotune import size_bucket
from unept.kernels._scatter import ScatterBuffer
from unept.kernels._triton import INTERPRETED
from unept.kernels.sparse_attention import force_form, torch_backend, triton_value_binned
from unept.kernels.sparse_attention.forms import should_pad
from unept.kernels.sparse_attention.triton_arguments import query_order

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


# --- values and gradients ---------------------------------------------------------------------------------------------

ODD_SIZES = {
    "one-level": {"levels": 1, "num_points": 4, "channels": 8},
    "odd": {"batch": 1, "queries": 67, "heads": 1},
    "three-levels-shared-reference": {"levels": 3, "num_points": 5, "shared": True, "heads": 2, "channels": 3},
    "single": {"batch": 1, "queries": 1, "heads": 1, "channels": 1, "levels": 1, "num_points": 1},
}


@pytest.mark.parametrize("sizes", ODD_SIZES.values(), ids=ODD_SIZES)
def test_matches_the_paper_at_odd_sizes(backend, sizes):
    check(attention, make_case(**sizes).to(backend[1], torch.float32))


def test_matches_the_paper_in_every_dtype(backend):
    case = make_case(heads=2)
    for dtype in dtypes_of(backend):
        check(attention, case.to(backend[1], dtype))


# How the Triton kernels read maps and add up the gradient of the value.
FORMS = {"padded, binned": (True, "binned"), "masked, atomic": (False, "atomic")}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
    padded, method = request.param
    with force_form(padded=padded, value_gradient=method), use_backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_of_the_kernels(form, dtype):
    check(attention, make_case(batch=1, queries=70, heads=2, levels=3, num_points=5, channels=7).to(form, dtype))


def test_every_form_of_ms_deform_attn(form):
    check(deformable, make_case(queries=9, num_points=4, normalised=True).to(form, torch.float32))


def test_every_form_with_all_samples_on_one_pixel_and_outside(form):
    case = make_case(batch=1, queries=90, heads=1, levels=2).to(form, torch.float32)
    with torch.no_grad():
        case.inputs["reference_points"].fill_(0.37)
        case.inputs["offsets"].fill_(0.25)
        for query, number in enumerate([float("nan"), float("inf"), float("-inf"), 1e30, -(2.0**63), 9.5, -9.5]):
            case.inputs["offsets"][0, query, :, 0, 0, query % 2] = number
    check(attention, case)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_at_the_edge_do_not_leak_into_samples_outside(form, value):
    case = make_case(batch=1, queries=4, heads=1, levels=1, num_points=2).to(form, torch.float32)
    with torch.no_grad():
        case.inputs["value"].fill_(value)
        case.inputs["offsets"][:, ::2] = -50
        case.inputs["offsets"][:, 1::2] = 50
    assert (attention(case) == 0).all()


def test_images_are_binned_a_few_at_a_time(form, monkeypatch):
    case = make_case(batch=3, queries=9, heads=2).to(form, torch.float32)
    monkeypatch.setattr(triton_value_binned, "MAX_RECORD_BYTES", 16 * 2 * 9 * 2 * 2 * 3)
    check(attention, case)


def test_maps_are_copied_for_many_samples_only():
    dense, few = 3 * 60 * 60, 300
    value = torch.empty(1, dense, 8, 32, dtype=torch.bfloat16, device="meta")
    assert should_pad(value, torch.empty(1, dense, 8, 3, 16, 2, device="meta"))
    assert not should_pad(value, torch.empty(1, few, 8, 4, 4, 2, device="meta"))


def test_queries_of_a_grid_are_taken_in_blocks():
    order = query_order((10, 12, 3, 4), 132, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(132))
    rows, columns = order[:64] // 12, order[:64] % 12
    assert rows.max() == 7
    assert columns.max() == 7
    assert order[120:].min() == 120
    assert torch.equal(query_order((10, 12), 7, torch.device("cpu")), torch.arange(7).int())


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


def test_torch_backend_in_chunks(monkeypatch):
    monkeypatch.setattr(torch_backend, "MAX_TEMPORARY", 1)
    with use_backend("torch"):
        check(attention, make_case().to("cpu", torch.float64))


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


# Three steps of FAR pass 2**31 elements.
FAR = 1_200_000_000


def spread(tensor: Tensor, dimension: int, folder: Path) -> Tensor:
    """A float16 copy whose stride along one dimension, of at most 3 entries, is FAR; on a CPU in a sparse file.

    It starts in the middle of its storage, where a stride that wraps around finds zeros rather than no memory.
    """
    strides = torch.empty(tensor.shape[:dimension] + tensor.shape[dimension + 1 :]).stride()
    strides = (*strides[:dimension], FAR, *strides[dimension:])
    size = 2**31 + 2 * FAR + tensor.numel()
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


# --- promises ---------------------------------------------------------------------------------------------------------


def test_deterministic_mode_repeats_to_the_bit(backend, deterministic):
    # Many queries on few pixels, so that every pixel's gradient is a sum over many programs.
    case = make_case(batch=1, queries=150, heads=1, levels=1).to(backend[1], torch.float32)
    first, second = with_gradients(attention, case), with_gradients(attention, case)
    check(attention, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_deterministic_gradient_does_not_depend_on_the_order_of_adds(backend, deterministic):
    case = make_case(batch=1, queries=150, heads=1, levels=1).to(backend[1], torch.float32)
    order = torch.randperm(150, device=backend[1]) if backend[0] == "triton" else torch.arange(150)
    value, *others = case.inputs.items()
    shuffled = dict([value, *((name, tensor[:, order]) for name, tensor in others)])
    other = Case(case.spatial_shapes, shuffled, case.grad_out[:, order])
    first, second = (with_gradients(attention, c)["value"] for c in (case, other))
    assert torch.equal(first, second)


def test_only_deterministic_mode_looks_for_the_largest_contribution():
    ScatterBuffer((3,), torch.device("cpu"), bound=lambda: pytest.fail("a pass over the gradient for nothing"))


def test_tuning_of_a_tiny_problem_does_not_decide_for_real_ones():
    heads, queries = 8, 3 * 60 * 60
    tiny, image, batch = size_bucket(heads * 5), size_bucket(heads * queries), size_bucket(16 * heads * queries)
    assert len({tiny, image, batch}) == 3
    assert size_bucket(heads * 3 * 64 * 48) == image, "another size of image would tune anew"


def test_deterministic_bound_covers_weights_above_one(backend, deterministic):
    case = make_case(batch=1, queries=40, heads=1, normalised=True).to(backend[1], torch.float32)
    with torch.no_grad():
        case.inputs["attention_weights"] *= 1e9
    check(deformable, case)


@pytest.mark.parametrize("op", [attention, deformable])
def test_saves_its_inputs_and_nothing_else(backend, op):
    case = make_case(batch=1, queries=3, heads=1, normalised=op is deformable).to(backend[1], torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        op(case)
    assert set(saved) == {t.data_ptr() for t in case.inputs.values()}


@pytest.mark.parametrize("op", [attention, deformable])
def test_opcheck(backend, op):
    case = make_case(batch=2, queries=3, heads=2, normalised=op is deformable).to(backend[1], torch.float32)
    value, *others = (t.detach() for t in case.inputs.values())
    value = value.transpose(1, 2).contiguous().transpose(1, 2)  # results must not take over the strides
    others = [*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in others), None][:3]
    shapes = [size for shape in case.spatial_shapes for size in shape]
    torch.library.opcheck(torch.ops.unept.sparse_sampling, (value, shapes, *others))
    for needs_value, needs_reference in ((True, op is attention), (False, False)):
        arguments = (case.grad_out, value, shapes, *others, needs_value, needs_reference)
        torch.library.opcheck(torch.ops.unept.sparse_sampling_backward, arguments)
        no_queries = [t[:, :0] if t is not None else None for t in others]
        arguments = (case.grad_out[:, :0], value, shapes, *no_queries, needs_value, needs_reference)
        torch.library.opcheck(torch.ops.unept.sparse_sampling_backward, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend, compiler):
    case = make_case(batch=1, queries=5, heads=1).to(backend[1], torch.float32)
    eager = with_gradients(attention, case)

    def scaled(*inputs: Tensor) -> Tensor:
        return 2 * sparse_sampling_attention(inputs[0], case.spatial_shapes, *inputs[1:])

    out = torch.compile(scaled, fullgraph=True, backend=compiler)(*case.inputs.values())
    torch.testing.assert_close(out, 2 * eager["output"])
    for name, grad in gradients(out, case).items():
        torch.testing.assert_close(grad, 2 * eager[name], msg=name)


def test_ms_deform_attn_takes_what_other_models_pass(backend):
    case = make_case(batch=1, queries=3, heads=1, normalised=True).to(backend[1], torch.float32)
    value, locations, weights = case.inputs.values()
    shapes = torch.tensor(case.spatial_shapes, device=backend[1])
    starts = torch.tensor([0, 35], device=backend[1])
    as_tensors = MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    as_lists = ms_deform_attn(value, case.spatial_shapes, [0, 35], locations, weights, im2col_step=1)
    assert torch.equal(as_tensors, deformable(case))
    assert torch.equal(as_lists, deformable(case))


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    "shapes-tensor": ("spatial_shapes", lambda s: torch.tensor(s), TypeError, "Python ints.*tolist"),
    "shapes-floats": ("spatial_shapes", lambda s: [(5.0, 7.0), (3, 4)], TypeError, "Python ints"),
    "shapes-empty": ("spatial_shapes", lambda s: [], ValueError, "one .height, width."),
    "shapes-zero": ("spatial_shapes", lambda s: [(0, 7), (3, 4)], ValueError, "each >= 1"),
    "shapes-sum": ("spatial_shapes", lambda s: [(5, 8), (3, 4)], ValueError, "S = 52 pixels, but value has 47"),
    "shapes-one-pair": (
        "spatial_shapes",
        lambda s: (3, 4),
        ValueError,
        r"is \(3, 4\); it must hold one .height, width.",
    ),
    "shapes-a-number": ("spatial_shapes", lambda s: 47, TypeError, "spatial_shapes is 47; it must hold"),
    "shapes-triple": ("spatial_shapes", lambda s: [(5, 7, 1), (3, 4, 1)], ValueError, "one .height, width."),
    "shapes-negative": ("spatial_shapes", lambda s: [(-5, 7), (3, 4)], ValueError, "each >= 1"),
    "levels": ("spatial_shapes", lambda s: [(47, 1)], ValueError, "offsets has shape"),
    "value-rank": ("value", lambda t: t.flatten(2), ValueError, "value has shape"),
    "value-integer": ("value", lambda t: t.long(), TypeError, r"value has dtype torch.int64.*value.float\(\)"),
    "offsets-integer": ("offsets", lambda t: t.long(), TypeError, "offsets has dtype"),
    "offsets-heads": ("offsets", lambda t: t[:, :, :1], ValueError, "offsets has shape"),
    "offsets-rank": ("offsets", lambda t: t[0], ValueError, "offsets has shape"),
    "offsets-device": ("offsets", lambda t: t.to("meta"), ValueError, "on one device.*meta"),
    "logits-device": ("logits", lambda t: t.to("meta"), ValueError, "on one device.*meta"),
    "logits-integer": ("logits", lambda t: t.long(), TypeError, "logits has dtype"),
    "no-points": ("offsets", lambda t: t[:, :, :, :, :0], ValueError, "logits has shape"),
    "logits-points": ("logits", lambda t: t[..., :1], ValueError, "logits has shape.*offsets"),
    "reference-batch": ("reference_points", lambda t: t.repeat(3, 1, 1), ValueError, "reference_points has shape"),
    "reference-device": ("reference_points", lambda t: t.to("meta"), ValueError, "on one device.*meta"),
}


@pytest.mark.parametrize(("name", "change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_get_one_clear_error(name, change, error, message):
    case = make_case(heads=3)
    arguments = {"spatial_shapes": case.spatial_shapes, **case.inputs}
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        sparse_sampling_attention(**arguments)


def test_ms_deform_attn_names_wrong_arguments():
    value, locations, weights = make_case(normalised=True).inputs.values()
    shapes = SHAPES[:2]
    with pytest.raises(ValueError, match=r"level_start_index is \[0, 30\].*\[0, 35\]"):
        ms_deform_attn(value, shapes, [0, 30], locations, weights)
    with pytest.raises(ValueError, match="level_start_index"):
        ms_deform_attn(value, torch.tensor(shapes), torch.tensor([0, 30]), locations, weights)
    with pytest.raises(TypeError, match="spatial_shapes has dtype"):
        ms_deform_attn(value, torch.tensor(shapes).float(), None, locations, weights)
    with pytest.raises(ValueError, match="attention_weights has shape"):
        ms_deform_attn(value, shapes, None, locations, weights[0])
    for tensor, name in ((locations, "sampling_locations"), (weights, "attention_weights")):
        arguments = {"sampling_locations": locations, "attention_weights": weights}
        with pytest.raises(ValueError, match=f"on one device.*{name} on meta"):
            ms_deform_attn(value, shapes, None, **{**arguments, name: tensor.to("meta")})
        with pytest.raises(TypeError, match=f"{name} has dtype torch.int64"):
            ms_deform_attn(value, shapes, None, **{**arguments, name: tensor.long()})
    with pytest.raises(ValueError, match="at least one point"):
        ms_deform_attn(value, shapes, None, locations[..., :0, :], weights[..., :0])


def test_more_than_the_kernels_can_count():
    """Expanded tensors have no memory behind them."""
    many = 2**30 + 1
    value, score = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"an image has 1073741825 queries; .* at most 2\*\*30"):
        ms_deform_attn(
            value,
            [(1, 1)],
            None,
            torch.zeros(1, 1, 1, 1, 1, 2).expand(1, many, 1, 1, 1, 2),
            score.expand(1, many, 1, 1, 1),
        )
    with pytest.raises(ValueError, match="1073741825 pixels in spatial_shapes"):
        ms_deform_attn(value.expand(1, many, 1, 1), [(1, many)], None, score[..., None].expand(1, 1, 1, 1, 1, 2), score)


# --- the torch backend's table and blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_points", [2, 3])
def test_nan_in_a_map_does_not_reach_samples_outside_it(backend, num_points):
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


@pytest.mark.parametrize("limit", [1, 500, 1500, 5000])
def test_torch_backend_in_blocks_of_queries_heads_and_images(monkeypatch, limit):
    """A block ends between queries, between heads, between images, in the backward with enough samples for its rows."""
    monkeypatch.setattr(torch_backend, "MAX_TEMPORARY", limit)
    with use_backend("torch"):
        check(attention, make_case(queries=60, levels=1).to("cpu", torch.float64))


@pytest.mark.parametrize("map_size", [0, 50])
@pytest.mark.parametrize("limit", [0, 1, 7, 25, 60, 130, 10_000])
def test_blocks_hold_every_query_once_and_whole_maps_in_order(limit, map_size):
    points = torch.empty(3, 5, 4, 1, 2, 2)
    maps = torch.arange(3 * 4).view(3, 4)
    seen = torch.zeros(3, 5, 4)
    for block in torch_backend._blocks(points, limit, map_size):
        images, _, heads = block
        seen[block] += 1
        assert points[block].numel() // 2 <= max(limit, 2)
        number = maps[images, heads].flatten()
        assert torch.equal(number, torch.arange(len(number)) + number[0])
        assert len(number) * map_size <= max(limit, map_size)
    assert (seen == 1).all()


class LargestTensor(TorchDispatchMode):
    """Finds the elements of the largest tensor that is made, apart from those of given shapes and views of them."""

    def __init__(self, shapes: list[torch.Size], known: list[Tensor]):
        super().__init__()
        self.shapes, self.elements = shapes, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage.data_ptr() in self.known:
                continue
            if tensor.shape in self.shapes:
                self.known.add(storage.data_ptr())
            else:
                self.elements = max(self.elements, storage.nbytes() // tensor.element_size())
        return made


def test_torch_backend_bounds_its_temporaries(monkeypatch):
    monkeypatch.setattr(torch_backend, "MAX_TEMPORARY", 1 << 12)
    case = make_case(batch=2, queries=1500, heads=3, levels=1)
    flat = list(case.spatial_shapes[0])
    value, *others = (tensor.detach() for tensor in case.inputs.values())
    out_shape = torch.Size((2, 1500, 3, value.shape[-1]))
    known = [value, *others, case.grad_out]
    with LargestTensor([out_shape, value.shape, *(t.shape for t in others)], known) as largest:
        torch_backend.forward(value, flat, *others)
        torch_backend.backward(case.grad_out, value, flat, *others, True, True)
    assert 0 < largest.elements <= 1 << 12
