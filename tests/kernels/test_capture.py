"""The operators in captured graphs: torch.export, torch.compile, torch.jit.trace and ONNX, with nothing else to do."""

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from unept.kernels import (
    DECOMPOSITIONS,
    MSDeformAttnFunction,
    ms_deform_attn,
    sparse_sampling_attention,
    upsample_argmax,
)

SHAPES = [(3, 4), (2, 3)]
OTHER_SHAPES = [(2, 5), (4, 2)]  # as many pixels, elsewhere


def inputs(shapes=SHAPES, queries=5) -> tuple[Tensor, ...]:
    """As the derivatives of Deformable DETR call their op: value, shapes, starts, locations, weights."""
    tensor = torch.tensor(shapes)
    areas = tensor.prod(1)
    value = torch.randn(2, int(areas.sum()), 2, 4)
    locations = torch.rand(2, queries, 2, len(shapes), 3, 2) * 1.4 - 0.2
    weights = torch.rand(2, queries, 2, len(shapes), 3)
    return value, tensor, areas.cumsum(0) - areas, locations, weights


class Deformable(nn.Module):
    def forward(self, value, spatial_shapes, level_start_index, locations, weights):
        return MSDeformAttnFunction.apply(value, spatial_shapes, level_start_index, locations, weights, 64)


class ShapesReadByTheModel(nn.Module):
    def forward(self, value, spatial_shapes, level_start_index, locations, weights):
        return ms_deform_attn(value, spatial_shapes.tolist(), level_start_index, locations, weights)


class FromImages(nn.Module):
    """Both ops and the argmax, with sizes taken from the input, as a whole network has them."""

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (B, _, H, W), samples = maps.shape, (2, 1, 3)
        value = maps.flatten(2).transpose(1, 2).unflatten(2, (2, 4))
        grid = torch.cartesian_prod(torch.arange(4), torch.arange(2)).flip(1)[None] / 4
        offsets = value.mean((1, 2, 3)).view(B, 1, 1, 1, 1, 1) + torch.arange(3.0).view(1, 1, 1, 1, 3, 1)
        offsets = offsets.expand(B, 8, *samples, 2)
        first = sparse_sampling_attention(value, [(H, W)], offsets, offsets[..., 0], grid)
        second = ms_deform_attn(value, [(H, W)], None, offsets.sigmoid(), offsets[..., 1])
        return first, second, upsample_argmax(maps, (2 * H, 2 * W))


def op_names(program: torch.export.ExportedProgram) -> str:
    return " ".join(str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("model", [Deformable(), ShapesReadByTheModel()], ids=lambda model: type(model).__name__)
def test_export_with_shapes_as_a_tensor(model):
    program = torch.export.export(model, inputs())
    assert "unept.sparse_sampling" in op_names(program)
    other = inputs(OTHER_SHAPES)
    torch.testing.assert_close(program.module()(*other), model(*other))
    if isinstance(model, Deformable):
        plain = program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS})
        assert "unept" not in op_names(plain)
        torch.testing.assert_close(plain.module()(*other), model(*other))


@pytest.mark.parametrize("run", [ms_deform_attn, MSDeformAttnFunction.apply], ids=["function", "Function"])
def test_compile_with_shapes_as_a_tensor(run):
    def loss(value, *others):
        return run(value, *others).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for shapes in (SHAPES, OTHER_SHAPES):
        value, *others = inputs(shapes)
        found, wanted = value.clone().requires_grad_(), value.clone().requires_grad_()
        compiled(found, *others).backward()
        loss(wanted, *others).backward()
        torch.testing.assert_close(found.grad, wanted.grad)


def test_compile_and_export_with_sizes_that_vary():
    """One graph for all sizes, which nothing bounds."""
    model, examples = FromImages(), [torch.randn(B, 8, H, W) for B, H, W in ((2, 4, 5), (3, 6, 7), (4, 9, 8))]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    sizes = {0: torch.export.Dim("B"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    exported = [torch.export.export(model, (examples[0],), dynamic_shapes=(sizes,), strict=s) for s in (False, True)]
    for maps in examples:
        wanted = model(maps)
        for run in (compiled, *(program.module() for program in exported)):
            torch.testing.assert_close(run(maps), wanted)
    assert counter.frame_count == 1


def test_wrong_shapes_in_a_graph_are_noticed_when_it_runs():
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="eager")
    value, *others = inputs()
    with pytest.raises(ValueError, match="make S = 13 pixels, but value has 18"):
        compiled(value, torch.tensor([(3, 3), (2, 2)]), *others[1:])


def test_on_the_meta_device():
    meta = [t.to("meta") for t in inputs()]
    assert Deformable()(*meta).shape == (2, 5, 8)
    assert ms_deform_attn(meta[0], SHAPES, None, *meta[3:]).device.type == "meta"
    value, _, starts, *others = inputs()
    with pytest.raises(ValueError, match="no values on the device meta: move it to cpu"):
        ms_deform_attn(value, meta[1], starts, *others)


def test_shapes_and_starts_in_every_form():
    value, shapes, starts, *others = inputs()
    wanted = ms_deform_attn(value, SHAPES, None, *others)
    numbers = [tuple(np.array(shape)) for shape in SHAPES]
    for form in (shapes, np.array(SHAPES), numbers, [[torch.tensor(n) for n in shape] for shape in SHAPES]):
        assert torch.equal(ms_deform_attn(value, form, starts, *others), wanted)
    reference, offsets = torch.rand(1, 5, 2), torch.randn_like(others[0])
    numpy, python = (sparse_sampling_attention(value, s, offsets, others[1], reference) for s in (numbers, SHAPES))
    assert torch.equal(numpy, python)
    for given in (SHAPES, shapes):
        with pytest.raises(ValueError, match=r"level_start_index is \[0, 11\].*\[0, 12\]"):
            ms_deform_attn(value, given, torch.tensor([0, 11]), *others)


def test_the_function_is_one_of_autograd():
    assert issubclass(MSDeformAttnFunction, torch.autograd.Function)
    value, *others = (t.double() if t.is_floating_point() else t for t in inputs(queries=2))
    leaves = [value.requires_grad_(), others[2].requires_grad_(), others[3].requires_grad_()]

    def run(value, locations, weights):
        return MSDeformAttnFunction.apply(value, *others[:2], locations, weights)

    torch.autograd.gradcheck(run, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    mapped = torch.vmap(run, in_dims=(0, None, None))(torch.stack([value, 2 * value]), *leaves[1:])
    torch.testing.assert_close(mapped[1], 2 * run(*leaves))


# --- traces and ONNX --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_tensor", [False, True])
def test_trace(with_tensor):
    model, example = (Deformable(), inputs()) if with_tensor else (FromImages(), (torch.randn(2, 8, 3, 5),))
    other = inputs(OTHER_SHAPES, queries=4) if with_tensor else (torch.randn(3, 8, 6, 4),)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example), file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert "unept::" not in str(traced.inlined_graph)
    for found, wanted in zip(traced(*other), model(*other), strict=True):
        torch.testing.assert_close(found, wanted)


def test_pytorch_knows_no_decomposition():
    # Where the variable CI is set, Inductor refuses to compile what PyTorch could decompose.
    assert DECOMPOSITIONS
    assert not torch._decomp.get_decompositions(list(DECOMPOSITIONS))


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_program(tmp_path):
    pytest.importorskip("onnxscript")
    program = torch.export.export(FromImages(), (torch.randn(2, 8, 3, 5),))
    plain = program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS})
    exported = torch.onnx.export(plain, (), dynamo=True, verbose=False)
    assert all(node.domain in ("", "pkg.onnxscript.torch_lib.common") for node in exported.model.graph)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(tmp_path, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, example = str(tmp_path / "model.onnx"), torch.randn(2, 8, 3, 5)
    axes = {0: "B", 2: "H", 3: "W"}
    dynamic = {"dynamic_shapes": (axes,)} if dynamo else {"dynamic_axes": {"maps": axes}}
    names = {"input_names": ["maps"], "opset_version": 20, "verbose": False}
    torch.onnx.export(FromImages(), (example,), path, dynamo=dynamo, **names, **dynamic)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for maps in (example, torch.randn(3, 8, 6, 4)):
        for found, wanted in zip(session.run(None, {"maps": maps.numpy()}), FromImages()(maps), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_with_shapes_as_a_tensor(tmp_path, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, example, other = str(tmp_path / "model.onnx"), inputs(), inputs(OTHER_SHAPES)
    names = ["value", "spatial_shapes", "level_start_index", "locations", "weights"]
    torch.onnx.export(Deformable(), example, path, dynamo=dynamo, input_names=names, opset_version=20, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = {node.name for node in session.get_inputs()}
    feed = {name: t.numpy() for name, t in zip(names, other, strict=True) if name in taken}
    found = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(found, Deformable()(*other), rtol=1e-4, atol=1e-5)
