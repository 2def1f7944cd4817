"""The ops in plain PyTorch (`unept.kernels.reference`) against plain loops in float64 straight from the paper."""

import inspect

import pytest
import torch

from tests.helpers import reference as loops
from tests.helpers.accuracy import assert_accurate
from tests.kernels.test_boundary_targets import assert_matches_reference as assert_targets
from tests.kernels.test_boundary_targets import make_labels
from tests.kernels.test_upsample_cross_entropy import make_inputs
from unept import kernels
from unept.kernels import reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 7), (3, 1)]
OPS = [
    "sparse_sampling_attention",
    "ms_deform_attn",
    "bilinear_gather",
    "upsample_cross_entropy",
    "upsample_argmax",
    "boundary_targets",
]


def samples(normalised: bool) -> list[torch.Tensor]:
    """value, offsets or locations, logits or weights, reference points; float64, away from integer positions."""
    value = torch.randn(2, sum(h * w for h, w in SHAPES), 3, 4)
    points = 1.4 * torch.rand(2, 6, 3, 2, 5, 2) - 0.2 if normalised else 3 * torch.randn(2, 6, 3, 2, 5, 2)
    return [tensor.double().requires_grad_() for tensor in (value, points, torch.randn(2, 6, 3, 2, 5))]


def test_attention():
    inputs = [*samples(normalised=False), torch.rand(1, 6, 2, dtype=torch.float64, requires_grad=True)]
    grad = torch.randn(2, 6, 12, dtype=torch.float64)
    value, offsets, logits, centres = inputs
    out = reference.sparse_sampling_attention(value, SHAPES, offsets, logits, centres)
    wanted = loops.sparse_sampling_attention(value, SHAPES, offsets, logits, centres, grad)
    names = ("output", "value", "offsets", "logits", "reference points")
    for name, found, want in zip(names, [out, *torch.autograd.grad(out, inputs, grad)], wanted, strict=True):
        assert_accurate(found, want, name=name)


def test_attention_of_deformable_detr():
    inputs = samples(normalised=True)
    grad = torch.randn(2, 6, 12, dtype=torch.float64)
    value, locations, weights = inputs
    out = reference.ms_deform_attn(value, SHAPES, None, locations, weights)
    wanted = loops.ms_deform_attn(value, SHAPES, locations, weights, grad)
    for found, want in zip([out, *torch.autograd.grad(out, inputs, grad)], wanted, strict=True):
        assert_accurate(found, want)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("size", [(7, 6), (1, 4), (1, 1)], ids=str)
def test_gather(size, padding):
    features = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 11, 2, dtype=torch.float64) * torch.tensor([size[1] + 3, size[0] + 3]) - 2
    points.requires_grad_()
    results = [f(features, points, padding) for f in (reference.bilinear_gather, loops.bilinear_gather)]
    grad = torch.randn_like(results[0])
    found, wanted = ([out, *torch.autograd.grad(out, (features, points), grad)] for out in results)
    for actual, expected in zip(found, wanted, strict=True):
        assert_accurate(actual, expected)
    shaped = reference.bilinear_gather(features, points[:, :10].view(2, 5, 2, 2), padding)
    assert torch.equal(shaped, found[0][:, :, :10].unflatten(2, (5, 2)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [None, "integer", "float"])
def test_cross_entropy(offset, weighted, reduction):
    arguments = make_inputs("cpu", torch.float64, offset=offset, weighted=weighted)
    results = [
        f(**arguments, reduction=reduction) for f in (reference.upsample_cross_entropy, loops.upsample_cross_entropy)
    ]
    grad = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(out, arguments["logits"], grad)[0] for out in results]
    assert_accurate(*results)
    assert_accurate(*gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_where_nothing_is_valid(reduction):
    arguments = make_inputs("cpu", weighted=True, ignored=1.0)
    loss = reference.upsample_cross_entropy(**arguments, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), arguments["logits"])
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("offset", [None, "integer", "float"])
def test_argmax(offset):
    arguments = make_inputs("cpu", torch.float64, shape=(2, 6, 3, 4), size=(10, 7), offset=offset)
    z = loops.upsampled(arguments["logits"].detach(), (10, 7), arguments["offset"])
    assert torch.equal(reference.upsample_argmax(arguments["logits"], (10, 7), arguments["offset"]), z.argmax(-1))


@pytest.mark.parametrize(("radius", "num_directions"), [(1, 8), (2.5, 5), (5, 16)])
@pytest.mark.parametrize("kind", ["blobs", "noise"])
def test_targets(kind, radius, num_directions):
    labels = make_labels("cpu", (2, 11, 13), kind=kind, dtype=torch.uint8)
    assert assert_targets(labels, radius, num_directions, reference.boundary_targets) > 40


def calls(dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments of every op, in a floating-point dtype."""
    value, points, scores = (tensor.detach().to(dtype) for tensor in samples(normalised=True))
    features, gathered = torch.randn(2, 3, 5, 6).to(dtype), (5 * torch.rand(2, 4, 2)).to(dtype)
    target, offset = torch.randint(3, (2, 9, 8)), torch.randn(2, 2, 9, 8).to(dtype)
    return {
        "sparse_sampling_attention": (value, SHAPES, points, scores, torch.rand(2, 6, 2).to(dtype)),
        "ms_deform_attn": (value, SHAPES, None, points, scores),
        "bilinear_gather": (features, gathered),
        "upsample_cross_entropy": (features, target, offset),
        "upsample_argmax": (features, (9, 8), offset.long()),
        "boundary_targets": (target,),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_floating_point_dtype(dtype):
    for name, arguments in calls(dtype).items():
        out = getattr(reference, name)(*arguments)
        if name not in ("upsample_argmax", "boundary_targets"):
            assert out.dtype == dtype, name
            assert out.isfinite().all(), name


@pytest.mark.parametrize("op", OPS)
def test_equals_the_op_and_is_traced(op):
    arguments = calls(torch.float32)[op]
    function = getattr(reference, op)

    class Network(torch.nn.Module):
        def forward(self, *tensors):
            given = iter(tensors)
            return function(*(next(given) if isinstance(a, torch.Tensor) else a for a in arguments))

    tensors = tuple(a for a in arguments if isinstance(a, torch.Tensor))
    program = torch.export.export(Network(), tensors)
    assert "unept" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    with kernels.use_backend("torch"):
        wanted = getattr(kernels, op)(*arguments)
    for found in (function(*arguments), program.module()(*tensors)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("op", OPS)
def test_has_the_signature_of_the_op(op):
    wanted = inspect.signature(getattr(kernels, op)).parameters
    found = inspect.signature(getattr(reference, op)).parameters
    assert list(found) == [name for name in wanted if name != "im2col_step"]
    assert [p.default for p in found.values()] == [wanted[name].default for name in found]
    assert [p.kind for p in found.values()] == [wanted[name].kind for name in found]
