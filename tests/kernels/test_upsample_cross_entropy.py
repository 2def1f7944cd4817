import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import reference
from tests.helpers.accuracy import assert_accurate
from tests.helpers.marks import slow
from unept.kernels import (
    DECOMPOSITIONS,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_cross_entropy_pair,
    use_backend,
)
from unept.kernels import reference as unfused
from unept.kernels.upsample import cross_entropy_triton, tiles_torch

HALF = (torch.float16, torch.bfloat16)


def make_inputs(
    device, dtype=torch.float32, shape=(2, 7, 3, 4), size=(9, 11), offset=None, weighted=False, ignored=0.2
):
    """Arguments of the op; a part of the target is ignored; offset is None, "integer" or "float"."""
    B, K = shape[:2]
    target = torch.randint(0, K, (B, *size))
    target[torch.rand(target.shape) < ignored] = 255
    arguments = {
        "logits": (3 * torch.randn(shape)).to(device, dtype).requires_grad_(),
        "target": target.to(device),
        "class_weights": (torch.rand(K) + 0.5).to(device, dtype) if weighted else None,
        "offset": None,
    }
    if offset == "integer":
        arguments["offset"] = torch.randint(-3, 4, (B, 2, *size), device=device)
    elif offset == "float":
        shift = 3 * torch.randn(B, 2, *size)
        # The last pixels of the last image look outside the map, as far as a float goes, or nowhere.
        shift.view(B, 2, -1)[-1:, :, -6:] = torch.tensor(
            [float("inf"), -float("inf"), 3e38, -3e38, 100.0, float("nan")]
        )
        arguments["offset"] = shift.to(device)
    return arguments


def run(function, arguments, grad=None, **options):
    """Output and gradient of logits."""
    logits = arguments["logits"].detach().requires_grad_()
    out = function(**{**arguments, "logits": logits}, **options)
    grad = torch.ones_like(out) if grad is None else grad.to(out)
    return out.detach(), *torch.autograd.grad(out, logits, grad)


def on_cpu(arguments, dtype=None):
    moved = {name: None if tensor is None else tensor.detach().cpu() for name, tensor in arguments.items()}
    for name in ("logits", "class_weights"):
        if dtype is not None and moved[name] is not None:
            moved[name] = moved[name].to(dtype)
    return moved


def assert_matches_reference(arguments, reduction="none", transposed=False):
    """Loss and gradient against plain loops; `transposed` is how the gradient that comes in lies in memory."""
    grad = torch.randn(arguments["target"].shape if reduction == "none" else ())
    if transposed:
        grad = grad.mT.contiguous().mT
    got = run(upsample_cross_entropy, arguments, grad, reduction=reduction)
    want = run(reference.upsample_cross_entropy, on_cpu(arguments, torch.float64), grad, reduction=reduction)
    dtype = arguments["logits"].dtype
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[1].dtype == dtype
    assert_accurate(got[0], want[0], name="loss")
    same = (
        run(unfused.upsample_cross_entropy, on_cpu(arguments), grad, reduction=reduction)[1] if dtype in HALF else None
    )
    assert_accurate(got[1], want[1], same, "gradient of logits")


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float32, "integer"),
        (torch.float16, None),
        slow(torch.float32, None),
        slow(torch.float16, "integer"),
        slow(torch.bfloat16, None),
        slow(torch.bfloat16, "integer"),
    ],
    ids=str,
)
def test_values_and_gradients(backend, dtype, offset):
    assert_matches_reference(make_inputs(backend[1], dtype, offset=offset, weighted=True))


@pytest.mark.parametrize("weighted", [slow(False), True])
@pytest.mark.parametrize("reduction", ["mean", slow("sum")])
def test_reductions(backend, reduction, weighted):
    assert_matches_reference(make_inputs(backend[1], offset="float", weighted=weighted), reduction)


def test_class_weights_have_no_gradient(backend):
    """As those of `F.cross_entropy`; a part of one would be wrong."""
    logits = torch.randn(1, 3, 2, 2, device=backend[1], requires_grad=True)
    target, weights = torch.randint(3, (1, 8, 8), device=backend[1]), torch.ones(3, device=backend[1])
    weights.requires_grad_()
    upsample_cross_entropy(logits, target, class_weights=weights).backward()
    offset = torch.zeros(1, 2, 8, 8, dtype=torch.int16, device=backend[1])
    sum(map(torch.sum, upsample_cross_entropy_pair(logits, target, offset, class_weights=weights))).backward()
    assert weights.grad is None
    assert logits.grad.any()


@pytest.mark.parametrize("offset", [None, "float"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 2, 1, 1), (3, 4)),
        ((1, 40, 2, 3), (7, 5)),
        slow((3, 33, 2, 1), (1, 9)),
        ((1, 5, 11, 13), (4, 5)),
        ((1, 3, 5, 4), (5, 4)),
        slow((2, 19, 2, 2), (16, 16)),
    ],
    ids=str,
)
def test_any_sizes_into_poisoned_buffers(backend, deterministic, shape, size, offset):
    assert_matches_reference(make_inputs(backend[1], shape=shape, size=size, offset=offset))


# Ratios at which a kernel's tile of 8 x 8 pixels fits the lattice of low-size pixels, lies askew or spans too many.
@pytest.mark.parametrize("offset", [slow(None), "integer"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 5, 3, 4), (12, 16)),
        slow((1, 19, 3, 2), (24, 16)),
        slow((1, 2, 2, 1), (32, 16)),
        ((2, 3, 3, 6), (7, 14)),
        slow((1, 3, 2, 4), (7, 14)),
        slow((1, 3, 2, 3), (10, 33)),
        ((1, 3, 9, 2), (9, 16)),
        ((1, 4, 20, 19), (3, 9)),
        slow((1, 150, 2, 2), (8, 16)),
        slow((1, 1000, 1, 2), (4, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16)], ids=str)
def test_any_ratio_and_number_of_classes(backend, dtype, shape, size, offset):
    assert_matches_reference(make_inputs(backend[1], dtype, shape=shape, size=size, offset=offset))


def test_a_single_class_costs_nothing(backend):
    loss, grad = run(upsample_cross_entropy, make_inputs(backend[1], shape=(2, 1, 3, 2), size=(5, 7)))
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize(("shape", "size"), [slow((2, 7, 3, 4), (9, 11)), ((2, 3, 7, 5), (3, 4))], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_interpolate_and_cross_entropy(backend, shape, size, reduction):
    arguments = make_inputs("cpu", shape=shape, size=size, weighted=True)

    def torch_s_own(logits, target, offset, class_weights, reduction):
        z = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(z, target, class_weights, ignore_index=255, reduction=reduction)

    want = run(torch_s_own, arguments, reduction=reduction)
    moved = {name: None if value is None else value.to(backend[1]) for name, value in arguments.items()}
    for actual, expected in zip(run(upsample_cross_entropy, moved, reduction=reduction), want, strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("layout", [slow("channels_last"), "strided", slow("expanded"), "transposed"])
@pytest.mark.parametrize("offset", [slow(None), "float"])
def test_non_contiguous_inputs(backend, layout, offset):
    arguments = make_inputs(backend[1], offset=offset, weighted=True)
    maps = [name for name in ("logits", "target", "offset") if arguments[name] is not None]
    if layout == "channels_last":
        arguments["logits"] = arguments["logits"].detach().contiguous(memory_format=torch.channels_last)
        if offset:
            arguments["offset"] = arguments["offset"].contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        pad = lambda tensor: tensor.detach().repeat_interleave(2, -1)[..., ::2]
        arguments = {name: tensor if tensor is None else pad(tensor) for name, tensor in arguments.items()}
        assert not arguments["target"].is_contiguous()
    elif layout == "transposed":  # as rot90 and mT leave labels
        for name in maps:
            arguments[name] = arguments[name].detach().mT.contiguous().mT
        assert not arguments["target"].is_contiguous()
    else:
        for name in maps:
            arguments[name] = arguments[name].detach()[:1].expand(arguments[name].shape)
    assert_matches_reference(arguments, transposed=layout == "transposed")


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, slow(torch.int16), slow(torch.int32), slow(torch.int64)],
    ids=str,
)
def test_target_and_offset_of_any_integer_dtype(backend, dtype):
    arguments = make_inputs(backend[1], offset="integer")
    arguments["offset"] = arguments["offset"].abs()
    want = run(upsample_cross_entropy, arguments)
    for name in ("target", "offset"):
        arguments[name] = arguments[name].to(dtype)
    for actual, expected in zip(run(upsample_cross_entropy, arguments), want, strict=True):
        if backend[0] == "torch":
            assert torch.equal(actual, expected)
        else:  # another kernel, whose atomic adds may come in another order
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_float64_is_exact_and_passes_gradcheck():
    for offset in (None, "float"):
        arguments = make_inputs("cpu", torch.float64, offset=offset, weighted=True)
        assert_matches_reference(arguments)
        others = {name: value for name, value in arguments.items() if name != "logits"}
        for reduction in ("none", "mean"):
            loss = lambda logits: upsample_cross_entropy(logits, **others, reduction=reduction)  # noqa: B023
            assert torch.autograd.gradcheck(loss, arguments["logits"], fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", slow("sum"), slow("none")])
@pytest.mark.parametrize("reason", ["ignored", "weightless", "no pixels", "no images"])
def test_nothing_counts(backend, reason, reduction):
    sizes = {"no pixels": {"size": (0, 5)}, "no images": {"shape": (0, 3, 2, 2)}}.get(reason, {})
    arguments = make_inputs(backend[1], weighted=True, offset="integer", **sizes)
    if reason == "ignored":
        arguments["target"].fill_(255)
    elif reason == "weightless":
        arguments["class_weights"].zero_()
    loss, grad = run(upsample_cross_entropy, arguments, reduction=reduction)
    assert loss.shape == (arguments["target"].shape if reduction == "none" else ())
    assert grad.shape == arguments["logits"].shape
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize(
    ("reach", "h", "w"),
    [(7, 2, 3), *[pytest.param(reach, 6, 7, marks=pytest.mark.slow) for reach in (2, 7, 40)]],
)
def test_offsets_within_and_beyond_a_tile_s_window(backend, reach, h, w):
    arguments = make_inputs(backend[1], shape=(1, 5, h, w), size=(8 * h, 8 * w))
    # One tile in five looks further than its neighbourhood, as far as across the map.
    far = torch.rand(1, 1, h, w) < 0.2
    far[..., 0, 1] = True
    far = far.repeat_interleave(8, 2).repeat_interleave(8, 3)
    shift = 2 * torch.rand(1, 2, 8 * h, 8 * w) - 1
    arguments["offset"] = torch.where(far, reach * shift, 2 * shift).to(backend[1])
    assert_matches_reference(arguments)


@pytest.mark.parametrize("op", [upsample_cross_entropy, upsample_argmax])
@pytest.mark.parametrize("reach", [(1, 0), (3, 8), (8, 9)])
def test_short_offsets_of_whole_pixels_give_what_the_same_numbers_do_as_floats(op, reach, monkeypatch):
    """The PyTorch backend reads them in another way, tile by tile, up to 8 pixels."""
    monkeypatch.setitem(tiles_torch.SLAB_BYTES, "cpu", 12 * 128 * 3 * 8)  # tiles of 12 rows and 128 columns
    arguments = make_inputs("cpu", torch.float64, shape=(2, 3, 5, 40), size=(37, 300))
    shift = [torch.randint(-n, n + 1, (2, 37, 300)) for n in reach]
    for axis, n in zip(shift, reach, strict=True):
        axis[:, 13, 130], axis[:, -1, -1] = -n, n
    results = []
    for dtype in (torch.int16, torch.float64):
        arguments["offset"] = torch.stack(shift, 1).to(dtype)
        if op is upsample_argmax:
            results.append([upsample_argmax(arguments["logits"], (37, 300), arguments["offset"])])
        else:
            results.append(run(op, arguments, torch.ones(2, 37, 300), reduction="none"))
    for whole, as_float in zip(*results, strict=True):
        torch.testing.assert_close(whole, as_float, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("K", [11, 16, slow(48)])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16)], ids=str)
def test_channels_last_logits_read_in_place_or_padded(backend, deterministic, dtype, K):
    arguments = make_inputs(backend[1], dtype, shape=(1, K, 2, 3), size=(8, 12))
    want = run(upsample_cross_entropy, arguments)
    arguments["logits"] = arguments["logits"].detach().contiguous(memory_format=torch.channels_last)
    for actual, expected in zip(run(upsample_cross_entropy, arguments), want, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("value", [slow(float("inf")), -float("inf"), float("nan")])
@pytest.mark.parametrize("size", [(16, 24), slow((32, 48)), slow((9, 13)), (3, 4)], ids=str)
def test_a_logit_that_is_not_finite_reaches_only_the_pixels_that_read_it(backend, size, value):
    arguments = make_inputs("cpu", shape=(1, 5, 4, 6), size=size, ignored=0)
    arguments["logits"] = arguments["logits"].detach()
    arguments["target"].clamp_(max=3)
    want = run(unfused.upsample_cross_entropy, arguments, reduction="none")
    weight = torch.zeros(1, 1, 4, 6)
    weight[0, 0, 1, 3] = weight[0, 0, 3, 0] = 1
    reads = F.interpolate(weight, size, mode="bilinear")[:, 0] > 0
    arguments["logits"][0, 4][weight[0, 0] == 1] = value
    moved = {name: None if tensor is None else tensor.to(backend[1]) for name, tensor in arguments.items()}
    losses, grad = (out.cpu() for out in run(upsample_cross_entropy, moved, reduction="none"))
    torch.testing.assert_close(losses[~reads], want[0][~reads])
    assert reads.any()
    if value == -float("inf"):
        # The others get the probability of a class that is ruled out.
        assert losses.isfinite().all()
        assert (losses[reads] < want[0][reads]).all()
        assert grad.isfinite().all()
    else:
        assert not losses[reads].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16), slow(torch.bfloat16)], ids=str)
def test_a_pixel_without_a_possible_class(backend, dtype):
    # What pads the classes in a kernel must not become the most likely one.
    arguments = make_inputs(backend[1], dtype, shape=(1, 5, 2, 2), size=(8, 8), ignored=0)
    arguments["logits"] = torch.full_like(arguments["logits"].detach(), -float("inf"))
    losses, grad = run(upsample_cross_entropy, arguments, reduction="none")
    assert losses.isnan().all()
    assert grad.isnan().all()
    arguments["logits"].fill_(torch.finfo(dtype).min / 2)
    losses, _ = run(upsample_cross_entropy, arguments, reduction="none")
    torch.testing.assert_close(losses, torch.full_like(losses, 5.0).log())


def test_ignored_pixels_have_no_loss_and_no_gradient(backend):
    arguments = make_inputs(backend[1], size=(9, 12))
    arguments["target"][:, :, :6] = 255
    losses, grad = run(upsample_cross_entropy, arguments, reduction="none")
    assert not losses[:, :, :6].any()
    assert losses[:, :, 6:].all() == (arguments["target"][:, :, 6:] != 255).all()
    assert not grad[..., 0].any()  # the first of four columns reaches to output column 4
    assert grad[..., 3].any()


def test_a_class_that_is_ruled_out_by_minus_infinity(backend):
    arguments = make_inputs(backend[1], size=(6, 8), shape=(1, 4, 3, 4))
    arguments["logits"] = arguments["logits"].detach()
    arguments["logits"][:, 0] = -float("inf")
    arguments["target"].clamp_(min=1)
    # At size x 2 no pixel lies on a centre, where 0 * infinity would be NaN for PyTorch too; clamped borders do.
    arguments["target"][:, [0, -1]] = 255
    arguments["target"][:, :, [0, -1]] = 255
    loss, grad = run(upsample_cross_entropy, arguments)
    without = {**arguments, "logits": arguments["logits"][:, 1:], "target": arguments["target"] - 1}
    without["target"][arguments["target"] == 255] = 255
    want, grad_without = run(upsample_cross_entropy, without)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad[:, 1:], grad_without)
    assert not grad[:, 0].any()


def test_ignore_index_may_be_a_class_or_negative(backend):
    arguments = make_inputs(backend[1], ignored=0)
    want = F.cross_entropy(
        F.interpolate(arguments["logits"], (9, 11), mode="bilinear"), arguments["target"], ignore_index=3
    )
    torch.testing.assert_close(upsample_cross_entropy(**arguments, ignore_index=3), want)
    arguments["target"][arguments["target"] == 3] = -100
    torch.testing.assert_close(upsample_cross_entropy(**arguments, ignore_index=-100), want)


@pytest.mark.parametrize("wrong", [7, 254, -1])
def test_an_id_that_is_no_class(backend, wrong):
    arguments = make_inputs(backend[1])
    arguments["target"][1, 2, 3:5] = wrong
    if backend[1] == "cpu":
        message = rf"target holds the id {wrong} \(2 pixels hold no class\); ids must be in \[0, 7\)"
        with pytest.raises(ValueError, match=message):
            upsample_cross_entropy(**arguments)
    else:
        losses, grad = run(upsample_cross_entropy, arguments, reduction="none")
        assert losses.isnan().sum() == 2
        assert grad.isnan().any()


@pytest.mark.parametrize("count", [6, slow(38)])
def test_deterministic_gradient_does_not_depend_on_the_order_of_adds(backend, deterministic, count):
    # One low-size pixel takes all contributions; shuffling the tiles of a kernel shuffles their order.
    # An even number of tiles starts at the first pixel.
    arguments = make_inputs(backend[1], shape=(1, 5, 1, 1), size=(1, 8 * count))
    grad = torch.randn(1, 1, 8 * count, device=backend[1])
    tiles = torch.randperm(count) if backend[0] == "triton" else torch.arange(count)
    order = (8 * tiles[:, None] + torch.arange(8)).flatten().to(backend[1])
    first = run(upsample_cross_entropy, arguments, grad, reduction="none")[1]
    arguments["target"] = arguments["target"][:, :, order]
    second = run(upsample_cross_entropy, arguments, grad[:, :, order], reduction="none")[1]
    assert torch.equal(first, second)


def pair_of_calls(arguments, offset, **options):
    """What `upsample_cross_entropy_pair` must return, of a loss without the offset and one with it."""
    shifts = (None, offset)
    return tuple(upsample_cross_entropy(**{**arguments, "offset": s}, reduction="none", **options) for s in shifts)


def run_pair(function, arguments, grads, **options):
    """Both losses of a function and the gradient of the logits."""
    arguments = {**arguments, "logits": arguments["logits"].detach().requires_grad_()}
    losses = function(**arguments, **options)
    (grad,) = torch.autograd.grad(losses, arguments["logits"], [g.to(losses[0]) for g in grads])
    return *(loss.detach() for loss in losses), grad


@pytest.mark.parametrize("weighted", [False, slow(True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("offset", ["integer", slow("float")])
def test_a_pair_is_a_loss_without_and_one_with_an_offset(backend, dtype, offset, weighted):
    arguments = make_inputs(backend[1], dtype, shape=(1, 19, 2, 3), size=(8, 12), offset=offset, weighted=weighted)
    grads = torch.randn(2, 1, 8, 12)
    *losses, grad = run_pair(upsample_cross_entropy_pair, arguments, grads)
    for found, wanted in zip(losses, pair_of_calls(arguments, arguments["offset"]), strict=True):
        assert torch.equal(found, wanted)

    def exact(function, **arguments):
        shifts = (None, arguments.pop("offset"))
        return tuple(function(offset=shift, reduction="none", **arguments) for shift in shifts)

    loops, plain = (
        lambda f=f, **rest: exact(f, **rest) for f in (reference.upsample_cross_entropy, unfused.upsample_cross_entropy)
    )
    want = run_pair(loops, on_cpu(arguments, torch.float64), grads)[2]
    same = run_pair(plain, on_cpu(arguments), grads)[2] if dtype in HALF else None
    assert_accurate(grad, want, same, "gradient of logits")


def test_a_pair_lays_its_logits_out_once_each_way(monkeypatch):
    copied = []
    channels_last = cross_entropy_triton.channels_last
    monkeypatch.setattr(cross_entropy_triton, "channels_last", lambda z: copied.append(1) or channels_last(z))
    arguments = make_inputs("cuda" if torch.cuda.is_available() else "cpu", offset="float")
    with use_backend("triton"):
        run_pair(upsample_cross_entropy_pair, arguments, torch.randn(2, 2, 9, 11))
    assert len(copied) == 2


def test_a_pair_is_exact_in_float64_and_passes_gradcheck():
    arguments = make_inputs("cpu", torch.float64, offset="float", weighted=True)
    others = {name: value for name, value in arguments.items() if name != "logits"}
    pair = lambda logits: upsample_cross_entropy_pair(logits, **others)
    assert torch.autograd.gradcheck(pair, arguments["logits"], fast_mode=True)
    # One of the two alone.
    assert torch.autograd.gradcheck(lambda logits: pair(logits)[1], arguments["logits"], fast_mode=True)


def test_a_pair_repeats_to_the_bit_where_results_must(backend, deterministic):
    arguments = make_inputs(backend[1], shape=(1, 5, 1, 1), size=(8, 16), offset="integer")
    grads = torch.randn(2, 1, 8, 16)
    first = run_pair(upsample_cross_entropy_pair, arguments, grads)[2]
    turned = {**arguments, "target": arguments["target"].flip(2), "offset": -arguments["offset"].flip(3)}
    turned["offset"][:, 1] *= -1
    torch.testing.assert_close(run_pair(upsample_cross_entropy_pair, turned, grads.flip(3))[2], first)
    assert torch.equal(run_pair(upsample_cross_entropy_pair, arguments, grads)[2], first)


def test_a_pair_in_captured_graphs(backend):
    arguments = make_inputs(backend[1], offset="float", weighted=True)
    grads = torch.randn(2, 2, 9, 11)
    compiled = torch.compile(upsample_cross_entropy_pair, fullgraph=True, backend="aot_eager")
    wanted = run_pair(upsample_cross_entropy_pair, arguments, grads)
    for eager, traced in zip(wanted, run_pair(compiled, arguments, grads), strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-7)
    if backend == ("torch", "cpu"):
        ids = arguments["target"]

        class Both(torch.nn.Module):
            def forward(self, logits, offset):
                return upsample_cross_entropy_pair(logits, ids, offset)

        logits, offset = arguments["logits"].detach(), arguments["offset"]
        program = torch.export.export(Both(), (logits, offset))
        plain = program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS})
        assert "unept" not in " ".join(str(node.target) for node in plain.graph.nodes)
        torch.testing.assert_close(plain.module()(logits, offset), Both()(logits, offset))


def largest_allocation(device, function):
    """Bytes: of what one PyTorch op on a CPU holds at its end, of the peak above the start on a GPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("op", [slow("loss"), "argmax"])
def test_never_holds_the_up_sampled_logits(backend, op, monkeypatch):
    # The interpreter takes a minute for what a slab of the torch backend is small against.
    name, device = backend
    K, h, H = (48, 2, 32) if (name, device) == ("triton", "cpu") else (64, 8, 256 if device == "cpu" else 512)
    monkeypatch.setitem(tiles_torch.SLAB_BYTES, device, tiles_torch.SLAB_BYTES["cpu"])
    arguments = make_inputs(device, shape=(1, K, h, h), size=(H, H))
    full_size = K * H * H * 4
    if op == "loss":
        fused, plain = (lambda f=f: run(f, arguments) for f in (upsample_cross_entropy, unfused.upsample_cross_entropy))
    else:
        fused = lambda: upsample_argmax(arguments["logits"], (H, H))
        plain = lambda: unfused.upsample_argmax(arguments["logits"].detach(), (H, H))
    fused()  # the trials of a kernel that is tuned take memory
    assert largest_allocation(device, plain) >= full_size
    assert largest_allocation(device, fused) < full_size / 4


def test_saves_its_inputs_and_nothing_else(backend):
    arguments = make_inputs(backend[1], offset="float", weighted=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        upsample_cross_entropy(**arguments)
    inputs = {tensor.data_ptr() for tensor in arguments.values()}
    beyond = [t for t in saved if t.data_ptr() not in inputs]
    assert all(t.dim() == 0 for t in beyond), "only the mean's two scalars come on top"
    assert inputs <= {t.data_ptr() for t in saved}


@pytest.mark.slow_interpreted
def test_custom_ops_are_well_formed(backend):
    ops = torch.ops.unept
    for offset, weighted in ((None, False), ("float", True)):
        arguments = make_inputs(backend[1], offset=offset, weighted=weighted)
        logits = arguments["logits"].detach()
        rest = (arguments["target"], arguments["offset"], arguments["class_weights"], 255)
        torch.library.opcheck(ops.upsample_cross_entropy.default, (logits, *rest))
        grad = torch.randn(2, 9, 11, device=backend[1])
        torch.library.opcheck(ops.upsample_cross_entropy_backward.default, (grad, logits, *rest))
        torch.library.opcheck(ops.upsample_argmax.default, (logits, 9, 11, arguments["offset"]))
        if offset:
            torch.library.opcheck(ops.upsample_cross_entropy_pair.default, (logits, *rest))
            torch.library.opcheck(ops.upsample_cross_entropy_pair_backward.default, (grad, -grad, logits, *rest))


@pytest.mark.slow_interpreted
def test_compiles_without_a_graph_break(backend):
    arguments = make_inputs(backend[1], offset="float", weighted=True)
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(upsample_cross_entropy, arguments), run(compiled, arguments), strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-7)
    logits, offset = arguments["logits"].detach(), arguments["offset"]
    compiled = torch.compile(upsample_argmax, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, (9, 11), offset), upsample_argmax(logits, (9, 11), offset))


def assert_argmax_matches_reference(arguments):
    size = arguments["target"].shape[1:]
    found = upsample_argmax(arguments["logits"], size, arguments["offset"])
    assert found.dtype == torch.int64
    cpu = on_cpu(arguments, torch.float64)
    z = reference.upsampled(cpu["logits"], size, cpu["offset"])
    best = z.amax(-1)
    # Rounding may pick another class only where it is as good.
    chosen = z.gather(-1, found.cpu()[..., None])[..., 0]
    assert ((best - chosen) <= 1e-5 * best.abs().clamp(min=1)).all()
    assert (found.cpu() == z.argmax(-1)).float().mean() > 0.98


@pytest.mark.parametrize("offset", [None, "integer", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, slow(torch.bfloat16)], ids=str)
def test_argmax(backend, deterministic, dtype, offset):
    assert_argmax_matches_reference(make_inputs(backend[1], dtype, shape=(2, 6, 3, 4), size=(10, 7), offset=offset))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        slow((1, 19, 3, 4), (24, 32)),
        slow((1, 150, 2, 2), (32, 32)),
        ((1, 5, 3, 4), (12, 16)),
        ((1, 1, 3, 3), (7, 7)),
        slow((1, 1000, 1, 2), (4, 8)),
        ((2, 5, 20, 19), (3, 9)),
    ],
    ids=str,
)
def test_argmax_at_any_ratio(backend, shape, size):
    logits = torch.randn(shape)
    want = F.interpolate(logits, size, mode="bilinear").argmax(1)
    assert torch.equal(upsample_argmax(logits.to(backend[1]), size).cpu(), want)


def test_argmax_takes_the_lowest_of_equals(backend):
    logits = torch.randn(1, 1, 3, 4, device=backend[1]).expand(1, 5, 3, 4).clone()
    logits[:, 0] -= 1
    assert (upsample_argmax(logits, (7, 9)) == 1).all()


@pytest.mark.parametrize(("K", "h", "w"), [(5, 1, 4), slow(5, 6, 6), slow(19, 6, 6)])
def test_argmax_where_every_class_is_at_the_lowest_number(backend, K, h, w):
    logits = torch.randn(1, K, h, w)
    logits[..., : w // 2] = torch.finfo(torch.float32).min
    want = F.interpolate(logits, (8 * h, 8 * w), mode="bilinear").argmax(1)
    found = upsample_argmax(logits.to(backend[1]), (8 * h, 8 * w)).cpu()
    assert found.max() < K
    # Where low and ordinary numbers meet, their sum has no digits left for the latter.
    assert torch.equal(found[..., : 4 * w - 8], want[..., : 4 * w - 8])
    assert torch.equal(found[..., 4 * w + 8 :], want[..., 4 * w + 8 :])


def test_nan_is_not_hidden_where_sums_are_integers(backend, deterministic):
    logits = torch.randn(1, 3, 4, 4, device=backend[1])
    logits[0, 1, 2, 2] = float("nan")
    logits.requires_grad_()
    target = torch.zeros(1, 8, 8, dtype=torch.int64, device=backend[1])
    upsample_cross_entropy(logits, target).backward()
    assert logits.grad.isnan().any()


def test_ids_in_a_type_that_cannot_hold_ignore_index(backend):
    logits = torch.randn(1, 200, 2, 2, device=backend[1])
    target = torch.full((1, 4, 4), 156, device=backend[1])  # as a byte, -100 looks like this
    target[0, 0, 0] = 3
    wide = upsample_cross_entropy(logits, target, ignore_index=-100)
    assert upsample_cross_entropy(logits, target.to(torch.uint8), ignore_index=-100) == wide


def test_argmax_takes_the_first_nan(backend):
    logits = torch.randn(1, 6, 2, 2)
    logits[0, 1:3, 0, 0] = float("nan")
    logits[0, 4, 0, 1] = float("nan")
    want = F.interpolate(logits, (5, 4), mode="bilinear").argmax(1)
    assert {1, 4} <= set(want.unique().tolist())
    assert torch.equal(upsample_argmax(logits.to(backend[1]), (5, 4)).cpu(), want)
    # At x4 a tile of 8 x 8 pixels reads nine low-size pixels, and a pixel no more than four of them.
    logits = torch.randn(1, 6, 5, 5)
    logits[0, 3, 2, 2] = float("nan")
    logits[0, 5, 0, 4] = -float("inf")
    reads = F.interpolate((logits[:, 3:4].isnan()).float(), (20, 20), mode="bilinear")[:, 0] > 0
    want = F.interpolate(logits.nan_to_num(neginf=-1e30), (20, 20), mode="bilinear").argmax(1)
    want[reads] = 3
    assert torch.equal(upsample_argmax(logits.to(backend[1]), (20, 20)).cpu(), want)


def test_argmax_of_nothing(backend):
    assert upsample_argmax(torch.zeros(0, 3, 2, 2, device=backend[1]), (4, 5)).shape == (0, 4, 5)
    assert upsample_argmax(torch.zeros(2, 3, 2, 2, device=backend[1]), (0, 5)).shape == (2, 0, 5)


def test_argmax_takes_sizes_of_numpy():
    assert upsample_argmax(LOGITS, tuple(np.array(LOGITS.shape[2:]) * 2)).shape == (2, 4, 4)


LOGITS, TARGET = torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": LOGITS.int()}, TypeError, r"logits has dtype torch.int32.*logits.float\(\)"),
        ({"logits": LOGITS[0]}, ValueError, r"logits has shape \(3, 2, 2\); it must be \(B, K, h, w\)"),
        ({"logits": LOGITS[:, :0]}, ValueError, r"logits has shape \(2, 0, 2, 2\); it needs at least one class"),
        ({"target": TARGET.float()}, TypeError, r"target has dtype torch.float32.*target.long\(\)"),
        ({"target": TARGET[:1]}, ValueError, r"target has shape \(1, 4, 5\); it must be \(2, H, W\): as many label"),
        ({"target": TARGET[:, None]}, ValueError, r"target has shape \(2, 1, 4, 5\); it must be \(B, H, W\)"),
        ({"target": TARGET.to("meta")}, ValueError, "logits on cpu, target on meta"),
        (
            {"offset": torch.zeros(2, 2, 5, 4)},
            ValueError,
            r"offset has shape \(2, 2, 5, 4\); it must be \(2, 2, 4, 5\)",
        ),
        ({"offset": torch.zeros(2, 2, 4, 5).bool()}, TypeError, "offset has dtype torch.bool"),
        ({"offset": torch.zeros(2, 2, 4, 5, device="meta")}, ValueError, "logits on cpu, offset on meta"),
        ({"logits": LOGITS[:, :, :1, :1].expand(2, 3, 2**15, 2**16)}, ValueError, "2147483648 pixels in logits"),
        ({"target": TARGET[:, :1, :1].expand(2, 2**15, 2**16)}, ValueError, "2147483648 pixels in the output"),
        ({"class_weights": torch.ones(3, device="meta")}, ValueError, "logits on cpu, class_weights on meta"),
        ({"class_weights": torch.ones(4)}, ValueError, r"class_weights has shape \(4,\); it must be \(3\)"),
        ({"class_weights": torch.ones(3).long()}, TypeError, "class_weights has dtype torch.int64"),
        ({"reduction": "median"}, ValueError, "reduction is 'median'; it must be one of 'mean', 'sum', 'none'"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        upsample_cross_entropy(**{"logits": LOGITS, "target": TARGET, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": LOGITS.int()}, TypeError, r"logits has dtype torch.int32.*logits.float\(\)"),
        ({"logits": LOGITS[0]}, ValueError, r"logits has shape \(3, 2, 2\); it must be \(B, K, h, w\)"),
        ({"size": 8}, ValueError, r"size is 8; it must be \(height, width\)"),
        ({"size": (4, 5, 6)}, ValueError, r"size is \(4, 5, 6\)"),
        ({"size": (-1, 4)}, ValueError, r"size is \(-1, 4\); .* two ints >= 0"),
        ({"size": (4.0, 5.0)}, ValueError, r"size is \(4.0, 5.0\)"),
        ({"size": (2**15, 2**16)}, ValueError, "2147483648 pixels in the output"),
        (
            {"offset": torch.zeros(2, 2, 5, 4)},
            ValueError,
            r"offset has shape \(2, 2, 5, 4\); it must be \(2, 2, 4, 5\)",
        ),
        ({"offset": torch.zeros(2, 2, 4, 5).bool()}, TypeError, "offset has dtype torch.bool"),
        ({"offset": torch.zeros(2, 2, 4, 5, device="meta")}, ValueError, "logits on cpu, offset on meta"),
    ],
)
def test_wrong_arguments_of_argmax(change, error, message):
    with pytest.raises(error, match=message):
        upsample_argmax(**{"logits": LOGITS, "size": (4, 5), **change})
