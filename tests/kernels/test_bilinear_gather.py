import pytest
import torch

from tests.helpers import reference
from tests.helpers.accuracy import assert_accurate
from tests.helpers.marks import slow
from unept.kernels import _autotune, bilinear_gather, use_backend
from unept.kernels import reference as unfused

PADDINGS = ("zeros", "border")


def make_inputs(dtype, device, shape=(2, 5, 7, 6), count=13, layout="contiguous"):
    """Features and points, which reach 2 pixels beyond the map on each side."""
    B, C, H, W = shape
    span = torch.tensor([W + 3, H + 3])
    if layout == "strided":
        features = torch.randn(B, C, 2 * H, W + 1)[:, :, ::2, 1:]
        points = (torch.rand(B, 2, count) * span[:, None] - 2).permute(0, 2, 1)
    else:
        features = torch.randn(shape)
        points = torch.rand(B, count, 2) * span - 2
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        features, points = features[:1].expand(shape), points[:1].expand(B, count, 2)
    return features.to(device, dtype).requires_grad_(), points.to(device, torch.promote_types(dtype, torch.float32))


def run(function, features, points, grad):
    """Output and gradients of features and points."""
    features, points = features.detach().requires_grad_(), points.detach().requires_grad_()
    out = function(features, points)
    return out.detach(), *torch.autograd.grad(out, (features, points), grad.to(out))


def assert_matches_reference(features, points, padding):
    grad = torch.randn(features.shape[0], features.shape[1], points.shape[1], device=features.device)
    grad = grad.to(features.dtype)
    got = run(lambda f, p: bilinear_gather(f, p, padding), features, points, grad)
    want = run(
        lambda f, p: reference.bilinear_gather(f, p, padding),
        features.cpu().double(),
        points.cpu().double(),
        grad.cpu(),
    )
    same = [None] * 3
    if features.dtype in (torch.float16, torch.bfloat16):
        same = run(lambda f, p: unfused.bilinear_gather(f, p, padding), features.cpu(), points.cpu(), grad.cpu())
    names = ("output", "gradient of features", "gradient of points")
    for name, actual, wanted, rival in zip(names, got, want, same, strict=True):
        if name == "gradient of points" and actual.dtype != features.dtype:
            rival = None  # points stay in float32: its own limit holds
        assert_accurate(actual, wanted, rival, name)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, slow(torch.bfloat16)], ids=str)
def test_values_and_gradients(backend, dtype, padding):
    assert_matches_reference(*make_inputs(dtype, backend[1]), padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layout", [slow("channels_last"), "strided", slow("expanded")])
def test_non_contiguous_inputs(backend, layout, padding):
    assert_matches_reference(*make_inputs(torch.float32, backend[1], layout=layout), padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 37, 3, 2), (3, 2, 1, 13), (1, 17, 11, 1)], ids=str)
def test_odd_sizes_into_poisoned_buffers(backend, deterministic, shape, padding):
    assert_matches_reference(*make_inputs(torch.float32, backend[1], shape, count=19), padding)


def test_more_points_and_channels_than_a_program_takes(backend):
    assert_matches_reference(*make_inputs(torch.float32, backend[1], (2, 19, 3, 4), count=131), "zeros")


def test_more_channels_than_axis_y_of_a_grid_has_programs(monkeypatch):
    """CUDA launches up to 2^31 programs on axis x of a grid, but 65535 on the others."""
    pytest.importorskip("triton")
    grids = []

    def record(self, *, grid, warmup, **arguments):
        grids.extend(grid({**arguments, **config.kwargs}) for config in self.configs)

    monkeypatch.setattr(_autotune.Tuner, "run", record)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features, points = torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, 1, 2, device=device)
    with use_backend("triton"):
        bilinear_gather(features.expand(1, 1_100_000, 1, 1), points)
    assert grids
    for x, *others in grids:
        assert x < 2**31
        assert all(programs <= 65535 for programs in others)


@pytest.mark.parametrize("padding", PADDINGS)
def test_float64_is_exact_and_passes_gradcheck(padding):
    features, points = make_inputs(torch.float64, "cpu", (2, 3, 4, 5), count=7)
    assert_matches_reference(features, points, padding)
    assert torch.autograd.gradcheck(lambda f, p: bilinear_gather(f, p, padding), (features, points.requires_grad_()))


@pytest.mark.parametrize("padding", PADDINGS)
def test_points_of_any_dtype_keep_theirs(backend, padding):
    features, points = make_inputs(torch.float32, backend[1])
    points = points.bfloat16().requires_grad_()
    out = bilinear_gather(features, points, padding)
    assert torch.equal(out, bilinear_gather(features, points.float(), padding))
    (grad,) = torch.autograd.grad(out.sum(), points)
    assert grad.dtype == torch.bfloat16


def test_points_that_are_no_numbers_or_far_away(backend):
    nan, inf, huge = float("nan"), float("inf"), 3e38
    features = torch.rand(1, 2, 3, 4, device=backend[1], requires_grad=True)
    wild = [[nan, 1], [1, nan], [inf, 1], [1, -inf], [huge, 1], [1, -huge], [-1, 1], [1, 3], [4, 0.5]]
    points = torch.tensor([wild], device=backend[1], requires_grad=True)
    out = bilinear_gather(features, points, "zeros")
    grad_features, grad_points = torch.autograd.grad(out.sum(), (features, points))
    assert not out.any()
    assert not grad_features.any()
    assert not grad_points.any()

    out = bilinear_gather(features, points, "border")
    grad_features, grad_points = torch.autograd.grad(out.sum(), (features, points))
    corners = [None, None, (3, 1), (1, 0), (3, 1), (1, 0), (0, 1), (1, 2), (3, 0.5)]
    for p, corner in enumerate(corners):
        want = torch.zeros(2, device=backend[1])
        if corner is not None:
            x, y = corner
            want = (features[0, :, int(y), x] + features[0, :, int(y + 0.5), x]).detach() / 2
        torch.testing.assert_close(out[0, :, p].detach(), want)
    assert grad_features.sum().item() == pytest.approx(2 * 7)
    assert not grad_points[0, :2].any()
    for p, clamped in enumerate("xyxyxyx", start=2):  # the other coordinate is inside the map
        assert (grad_points[0, p, 0] == 0) == (clamped == "x")
        assert (grad_points[0, p, 1] == 0) == (clamped == "y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_point_inside_the_map_has_a_gradient_in_half_precision(backend, dtype):
    """W - 1 = 2049 is 2048 in float16, and 257 is 256 in bfloat16: there a point lies inside all the same."""
    last = {torch.float16: 2049, torch.bfloat16: 257}[dtype]
    features = torch.arange(last + 1.0, device=backend[1]).expand(1, 1, 2, -1).to(dtype).contiguous()
    points = torch.tensor([[[last - 1.0, 0.5]]], device=backend[1], dtype=dtype, requires_grad=True)
    with torch.no_grad():
        features[..., -1] = 0
    bilinear_gather(features, points, "border").sum().backward()
    assert points.grad[0, 0, 0].item() == pytest.approx(1 - last, rel=1e-2)


def test_infinities_outside_the_map_do_not_leak(backend):
    features = torch.full((1, 1, 2, 2), float("inf"), device=backend[1])
    assert bilinear_gather(features, torch.tensor([[[5.0, 5.0]]], device=backend[1])).item() == 0


@pytest.mark.parametrize(
    ("features", "points"),
    [((0, 3, 4, 5), (0, 6, 2)), ((2, 0, 4, 5), (2, 6, 2)), ((2, 3, 4, 5), (2, 0, 2)), ((2, 3, 0, 5), (2, 6, 2))],
    ids=["batch", "channels", "points", "map"],
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_empty_inputs(backend, features, points, padding):
    features = torch.ones(features, device=backend[1], requires_grad=True)
    points = torch.ones(points, device=backend[1], requires_grad=True)
    out = bilinear_gather(features, points, padding)
    assert out.shape == (features.shape[0], features.shape[1], points.shape[1])
    grads = torch.autograd.grad(out.sum(), (features, points))
    assert not out.any()
    assert [g.shape for g in grads] == [features.shape, points.shape]
    assert not any(g.any() for g in grads)


def test_points_of_any_rank(backend):
    features, points = make_inputs(torch.float32, backend[1], count=12)
    want = bilinear_gather(features, points)
    assert torch.equal(bilinear_gather(features, points.view(2, 3, 2, 2, 2)), want.view(2, 5, 3, 2, 2))
    assert torch.equal(bilinear_gather(features, points[:, 0]), want[:, :, 0])


def test_deterministic_gradient_does_not_depend_on_the_order_of_adds(backend, deterministic):
    features, _ = make_inputs(torch.float32, backend[1])
    points = torch.rand(2, 150, 2, device=backend[1]) + 2  # all meet in four pixels
    grad = torch.randn(2, 5, 150, device=backend[1])
    order = torch.randperm(150, device=backend[1]) if backend[0] == "triton" else torch.arange(150)
    first = run(bilinear_gather, features, points, grad)[1]
    second = run(bilinear_gather, features, points[:, order], grad[:, :, order])[1]
    assert torch.equal(first, second)


def test_saves_its_inputs_and_nothing_else(backend):
    features, points = make_inputs(torch.float32, backend[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        bilinear_gather(features, points.requires_grad_())
    assert sorted(saved) == sorted([features.data_ptr(), points.data_ptr()])


@pytest.mark.parametrize("needed", ["features", "points"])
def test_one_gradient_alone(backend, deterministic, needed):
    features, points = make_inputs(torch.float32, backend[1])
    grad = torch.randn(2, 5, 13, device=backend[1])
    both = dict(zip(("features", "points"), run(bilinear_gather, features, points, grad)[1:], strict=True))
    inputs = {"features": features.detach(), "points": points.detach()}
    inputs[needed].requires_grad_()
    (alone,) = torch.autograd.grad(bilinear_gather(**inputs), inputs[needed], grad)
    assert torch.equal(alone, both[needed])


@pytest.mark.slow_interpreted
def test_custom_ops_are_well_formed(backend):
    features, points = make_inputs(torch.float32, backend[1])
    features = features.detach()
    grad = torch.randn(2, 5, 13, device=backend[1])
    torch.library.opcheck(torch.ops.unept.bilinear_gather.default, (features, points, "zeros"))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.unept.bilinear_gather_backward.default, (grad, features, points, "border", *needs)
        )


@pytest.mark.slow_interpreted
def test_compiles_without_a_graph_break(backend, deterministic):
    features, points = make_inputs(torch.float32, backend[1])
    grad = torch.randn(2, 5, 13, device=backend[1])
    compiled = torch.compile(bilinear_gather, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(
        run(bilinear_gather, features, points, grad), run(compiled, features, points, grad), strict=True
    ):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(1, 2, 3)}, ValueError, r"features has shape \(1, 2, 3\); it must be \(B, C, H, W\)"),
        ({"features": torch.zeros(1, 2, 3, 4).int()}, TypeError, r"features has dtype torch.int32.*features.float\(\)"),
        ({"points": torch.zeros(2, 5, 2)}, ValueError, r"points has shape \(2, 5, 2\); it must be \(1, ..., 2\)"),
        ({"points": torch.zeros(1, 5, 3)}, ValueError, r"points has shape \(1, 5, 3\); it must be \(1, ..., 2\)"),
        ({"points": torch.zeros(1, 5, 2).long()}, TypeError, "points has dtype torch.int64"),
        ({"points": torch.zeros(1, 5, 2, device="meta")}, ValueError, "features on cpu, points on meta"),
        ({"features": torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**16)}, ValueError, "2147483648 pixels in features"),
        ({"points": torch.zeros(1, 1, 1, 2).expand(1, 2**15, 2**16, 2)}, ValueError, "2147483648 points; .*at most"),
        ({"padding": "reflect"}, ValueError, "padding is 'reflect'; it must be one of 'zeros', 'border'"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"features": torch.zeros(1, 2, 3, 4), "points": torch.zeros(1, 5, 2), **change}
    with pytest.raises(error, match=message):
        bilinear_gather(**arguments)
