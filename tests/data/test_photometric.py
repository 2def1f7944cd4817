"""Colours distorted as a batch are those that torchvision gives each image, and padding keeps its colour."""

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from unept.data import train_transform
from unept.data.photometric import NUM_PARAMS, distort

HEIGHT, WIDTH = 24, 36
IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0)


def by_torchvision(image: Tensor, params: Tensor) -> Tensor:
    """One image (3, H, W), by the functions that RandomPhotometricDistort calls, in its order."""
    brightness, contrast, saturation, hue, last, height, width = params.tolist()
    inside = image[:, : int(height), : int(width)]
    if brightness != 1:
        inside = F.adjust_brightness(inside, brightness)
    if contrast != 1 and not last:
        inside = F.adjust_contrast(inside, contrast)
    if saturation != 1:
        inside = F.adjust_saturation(inside, saturation)
    if hue != 0:
        inside = F.adjust_hue(inside, hue)
    if contrast != 1 and last:
        inside = F.adjust_contrast(inside, contrast)
    expected = image.clone()
    expected[:, : int(height), : int(width)] = inside
    return expected


def pictures(kind: str, count: int) -> Tensor:
    noise = torch.randint(0, 256, (count, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    colour = torch.randint(0, 256, (count, 3, 1, 1), dtype=torch.uint8).expand_as(noise).contiguous()
    return {
        "noise": noise,
        "grey": noise[:, :1].expand(-1, 3, -1, -1).contiguous(),
        "nearly grey": (noise[:, :1] // 2 + noise % 3),
        "black": torch.zeros_like(noise),
        "white": torch.full_like(noise, 255),
        "saturated": (noise > 127).to(torch.uint8) * 255,
        "one colour": colour,
    }[kind]


def random_params(count: int) -> Tensor:
    """Each is drawn with probability 0.6, from the ranges of SSD."""
    low = torch.tensor([0.875, 0.5, 0.5, -0.05])
    high = torch.tensor([1.125, 1.5, 1.5, 0.05])
    drawn = low + (high - low) * torch.rand(count, 4)
    factors = torch.where(torch.rand(count, 4) < 0.6, drawn, torch.tensor(IDENTITY[:4]))
    sizes = [torch.randint(1, size + 1, (count, 1)) for size in (HEIGHT, WIDTH)]
    return torch.cat([factors, torch.randint(0, 2, (count, 1)), *sizes], dim=1).float()


@pytest.mark.parametrize("kind", ["noise", "grey", "nearly grey", "black", "white", "saturated", "one colour"])
def test_a_batch_is_distorted_as_torchvision_would(kind):
    images, params = pictures(kind, 40), random_params(40)
    kept = images.clone()
    distorted = distort(images, params)
    assert distorted.dtype == torch.uint8
    assert torch.equal(images, kept)
    expected = torch.stack([by_torchvision(*sample) for sample in zip(images, params, strict=True)])
    error = (distorted.int() - expected.int()).abs()
    # A product that falls on a whole number may round to either side of it, and later steps enlarge that.
    assert error.max() <= 2
    assert (error > 0).float().mean() < 0.01
    assert kind == "black" or not torch.equal(distorted, images)


@pytest.mark.parametrize("step", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("last", [0.0, 1.0])
def test_each_step_alone_is_torchvisions(step, last):
    images = torch.cat([pictures("noise", 4), pictures("saturated", 4)])
    for low, high in ((0.5, 1.5), (0.1, 3.0)) if step < 3 else ((-0.05, 0.05), (-0.5, 0.5)):
        params = torch.tensor([*IDENTITY[:4], last, HEIGHT, WIDTH]).repeat(8, 1)
        params[:, step] = low + (high - low) * torch.rand(8)
        expected = torch.stack([by_torchvision(*sample) for sample in zip(images, params, strict=True)])
        error = (distort(images, params).int() - expected.int()).abs()
        assert error.max() <= 1
        assert (error > 0).float().mean() < 0.002


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_nothing_drawn_changes_nothing(last):
    for kind in ("noise", "nearly grey", "black", "white"):
        images = pictures(kind, 3)
        params = torch.tensor([*IDENTITY[:4], last, HEIGHT, WIDTH]).repeat(3, 1)
        assert torch.equal(distort(images, params), images)


def test_contrast_does_not_look_at_the_padding():
    params = torch.tensor([[1.0, 0.5, 1.0, 0.0, 0.0, 10, 20]])
    dark, bright = pictures("noise", 2)[:1], pictures("noise", 1)
    bright[..., :10, :20] = dark[..., :10, :20]
    bright[..., 10:, :] = 255
    bright[..., 20:] = 255
    first, second = distort(dark, params), distort(bright, params)
    assert torch.equal(first[..., :10, :20], second[..., :10, :20])
    assert (second[..., 10:, :] == 255).all()


def test_samples_do_not_touch_each_other():
    images, params = pictures("noise", 6), random_params(6)
    alone = torch.cat([distort(images[i : i + 1], params[i : i + 1]) for i in range(6)])
    assert torch.equal(distort(images, params), alone)


def test_no_break_in_the_compiled_graph():
    images, params = pictures("noise", 2), random_params(2)
    compiled = torch.compile(distort, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(images, params), distort(images, params))


def test_nothing_comes_to_the_host():
    # Tensors without values: any .item() or a size that depends on values would raise.
    images, params = (t.to("meta") for t in (pictures("noise", 2), random_params(2)))
    assert distort(images, params).shape == images.shape


def test_params_travel_with_the_sample_and_keep_the_fill():
    fill = (9, 8, 7)
    transform = train_transform((40, 50), scale=(1.0, 1.0), cat_max_ratio=1.0, flip=False, fill=fill)
    source = tv_tensors.Image(pictures("noise", 1)[0]), tv_tensors.Mask(torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8))
    drawn = torch.stack([transform(*source)[2] for _ in range(300)])
    assert drawn.dtype == torch.float32
    assert drawn.shape == (300, NUM_PARAMS)
    assert (drawn[:, 5:] == torch.tensor([HEIGHT, WIDTH])).all()
    for column, (low, high, identity) in enumerate(
        [(0.875, 1.125, 1), (0.5, 1.5, 1), (0.5, 1.5, 1), (-0.05, 0.05, 0), (0, 1, 0)]
    ):
        values = drawn[:, column]
        assert low <= values.min() < values.max() <= high
        assert 0.35 < (values == identity).float().mean() < 0.65
    image, mask, params = transform(*source)
    assert image.shape == (3, 40, 50)
    distorted = distort(image[None].as_subclass(Tensor), params[None])[0]
    assert (distorted[:, mask == 255] == torch.tensor(fill, dtype=torch.uint8)[:, None]).all()
    assert torch.equal(image[:, :HEIGHT, :WIDTH], source[0])


def test_without_photometric_there_are_no_params():
    mask = tv_tensors.Mask(torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8))
    image = tv_tensors.Image(pictures("noise", 1)[0])
    assert len(train_transform(16, photometric=False)(image, mask)) == 2


def test_channels_are_not_permuted():
    # The distorted blue of a blue picture stays the largest channel.
    blue = torch.tensor([30, 60, 200], dtype=torch.uint8)[None, :, None, None].expand(50, 3, HEIGHT, WIDTH)
    assert (distort(blue, random_params(50)).argmax(1) == 2).all()


def test_a_batch_that_does_not_fit_is_refused():
    images, params = pictures("noise", 2), random_params(2)
    with pytest.raises(TypeError, match=r"dtype torch\.float32"):
        distort(images.float(), params)
    with pytest.raises(ValueError, match=r"\(2, 3, 24, 36\) and params \(1, 7\)"):
        distort(images, params[:1])
    with pytest.raises(ValueError, match=r"images have shape \(3, 24, 36\)"):
        distort(images[0], params)
