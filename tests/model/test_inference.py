"""Averaging views against a reference at full resolution, flips, windows, and what is held meanwhile."""

import copy
import dataclasses
import itertools
import math
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import StandIn
from unept.inference import (
    PAPER_SCALES,
    PROTOCOL,
    InferenceConfig,
    InferenceOptions,
    infer,
    predict_ids,
    resolve,
    window_starts,
)
from unept.model.boundary import DIRECTIONS, Refinement, mirrored_directions
from unept.model.network import UNEPT
from unept.model.output import AveragedOutput, UNEPTOutput, class_ids

# Directions by the angle of their image gradient; the same list as `unept.model.boundary` has, written in another way.
ANGLES = torch.arange(8) * torch.pi / 4 - torch.pi


class FakeModel(StandIn):
    """Sees each 8x8 block by its mean colour: equivariant to mirroring and to cutting out windows, and exactly so.

    The direction is that of the red channel's gradient, which turns around in a mirror.
    """

    def __init__(self):
        super().__init__(3)
        self.calls: list[tuple[int, ...]] = []
        self.outputs: list[weakref.ref] = []
        self.most_held = 0

    def normalized(self, images: Tensor) -> Tensor:
        return images if images.is_floating_point() else images.float() / 64 - 2

    def maps(self, images: Tensor) -> UNEPTOutput:
        images = self.normalized(images)
        images = F.pad(images, (0, -images.shape[3] % 8, 0, -images.shape[2] % 8))
        colors = F.avg_pool2d(images, 8)
        x = torch.linspace(-1, 1, 8).expand(8, 8)
        kernel = torch.stack([x, x.T])[:, None] / 64
        gradient = F.conv2d(images[:, :1], kernel, stride=8)
        towards = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
        direction = torch.einsum("kc,bchw->bkhw", towards, gradient)
        return UNEPTOutput(3 * colors, colors.mean(1, keepdim=True), 30 * direction)

    def forward(self, images: Tensor) -> UNEPTOutput:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.most_held = max(self.most_held, sum(output() is not None for output in self.outputs))
        output = self.maps(images)
        self.calls.append(tuple(images.shape))
        self.outputs += [weakref.ref(output.logits)]
        return output


@pytest.fixture(scope="module")
def unept() -> UNEPT:
    torch.manual_seed(0)
    model = UNEPT(num_classes=3, backbone="resnet10t", d_model=32, num_heads=2, num_points=2, ffn_dim=32)
    with torch.no_grad():  # some pixels on a boundary, and every direction
        model.boundary_head[1].bias.zero_()
        model.boundary_head[1].weight.mul_(100)
        model.direction_head[1].weight.mul_(300)
    return model.eval()


def random_images(*shape: int) -> Tensor:
    """Smooth noise, uint8."""
    low = torch.rand(shape[0], 3, 7, 9) * 255
    return F.interpolate(low, shape[1:], mode="bilinear").round().to(torch.uint8)


@pytest.mark.parametrize("size", [(33, 47), (40, 48), (8, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refine": False},
        {"refine_scale": 2},
        {"refine_scale": 4, "refine_direction": "mean"},
        {"refine_scale": 2, "refine_steps": 3},
        {"window": 64},
    ],
    ids=str,
)
def test_a_single_view_is_the_model_to_the_bit(unept, size, options):
    images = random_images(2, *size)
    expected = unept.predict(images, **{name: value for name, value in options.items() if name != "window"})
    assert torch.equal(predict_ids(unept, images, InferenceConfig(**options)), expected)
    output = infer(unept, images, InferenceConfig(**options))
    assert isinstance(output, UNEPTOutput)
    assert torch.equal(output.logits, unept(images).logits)


def test_refinement_changes_the_ids(unept):
    images = random_images(1, 40, 48)
    ids = [predict_ids(unept, images, InferenceConfig(refine=refine)) for refine in (True, False)]
    assert not torch.equal(*ids)


def full_resolution_average(model, images: Tensor, scales: tuple[float, ...], flip: bool) -> tuple[Tensor, ...]:
    """Probabilities (B, C, H, W) of classes, boundary and directions: each view up-sampled, then averaged."""
    height, width = images.shape[2:]
    padded = F.pad(model.normalized(images), (0, -width % 8, 0, -height % 8))
    full = padded.shape[2:]
    views = []
    for scale in scales:
        size = [max(8, 8 * math.floor(n * scale / 8 + 0.5)) for n in full]
        view = F.interpolate(padded, size, mode="bilinear", antialias=True)
        for mirrored in (False, True) if flip else (False,):
            output = model(view.flip(-1) if mirrored else view)
            maps = [output.logits.softmax(1), output.boundary.sigmoid(), output.direction.softmax(1)]
            if mirrored:
                maps = [m.flip(-1) for m in maps]
                maps[2] = torch.stack([maps[2][:, DIRECTIONS.index((-dx, dy))] for dx, dy in DIRECTIONS], dim=1)
            views.append([F.interpolate(m, full, mode="bilinear") for m in maps])
    return tuple(torch.stack(maps).mean(0)[..., :height, :width] for maps in zip(*views, strict=True))


@pytest.mark.parametrize("size", [(33, 47), (40, 24)])
@pytest.mark.parametrize("flip", [False, True])
def test_averages_agree_with_full_resolution(unept, size, flip):
    images = random_images(2, *size)
    with torch.inference_mode():
        classes, boundary, direction = full_resolution_average(unept, images, PAPER_SCALES, flip)
    config = InferenceConfig(scales=PAPER_SCALES, flip=flip)
    output = infer(unept, images, config)
    padded = [n + -n % 8 for n in size]
    assert isinstance(output, AveragedOutput)
    for maps, expected in zip(output, (classes, boundary, direction), strict=True):
        full = F.interpolate(maps, padded, mode="bilinear")[..., : size[0], : size[1]]
        # Up-sampling in two steps instead of one blurs: a tenth of what the maps vary by.
        assert (full - expected).abs().mean() < 0.12 * expected.std(dim=(2, 3)).mean()
    ids = predict_ids(unept, images, InferenceConfig(scales=PAPER_SCALES, flip=flip, refine=False))
    top = classes.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 0.05
    assert clear.float().mean() > 0.3
    assert torch.equal(ids[clear], classes.argmax(1)[clear])


def test_scales_of_one_grid_average_exactly(unept):
    """All views have the size of the canvas: only the averaging itself is left, and must be exact."""
    images = random_images(1, 33, 47)
    output = infer(unept, images, InferenceConfig(scales=(1.0, 1.01), flip=True))
    with torch.inference_mode():
        padded = F.pad(unept.normalized(images), (0, 1, 0, 7))
        plain, mirrored = unept(padded), unept(padded.flip(-1))
    torch.testing.assert_close(
        output.probabilities, (plain.logits.softmax(1) + mirrored.logits.softmax(1).flip(-1)) / 2
    )
    boundary = (plain.boundary.sigmoid() + mirrored.boundary.sigmoid().flip(-1)) / 2
    torch.testing.assert_close(output.boundary, boundary)


def test_mirrored_directions():
    for k, (dx, dy) in enumerate(DIRECTIONS):
        assert DIRECTIONS[mirrored_directions(8)[k]] == (-dx, dy)
        assert (ANGLES[k].cos().round().item(), ANGLES[k].sin().round().item()) == (dx, dy)


class FineModel(FakeModel):
    """It predicts boundaries and directions of every pixel, the same within a block."""

    def maps(self, images: Tensor) -> UNEPTOutput:
        logits, boundary, direction, _ = super().maps(images)
        edges = (m.repeat_interleave(8, -1).repeat_interleave(8, -2) for m in (boundary, direction))
        return UNEPTOutput(logits, *edges)


@pytest.mark.parametrize("model", [FakeModel(), FineModel()], ids=["coarse", "fine"])
@pytest.mark.parametrize("options", [{}, {"window": 24}], ids=str)
def test_flips_of_a_mirror_equivariant_model_change_nothing(options, model):
    images = random_images(2, 40, 56)
    flipped = infer(model, images, InferenceConfig(flip=True, **options))
    plain = model.maps(images)
    torch.testing.assert_close(flipped.probabilities, plain.logits.softmax(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(flipped.boundary, plain.boundary.sigmoid(), atol=1e-5, rtol=0)
    torch.testing.assert_close(flipped.boundary_logits, plain.boundary, atol=1e-4, rtol=0)
    torch.testing.assert_close(flipped.direction, plain.direction.softmax(1), atol=1e-5, rtol=0)
    assert plain.direction.argmax(1).unique().numel() == 8


def test_fine_boundaries_are_averaged_at_no_more_than_the_images_resolution():
    images = random_images(1, 33, 47)
    for scales, size in (((0.5,), (24, 24)), ((1.0, 2.0), (40, 48)), ((0.5, 1.5), (40, 48))):
        output = infer(FineModel(), images, InferenceConfig(scales=scales, flip=True))
        assert output.boundary.shape == (1, 1, *size)
        assert output.direction.shape == (1, 8, *size)
        assert class_ids(output, (33, 47), Refinement(2, 2)).shape == (1, 33, 47)


@pytest.mark.parametrize("options", [{"flip": True}, {"window": 32, "window_stride": 16, "flip": True}], ids=str)
def test_fine_logits_of_one_scale_average_to_what_the_network_predicts_there(options):
    """Class scores at 1/2 and boundaries at full resolution have canvases of their own."""

    class Finer(FineModel):
        def maps(self, images: Tensor) -> UNEPTOutput:
            logits, boundary, direction, _ = super().maps(images)
            return UNEPTOutput(logits.repeat_interleave(4, -1).repeat_interleave(4, -2), boundary, direction, 2)

    images, model = random_images(2, 40, 56), Finer()
    output, plain = infer(model, images, InferenceConfig(**options)), model.maps(images)
    torch.testing.assert_close(output.probabilities, plain.logits.softmax(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.boundary, plain.boundary.sigmoid(), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.direction, plain.direction.softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(96, 32, 24), (96, 32, 32), (104, 32, 16), (32, 32, 8), (40, 32, 8)]
)
def test_windows_cover_everything_within_bounds(length, window, stride):
    starts = window_starts(length, window, stride)
    counts = torch.zeros(length)
    for start in starts:
        assert 0 <= start <= length - window
        assert start % 8 == 0
        counts[start : start + window] += 1
    assert counts.min() >= 1
    assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("window_batch", [1, 4, 100])
def test_windows_agree_with_the_whole_image_where_context_does_not_matter(window_batch):
    """Every place of the canvas is the average of all windows over it: counts and places are right."""
    images = random_images(2, 60, 85)
    model = FakeModel()
    output = infer(model, images, InferenceConfig(window=32, window_stride=24, window_batch=window_batch))
    plain = model.maps(images)
    torch.testing.assert_close(output.probabilities, plain.logits.softmax(1))
    torch.testing.assert_close(output.direction, plain.direction.softmax(1))
    # 3 rows and 4 columns of windows, of 2 images; the network sees each once, window_batch at a time.
    assert sum(shape[0] for shape in model.calls) == 24
    assert {shape[1:] for shape in model.calls} == {(3, 32, 32)}
    assert max(shape[0] for shape in model.calls) == min(window_batch, 24)


@pytest.mark.parametrize("window_batch", [1, 4])
def test_the_network_sees_every_window_of_every_view_once(window_batch):
    """Once as it is and once mirrored; a view that fits into the window is seen whole."""
    images, seen = random_images(2, 60, 85), Counter()

    class Witness(FakeModel):
        def forward(self, images: Tensor) -> UNEPTOutput:
            seen.update((crop.shape, crop.numpy().tobytes()) for crop in images)
            return super().forward(images)

    model, scales, window, stride = Witness(), (0.5, 1.0, 1.75), 48, 40
    config = InferenceConfig(scales=scales, flip=True, window=window, window_stride=stride, window_batch=window_batch)
    infer(model, images, config)
    expected = Counter()
    padded = F.pad(model.normalized(images), (0, 3, 0, 4))
    for view in (padded, *(F.interpolate(padded, n, mode="bilinear", antialias=True) for n in ((32, 48), (112, 152)))):
        height, width = view.shape[2:]
        for i, j in itertools.product(range(4), range(4)):
            # Steps of 40 until 48 pixels reach the end; the last of them is drawn back to end there.
            top, left = min(i * stride, max(height - window, 0)), min(j * stride, max(width - window, 0))
            if ((i - 1) * stride + window < height and (j - 1) * stride + window < width) or (i, j) == (0, 0):
                for crop in view[:, :, top : top + window, left : left + window]:
                    expected.update((c.shape, c.numpy().tobytes()) for c in (crop, crop.flip(-1)))
    assert len(expected) == 2 * 2 * (1 + 2 * 2 + 3 * 4)
    assert seen == expected


def test_overlapping_windows_are_averaged(unept):
    """A real network sees different context in each window: the mean of both where two overlap."""
    images = random_images(1, 32, 40)
    output = infer(unept, images, InferenceConfig(window=32, window_stride=8))
    with torch.inference_mode():
        left, right = (unept(images[..., x : x + 32]).logits.softmax(1) for x in (0, 8))
    torch.testing.assert_close(output.probabilities[..., 0], left[..., 0])
    torch.testing.assert_close(output.probabilities[..., 1:4], (left[..., 1:] + right[..., :3]) / 2)
    torch.testing.assert_close(output.probabilities[..., 4], right[..., 3])
    assert (left[..., 1:] - right[..., :3]).abs().max() > 1e-3


def test_a_window_longer_than_one_side(unept):
    model = FakeModel()
    infer(model, random_images(1, 20, 96), InferenceConfig(window=48))
    assert {shape[1:] for shape in model.calls} == {(3, 24, 48)}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [(33, 47)]),
        ({"flip": True}, [(40, 48)]),
        ({"scales": PAPER_SCALES}, [(24, 24), (32, 40), (40, 48), (48, 64), (64, 72), (72, 88)]),
        ({"scales": (0.01,)}, [(8, 8)]),
        ({"short_side": 66}, [(80, 96)]),
        ({"short_side": 33}, [(33, 47)]),
        ({"short_side": 0, "window": 0}, [(33, 47)]),
        ({"window": 0, "flip": True}, [(40, 48)]),
        ({"short_side": 66, "scales": (0.5,)}, [(40, 48)]),
    ],
    ids=str,
)
def test_what_the_network_sees(options, sizes):
    model, config = FakeModel(), InferenceConfig(**options)
    ids = predict_ids(model, random_images(1, 33, 47), config)
    assert {shape[0] for shape in model.calls} == {2 if config.flip else 1}, "a view and its mirror image at once"
    assert [shape[2:] for shape in model.calls] == sizes
    assert ids.shape == (1, 33, 47)


def test_no_view_outlives_its_turn():
    model = FakeModel()
    infer(model, random_images(1, 64, 64), InferenceConfig(scales=PAPER_SCALES, flip=True, window=32, window_batch=3))
    assert len(model.calls) > 30
    assert model.most_held <= 1


class ConstantModel(StandIn):
    """Takes no memory of its own."""

    def forward(self, images: Tensor) -> UNEPTOutput:
        maps = torch.zeros(()).expand(len(images), self.num_classes + 9, images.shape[2] // 8, images.shape[3] // 8)
        return UNEPTOutput(*maps.split([self.num_classes, 1, 8], dim=1))


class LiveBytes(TorchDispatchMode):
    """The peak of what all tensors hold that are made meanwhile, in bytes, each storage counted once."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return made


@pytest.mark.parametrize(("num_classes", "height", "width", "window"), [(19, 1024, 2048, 768), (150, 512, 683, 480)])
def test_memory_of_twelve_views_is_bounded(num_classes, height, width, window):
    """All that is held beside the network's activations: never two volumes of logits at full resolution.

    It grows neither with the number of views, beyond two maps on the canvas (the running sum and what is added to it)
    and the view before, nor with the number of windows.
    """
    model, image = ConstantModel(num_classes), torch.zeros(3, height, width, dtype=torch.uint8)

    def peak_of(function, scales: tuple[float, ...], **options) -> int:
        with LiveBytes() as live:
            function(model, image, InferenceConfig(scales=scales, flip=True, window=window, **options))
        return live.peak

    volume = num_classes * height * width * 4
    peak = peak_of(predict_ids, PAPER_SCALES)
    print(f"\n12 views of {width}x{height}, {num_classes} classes: {peak / 2**20:.0f} MiB, {peak / volume:.2f} volumes")
    assert peak <= 2 * volume
    canvas = (num_classes + 9) * height * width * 4 * 1.75**2 / 64
    alone = peak_of(infer, PAPER_SCALES[-1:])
    assert peak <= alone + 3.1 * canvas
    assert peak_of(infer, PAPER_SCALES[-1:], window_stride=window // 4) <= alone * 1.01


def test_a_single_image_without_batch(unept):
    image = random_images(1, 33, 47)
    config = InferenceConfig(flip=True)
    assert torch.equal(predict_ids(unept, image[0], config), predict_ids(unept, image, config))


def test_modes_are_restored_even_after_an_error(unept):
    unept.train()
    frozen = unept.backbone.eval()
    infer(unept, random_images(1, 16, 16), InferenceConfig())
    with pytest.raises(ValueError, match=r"they must have 3 channels"):
        infer(unept, random_images(1, 16, 16)[:, :2], InferenceConfig())
    assert unept.training
    assert unept.encoder.layers[0].training
    assert not frozen.training
    unept.eval()


def test_a_model_without_boundaries():
    model = UNEPT(
        3, backbone="resnet10t", d_model=32, num_heads=2, num_points=2, ffn_dim=32, context_queries="learned"
    ).eval()
    images = random_images(1, 40, 48)
    output = infer(model, images, InferenceConfig(flip=True, window=24))
    assert output.boundary is None
    assert output.direction is None
    torch.testing.assert_close(output.probabilities.sum(1), torch.ones(1, 5, 6))
    assert torch.equal(predict_ids(model, images, InferenceConfig()), model.predict(images))


def test_autocast(unept):
    images = random_images(1, 16, 24)
    assert infer(unept, images, InferenceConfig(amp="bf16")).logits.dtype == torch.bfloat16
    assert infer(unept, images, InferenceConfig(amp="bf16", flip=True)).probabilities.dtype == torch.float32


def test_maps_of_any_resolution_cover_the_padded_image():
    """`class_ids` reads the maps on the grid of the image, not on one of 8 pixels a map pixel."""
    logits = torch.eye(2)[None, :, :, None] * 10  # class 0 above, class 1 below
    ids = class_ids(UNEPTOutput(logits, None, None), (29, 20), None)
    assert ids[0, :16].unique().tolist() == [0]
    assert ids[0, 16:].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "at least one"),
        ({"scales": (1.0, 0.0)}, "positive"),
        ({"scales": (float("nan"),)}, "positive"),
        ({"window": None}, "window is None; give a value"),
        ({"window": 100}, "window is 100; it must be a positive multiple of 8"),
        ({"window": -8}, "window is -8"),
        ({"window": 32, "window_stride": 12}, "window_stride is 12"),
        ({"window": 32, "window_stride": 40}, "window_stride is 40 and window 32"),
        ({"window_stride": 32}, "window 0; give a window that is at least as large, or no stride"),
        ({"window": 32, "window_stride": -8}, "window_stride is -8"),
        ({"window_batch": 0}, "window_batch is 0"),
        ({"refine_scale": 0}, "refine_scale is 0"),
        ({"refine_scale": 128}, "refine_scale is 128"),
        ({"refine_steps": 0}, "refine_steps is 0"),
        ({"refine_steps": 128}, "refine_steps is 128"),
        ({"short_side": -1}, "short_side is -1"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "scale 1 without flip; images at their own size; whole images; refined by 1 px"),
        (
            {"scales": PAPER_SCALES, "flip": True, "window": 480, "short_side": 512, "refine": False},
            "scales 0.5 0.75 1 1.25 1.5 1.75 with flip; short side 512; windows of 480 with stride 320; not refined",
        ),
    ],
    ids=["plain", "paper"],
)
def test_a_protocol_in_one_line(options, line):
    assert InferenceConfig(**options).describe() == line


@pytest.mark.parametrize(("window", "stride"), [(480, 320), (768, 512), (32, 16), (8, 8), (0, 0)])
def test_default_stride_is_two_thirds(window, stride):
    config = InferenceConfig(window=window)
    assert config.window_stride == stride
    assert config == InferenceConfig(window=window, window_stride=stride)


def trained_model(refines=True, **preprocessing) -> StandIn:
    model = StandIn(3, refines)
    model.preprocessing = {"input": "uint8 RGB", **preprocessing}
    return model


RUN = {"short_side": 512, "window": 480, "window_stride": 240, "refine": False, "refine_scale": 2, "amp": "off"}


@pytest.mark.parametrize(
    ("chosen", "different"),
    [
        ({}, {}),
        ({"flip": True, "scales": (0.5, 1.0)}, {"flip": True, "scales": (0.5, 1.0)}),
        ({"refine": True}, {"refine": True}),
        ({"refine_scale": 3}, {"refine_scale": 3}),
        ({"refine_steps": 2}, {"refine_steps": 2}),
        ({"window": 96}, {"window": 96, "window_stride": 64}),
        ({"window": 480, "window_stride": 320}, {"window_stride": 320}),
        ({"window_stride": 320}, {"window_stride": 320}),
        ({"window": 0}, {"window": 0, "window_stride": 0}),
        ({"short_side": 0}, {"short_side": 0}),
        ({"amp": "auto"}, {"amp": "auto"}),
    ],
    ids=str,
)
def test_what_is_left_open_is_done_as_the_model_was_trained(chosen, different):
    config = resolve(InferenceOptions(**chosen), trained_model(**RUN))
    assert config == InferenceConfig(**{**RUN, **different})
    assert None not in vars(config).values()


def test_without_a_past_the_defaults_hold():
    assert resolve(InferenceOptions(), trained_model()) == InferenceConfig()


def test_a_model_without_boundaries_is_not_refined():
    assert not resolve(InferenceOptions(refine=True), trained_model(refines=False)).refine


def test_what_a_run_fixes_comes_back():
    config = InferenceConfig(
        scales=(0.5, 2.0), flip=True, window=480, refine=False, refine_scale=2, refine_direction="mean", amp="bf16"
    )
    kept = config.protocol()
    assert kept == {
        "window": 480, "window_stride": 320, "refine": False, "refine_scale": 2, "refine_steps": 1,
        "refine_direction": "mean", "amp": "bf16",
    }  # fmt: skip
    assert set(kept) < set(PROTOCOL)
    assert resolve(InferenceOptions(scales=(0.5, 2.0), flip=True), trained_model(**kept)) == config


def test_bad_options_are_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="window is 30"):
        InferenceOptions(window=30)
    with pytest.raises(ValueError, match="window_stride is 40 and window 32"):
        InferenceOptions(window=32, window_stride=40)
    open_window = InferenceOptions(window_stride=40)  # it depends on the model's window
    assert resolve(open_window, trained_model(window=48)).window_stride == 40
    with pytest.raises(ValueError, match="window_stride is 40 and window 32"):
        resolve(open_window, trained_model(window=32))


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        InferenceConfig().window = 32


@pytest.mark.parametrize("config", [InferenceConfig(), InferenceConfig(flip=True), InferenceConfig(window=64)])
def test_images_with_other_channels_are_refused(config):
    options = {"backbone": "resnet10t", "d_model": 32, "num_heads": 2, "num_points": 2, "ffn_dim": 32}
    model = UNEPT(3, in_chans=4, mean=(0.5,) * 4, std=(0.5,) * 4, **options)
    with pytest.raises(ValueError, match=r"images have shape \(1, 3, 64, 96\); they must"):
        infer(model, torch.zeros(1, 3, 64, 96, dtype=torch.uint8), config)


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"scales": (0.5, 1.0)}, {"window": 16}])
def test_a_batch_without_images(unept, options):
    assert predict_ids(unept, random_images(0, 33, 47), InferenceConfig(**options)).shape == (0, 33, 47)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_normalised_images_of_other_precisions_are_seen_at_several_scales(unept, dtype):
    images, config = unept.normalized(random_images(1, 33, 47)), InferenceConfig(scales=(0.5, 1.0), amp="off")
    wanted = infer(unept, images, config).scores
    assert (infer(unept, images.to(dtype), config).scores - wanted).abs().max() < 0.02


def test_ids_are_the_callers(unept):
    """They may be written to, and be the labels of a loss that has a gradient."""
    images = random_images(1, 33, 47)
    logits = unept(images).logits
    for ids in (unept.predict(images), predict_ids(unept, images, InferenceConfig())):
        F.cross_entropy(F.interpolate(logits, ids.shape[1:]), ids).backward(retain_graph=True)
        ids[:, :4] = 1


def test_threads_share_a_vit_whose_positions_are_resized():
    """It has the embedding of one image's size while it sees it, and its own afterwards."""
    options = {"d_model": 32, "num_heads": 2, "num_points": 2, "ffn_dim": 32, "position_resize": "bilinear"}
    model = UNEPT(3, backbone="vit_tiny_patch16_224", **options).eval()
    images = [random_images(1, 32 + 16 * i, 64 - 8 * i) for i in range(3)]
    alone = [infer(model, image, InferenceConfig(amp="off")).scores for image in images]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ThreadPoolExecutor(3) as pool:
        scores = pool.map(lambda i: infer(model, images[i % 3], InferenceConfig(amp="off")).scores, range(24))
        for i, found in enumerate(scores):
            assert torch.equal(found, alone[i % 3])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_half_precision_weights_are_not_mixed_with_bfloat16():
    options = {"backbone": "resnet10t", "d_model": 32, "num_heads": 2, "num_points": 2, "ffn_dim": 32}
    model, images = UNEPT(3, **options).eval(), torch.randint(256, (1, 3, 64, 96)).byte()
    for config in (InferenceConfig(amp="bf16"), InferenceConfig(amp="bf16", flip=True)):
        wanted = infer(model, images, dataclasses.replace(config, amp="off")).scores
        found = infer(copy.deepcopy(model).half(), images, config).scores
        assert (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
