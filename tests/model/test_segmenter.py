"""`Segmenter`: every kind of input, what comes back for each pixel, and what it holds meanwhile."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.helpers.models import StandIn
from tests.helpers.runs import small_model
from unept import UNEPT, Segmentation, Segmenter, UNEPTOutput, kernels
from unept.colors import overlay
from unept.data import DatasetError
from unept.inference import PAPER_SCALES, InferenceConfig, infer, predict, predict_ids
from unept.model.boundary import DIRECTIONS
from unept.model.output import AveragedOutput

PALETTE = [[90, 160, 230], [10, 40, 120], [220, 200, 120]]


@pytest.fixture(scope="module")
def model() -> UNEPT:
    torch.manual_seed(0)
    options = {"backbone": "resnet10t", "d_model": 32, "num_heads": 2, "num_points": 2, "ffn_dim": 32}
    model = UNEPT(3, classes=["sky", "sea", "sand"], palette=PALETTE, **options)
    with torch.no_grad():  # some pixels on a boundary, every direction, and classes that vary
        model.boundary_head[1].bias.zero_()
        model.boundary_head[1].weight.mul_(100)
        model.direction_head[1].weight.mul_(300)
        model.classifier.weight.mul_(10)
    return model.eval()


@pytest.fixture
def pixels() -> np.ndarray:
    """(33, 47, 3) uint8, smooth."""
    low = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(1)) * 255
    return F.interpolate(low, (33, 47), mode="bilinear")[0].round().to(torch.uint8).permute(1, 2, 0).numpy()


def tensor_of(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def same(a: Segmentation, b: Segmentation) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "confidence", "boundary", "image"))


def test_every_kind_of_image(model, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    segmenter = Segmenter(model)
    expected = segmenter(pixels)
    assert torch.equal(expected.ids, model.predict(tensor_of(pixels)[None])[0])
    assert torch.equal(expected.image, tensor_of(pixels))
    kinds = [
        tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), tensor_of(pixels),
        np.asfortranarray(pixels), pixels[..., ::-1][..., ::-1],
    ]  # fmt: skip
    assert all(same(segmenter(image), expected) for image in kinds)
    several = segmenter([*kinds, pixels[:20]])
    assert all(same(result, expected) for result in several[:-1])
    assert several[-1].ids.shape == (20, 47)
    assert segmenter(()) == []


def test_batches_are_seen_at_once(model, pixels):
    calls = []
    hook = model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    segmenter = Segmenter(model)
    both = np.stack([pixels, pixels[::-1]])
    results = [segmenter(both), segmenter(torch.from_numpy(both).permute(0, 3, 1, 2))]
    hook.remove()
    assert calls == [2, 2]
    assert [len(listed) for listed in results] == [2, 2]
    for listed in results:
        assert torch.equal(listed[1].image, tensor_of(pixels[::-1].copy()))
        assert torch.equal(listed[1].ids, segmenter(pixels[::-1]).ids)
    assert segmenter(both[:0]) == Segmenter(model, flip=True)(both[:0]) == []


def test_images_are_turned_upright(model, pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    segmenter = Segmenter(model)
    for image in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        assert torch.equal(segmenter(image).image, tensor_of(np.rot90(pixels, -1).copy()))


def test_a_damaged_exif_tag_is_named(model, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF")
    for image in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        with pytest.raises(ValueError, match=r"(a\.png|the image) can.t be read .*the file is damaged"):
            Segmenter(model)(image)


def test_other_modes_of_pil(model, pixels):
    gray, deep = pixels[..., 0], pixels[..., 0].astype(np.uint16) * 256
    segmenter = Segmenter(model)
    expected = segmenter(np.stack([gray] * 3, axis=-1))
    for image in (Image.fromarray(gray), Image.fromarray(deep), Image.fromarray(gray).convert("RGBA")):
        assert same(segmenter(image), expected)


def full_size(model: UNEPT, image: Tensor, config: InferenceConfig) -> tuple[Tensor, Tensor]:
    """Probabilities (K, H, W) at full size, read where the refinement reads them, and of the boundary (H, W)."""
    height, width = image.shape[1:]
    output = infer(model, image, config)
    size = (height + -height % 8, width + -width % 8)
    plain = config.scales == (1.0,) and not config.flip and not config.window
    assert isinstance(output, UNEPTOutput if plain else AveragedOutput)
    boundary_logits = output.boundary if plain else output.boundary.logit()
    maps = [F.interpolate(m.float(), size, mode="bilinear")[0] for m in (output[0], boundary_logits, output.direction)]
    scores, boundary, direction = maps[0].softmax(0) if plain else maps[0], maps[1][0].sigmoid(), maps[2].argmax(0)
    y, x = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    if config.refine:
        step = torch.tensor(DIRECTIONS)[direction] * (boundary > 0.5)[..., None] * config.refine_scale
        x, y = (x + step[..., 0]).clamp(0, size[1] - 1), (y + step[..., 1]).clamp(0, size[0] - 1)
    return scores[:, y, x][:, :height, :width], boundary[:height, :width]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refine": False},
        {"refine_scale": 3},
        {"scales": PAPER_SCALES, "flip": True, "refine_scale": 2},
        {"flip": True, "refine": False},
        {"window": 24},
        {"scales": (12.0,), "refine_scale": 3},  # maps larger than the image
    ],
    ids=str,
)
def test_confidence_and_boundary(model, pixels, options):
    result = Segmenter(model, **options)(pixels)
    config = InferenceConfig(**options)
    scores, boundary = full_size(model, tensor_of(pixels), config)
    assert torch.equal(result.ids, predict_ids(model, tensor_of(pixels), config)[0])
    assert result.ids.unique().numel() > 1
    assert result.confidence.dtype == result.boundary.dtype == torch.float32
    torch.testing.assert_close(result.confidence, scores.gather(0, result.ids[None])[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(result.confidence, scores.amax(0), atol=2e-6, rtol=0)
    torch.testing.assert_close(result.boundary, boundary, atol=2e-6, rtol=0)
    assert (result.boundary > 0.5).any()


@pytest.mark.parametrize("flip", [False, True])
def test_many_classes(flip):
    """Neighbouring classes are not mixed: the volume is read in the middle of a channel. 255 is a class like others."""
    many = UNEPT(300, backbone="resnet10t", d_model=32, num_heads=2, num_points=2, ffn_dim=32).eval()
    with torch.no_grad():
        many.classifier.weight.mul_(30)
        many.classifier.weight[255] = 0
        many.classifier.bias[255] = 45
    image = torch.randint(0, 256, (3, 64, 200), dtype=torch.uint8)
    result = Segmenter(many, flip=flip, refine=False)(image)
    assert 0.05 < (result.ids == 255).float().mean() < 0.95
    scores, _ = full_size(many, image, InferenceConfig(flip=flip, refine=False))
    torch.testing.assert_close(result.confidence, scores.amax(0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"flip": True}], ids=str)
def test_class_scores_are_never_held_at_full_size(options):
    """The largest tensor that any operation gives is far below (K, H, W)."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    class Flat(StandIn):
        """A network whose own maps are small beside (K, H, W)."""

        def forward(self, images):
            B, h, w = len(images), images.shape[2] // 8, images.shape[3] // 8
            return UNEPTOutput(torch.randn(B, 400, h, w), torch.randn(B, 1, h, w), torch.randn(B, 8, h, w))

    images = torch.zeros(1, 3, 256, 512, dtype=torch.uint8)
    with Largest() as largest:
        predict(Flat(400), images, InferenceConfig(**options))
    views = 2 if options else 1  # a view and its mirror image are seen at once
    assert 0 < largest.elements <= views * 8 * 256 * 512 < 400 * 256 * 512


def test_result(model, pixels):
    result = Segmenter(model)(pixels)
    assert result.classes == ("sky", "sea", "sand")
    expected = overlay(tensor_of(pixels), result.ids, PALETTE, 0.25).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(result.overlay(0.25)), expected)
    assert result.overlay().size == (47, 33)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.ids = None
    result.ids[0] = 1  # the tensors are the caller's: no inference tensors
    pixels[:] = 0
    assert result.image.any()
    image = torch.full((3, 8, 8), 9, dtype=torch.uint8)
    kept = Segmenter(model)(image).image
    image.zero_()
    assert kept.any()


def test_without_a_spatial_branch(pixels):
    plain = UNEPT(3, backbone="resnet10t", d_model=32, num_heads=2, ffn_dim=32, context_queries="learned").eval()
    for options in ({}, {"flip": True}):
        result = Segmenter(plain, **options)(pixels)
        assert result.boundary is None
        assert 1 / 3 < result.confidence.min() <= result.confidence.max() <= 1


def test_options_come_before_what_the_model_says(model, tmp_path, pixels):
    model.save_pretrained(tmp_path / "model")
    again = UNEPT.from_pretrained(tmp_path / "model")
    again.preprocessing.update(short_side=24, refine_scale=2)
    again.save_pretrained(tmp_path / "model")
    segmenter = Segmenter(tmp_path / "model", device="cpu", flip=True, refine_scale=3)
    assert segmenter.inference == InferenceConfig(short_side=24, flip=True, refine_scale=3)
    assert not segmenter.model.training
    assert torch.equal(segmenter(pixels).ids, predict_ids(model, tensor_of(pixels), segmenter.inference)[0])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((8, 8), np.uint8), ValueError, r"shape \(8, 8\); it must be \(H, W, 3\)"),
        (np.zeros((3, 8, 9), np.uint8), ValueError, r"shape \(3, 8, 9\).*put the channels last"),
        (torch.zeros(8, 9, 3, dtype=torch.uint8), ValueError, r"must be \(3, H, W\).*put the channels first"),
        (torch.zeros(3, 0, 9, dtype=torch.uint8), ValueError, r"shape \(3, 0, 9\)"),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), ValueError, "must be"),
        (np.zeros((2, 8, 8, 4), np.uint8), ValueError, r"shape \(8, 8, 4\)"),
        (np.zeros((8, 8, 3)), TypeError, r"dtype float64; give uint8"),
        (torch.zeros(3, 8, 8), TypeError, r"dtype torch\.float32; give uint8"),
        (3, TypeError, "of type int"),
        ([[None]], TypeError, "of type list"),
        ("missing.png", DatasetError, r"missing\.png can't be read"),
        (Image.new("F", (8, 8)), DatasetError, "floating-point"),
    ],
)
def test_bad_images(model, image, error, message):
    with pytest.raises(error, match=message):
        Segmenter(model)(image)


def test_bad_options(model):
    with pytest.raises(TypeError, match="flipp"):
        Segmenter(model, flipp=True)
    with pytest.raises(ValueError, match="window is 30"):
        Segmenter(model, window=30)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Segmenter("nowhere")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(model, pixels):
    result = Segmenter(model, amp="off")(pixels)
    with kernels.use_backend("triton"):
        found = Segmenter(model, device="cuda", amp="off")(pixels)
    model.cpu()
    assert found.ids.device.type == "cpu"
    assert (found.ids == result.ids).float().mean() > 0.99
    torch.testing.assert_close(found.confidence, result.confidence, atol=1e-2, rtol=0)


def test_damaged_pil_image_and_model_of_other_channels(tmp_path):
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(DatasetError, match=r"the image can.t be read .* the file is damaged"):
        Segmenter(small_model(), device="cpu")(Image.open(tmp_path / "cut.png"))
    gray = Segmenter(small_model(in_chans=1, mean=(0.5,), std=(0.5,)), device="cpu")
    with pytest.raises(ValueError, match="files and PIL images are RGB, and the model takes 1 channels"):
        gray(tmp_path / "whole.png")
    assert gray(noise[..., :1]).ids.shape == (64, 64)
