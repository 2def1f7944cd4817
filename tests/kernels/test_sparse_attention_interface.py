"""What sparse sampling attention promises: repeatable gradients, no graph break, what it saves, and clear errors."""

import pytest
import torch
from torch import Tensor

from tests.helpers.attention import SHAPES, Case, attention, check, deformable, gradients, make_case, with_gradients
from unept.kernels import MSDeformAttnFunction, ms_deform_attn, sparse_sampling_attention
from unept.kernels._scatter import ScatterBuffer

# --- deterministic mode -----------------------------------------------------------------------------------------------


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


def test_deterministic_bound_covers_weights_above_one(backend, deterministic):
    case = make_case(batch=1, queries=40, heads=1, normalised=True).to(backend[1], torch.float32)
    with torch.no_grad():
        case.inputs["attention_weights"] *= 1e9
    check(deformable, case)


# --- autograd, torch.library, torch.compile ---------------------------------------------------------------------------


@pytest.mark.parametrize("op", [attention, deformable])
def test_saves_its_inputs_and_nothing_else(backend, op):
    case = make_case(batch=1, queries=3, heads=1, normalised=op is deformable).to(backend[1], torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        op(case)
    assert set(saved) == {t.data_ptr() for t in case.inputs.values()}


@pytest.mark.exhaustive_interpreted
@pytest.mark.parametrize("op", [attention, deformable])
def test_opcheck(backend, op):
    sizes = {"queries": 3, "heads": 2, "channels": 3, "num_points": 2, "shapes": [(2, 3), (1, 2)]}
    case = make_case(**sizes, normalised=op is deformable).to(backend[1], torch.float32)
    value, *others = (t.detach() for t in case.inputs.values())
    value = value.transpose(1, 2).contiguous().transpose(1, 2)  # results must not take over the strides
    others = [*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in others), None][:3]
    shapes = [size for shape in case.spatial_shapes for size in shape]
    torch.library.opcheck(torch.ops.unept.sparse_sampling, (value, shapes, *others))
    leaves = [None if t is None else t.detach().requires_grad_() for t in (value, *others)]
    torch.library.opcheck(torch.ops.unept.sparse_sampling, (leaves[0], shapes, *leaves[1:]))
    spatial_shapes = torch.tensor(case.spatial_shapes, device=backend[1])
    torch.library.opcheck(torch.ops.unept.sparse_sampling, (leaves[0], [], *leaves[1:], spatial_shapes))
    for needs_value, needs_reference in ((True, op is attention), (False, False)):
        arguments = (case.grad_out, value, shapes, *others, needs_value, needs_reference)
        torch.library.opcheck(torch.ops.unept.sparse_sampling_backward, arguments)
        no_queries = [t[:, :0] if t is not None else None for t in others]
        arguments = (case.grad_out[:, :0], value, shapes, *no_queries, needs_value, needs_reference)
        torch.library.opcheck(torch.ops.unept.sparse_sampling_backward, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend, compiler, monkeypatch):
    monkeypatch.setenv("CI", "true")  # Inductor is stricter there: it refuses an op that it could decompose
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
