"""Transforms keep image and mask together; loaders repeat a run to the bit from any step."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from unept.data import Shapes, TrainingSampler, TransformedDataset, eval_transform, evaluation_loader, train_transform
from unept.data import training_loader as make_training_loader
from unept.data.transforms import RandomScaledCrop, Span, scaled_crop, scaled_mask_crop


def pair(height: int, width: int, mask: torch.Tensor | None = None):
    """An image and a mask that show the same: in every pixel the image's first channel is the mask's id times 20."""
    if mask is None:
        coarse = torch.randint(0, 10, (height // 4 + 1, width // 4 + 1), dtype=torch.uint8)
        mask = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
    image = torch.stack([mask * 20, torch.full_like(mask, 50), 255 - mask])
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 33), (1, 50)])
@pytest.mark.parametrize("crop", [32, (24, 48)])
def test_training_samples_have_the_crop_size(size, crop):
    transform = train_transform(crop, short_side=36, photometric=False)
    expected = (crop, crop) if isinstance(crop, int) else crop
    for _ in range(10):
        image, mask = transform(*pair(*size))
        assert image.shape == (3, *expected)
        assert mask.shape == expected
        assert image.dtype == mask.dtype == torch.uint8
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)


def test_image_and_mask_stay_together():
    # Without scaling every counted pixel still shows its id; the rest is padding, in both at the same places.
    transform = train_transform((40, 32), scale=(1.0, 1.0), photometric=False, fill=(1, 2, 3))
    flips = set()
    for _ in range(20):
        source = pair(30, 50)
        image, mask = transform(*source)
        padding = mask == 255
        assert torch.equal(image[0][~padding], mask[~padding] * 20)
        assert torch.equal(padding, torch.arange(40)[:, None].expand(40, 32) >= 30)
        assert (image[:, padding] == torch.tensor([[1], [2], [3]])).all()
        windows = source[1].unfold(1, 32, 1).unbind(1)
        upright = any(torch.equal(mask[:30], window) for window in windows)
        mirrored = any(torch.equal(mask[:30].flip(1), window) for window in windows)
        assert upright != mirrored
        flips.add(mirrored)
    assert flips == {True, False}


@pytest.mark.parametrize(("factor", "edge"), [(0.5, 36), (0.6, 37), (0.77, 43), (1.3, 41), (2.0, 37)])
def test_scaling_does_not_shift_the_mask_against_the_image(factor, edge):
    # The pixels that are more than half bright in the resampled image are those that the mask calls bright.
    mask = torch.zeros(64, 100, dtype=torch.uint8)
    mask[:, edge:] = 10
    image, scaled = RandomScaledCrop((200, 200), None, (factor, factor))(*pair(64, 100, mask))
    assert scaled.shape == image.shape[1:] == (round(64 * factor), round(100 * factor))
    assert set(scaled.unique().tolist()) == {0, 10}
    assert torch.equal(image[0] > 100, scaled == 10)


def test_an_image_may_become_a_single_pixel():
    image = torch.tensor([[0, 40], [80, 120]], dtype=torch.uint8).expand(3, 2, 2).contiguous()
    assert scaled_crop(image, Span(0, 2.0, 1), Span(0, 2.0, 1)).tolist() == [[[60]]] * 3


def test_scaling_down_averages_the_image():
    # Every fourth column is bright: bilinear sampling without antialiasing would miss them all.
    mask = torch.zeros(32, 64, dtype=torch.uint8)
    mask[:, ::4] = 10
    image, _ = RandomScaledCrop((64, 64), None, (0.25, 0.25))(*pair(32, 64, mask))
    assert image[0, :, 1:-1].float().mean() == pytest.approx(50, abs=5)


def test_scales_are_spread_between_the_bounds_and_relative_to_the_short_side():
    transform = RandomScaledCrop((300, 300), 100, (0.5, 2.0))
    sides = torch.tensor([min(transform(*pair(20, 30))[1].shape) for _ in range(200)])
    assert 50 <= sides.min() < 70
    assert 180 < sides.max() <= 200
    assert abs(sides.float().mean() - 125) < 10
    mask = RandomScaledCrop((300, 300), None, (2.0, 2.0))(*pair(20, 30))[1]
    assert mask.shape == (40, 60)
    assert RandomScaledCrop((300, 300), scale=(1.0, 1.0), long_side=90)(*pair(20, 30))[1].shape == (60, 90)


def smooth(height: int, width: int, channels_innermost: bool) -> torch.Tensor:
    """An image of soft noise: a shift by half a pixel changes it by several grey levels."""
    coarse = torch.randint(0, 256, (3, height // 6 + 2, width // 6 + 2), dtype=torch.uint8)
    image = F.resize(coarse, [height, width], antialias=True)
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if channels_innermost else image


@pytest.mark.parametrize("channels_innermost", [False, True])
@pytest.mark.parametrize("step", [0.5, 0.75, 1.0, 1.5, 2.0])
def test_a_scaled_crop_is_a_crop_of_the_scaled_image(step, channels_innermost):
    # At these scales the crop's corner, on a corner of the image's pixels, is one of the scaled image's pixels too.
    height, width = 120, 180
    image, mask = smooth(height, width, channels_innermost), torch.randint(0, 9, (height, width), dtype=torch.uint8)
    scaled = F.resize(image, [round(height / step), round(width / step)], antialias=True)
    for top, left in ((0, 0), (24, 60), (48, 120)):
        rows, columns = Span(top, step, round(72 / step)), Span(left, step, round(60 / step))
        here = slice(round(top / step), round((top + 72) / step)), slice(round(left / step), round((left + 60) / step))
        cropped = scaled_crop(image, rows, columns)
        error = (cropped.int() - scaled[:, here[0], here[1]].int()).abs()
        assert error[:, 1:, 1:].max() <= 1
        assert error.float().mean() < 0.2
        nearest = torch.nn.functional.interpolate(mask[None, None], scaled.shape[1:], mode="nearest-exact")[0, 0]
        assert torch.equal(scaled_mask_crop(mask, rows, columns), nearest[here])


def test_a_scaled_crop_is_what_pil_makes_of_the_same_box():
    # At any scale; near 1 torch could leave an axis as it is, which would shift its far end.
    generator = np.random.default_rng(0)
    for trial in range(60):
        height, width = (int(n) for n in generator.integers(60, 300, 2))
        image = smooth(height, width, channels_innermost=bool(trial % 2))
        factor = generator.uniform(0.4, 2.2) if trial % 3 else generator.uniform(0.99, 1.01)
        transform = RandomScaledCrop((100, 140), None, (factor, factor), cat_max_ratio=1.0)
        mask = tv_tensors.Mask(torch.zeros(height, width, dtype=torch.uint8))
        params = transform.make_params([tv_tensors.Image(image), mask])
        rows, columns = params["rows"], params["columns"]
        cropped = scaled_crop(image, rows, columns)
        assert cropped.shape == (3, *params["mask"].shape)
        assert cropped.shape == (3, min(100, round(height * factor)), min(140, round(width * factor)))
        box = (
            columns.start,
            rows.start,
            columns.start + columns.size * columns.step,
            rows.start + rows.size * rows.step,
        )
        assert box[2] <= width + 1e-9
        assert box[3] <= height + 1e-9
        box = (*box[:2], min(box[2], width), min(box[3], height))
        picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        expected = np.asarray(picture.resize((columns.size, rows.size), Image.Resampling.BILINEAR, box=box))
        error = np.abs(cropped.permute(1, 2, 0).numpy().astype(int) - expected)
        assert error[1:, 1:].max() <= 2
        assert error.mean() < 0.3


@pytest.mark.parametrize("factor", [0.5, 0.98, 0.999, 1.0005, 1.01, 1.7])
def test_a_scaled_crop_is_not_shifted(factor):
    # Each pixel shows where it lies: the image is a ramp in x and in y, the mask another.
    y, x = torch.meshgrid(torch.arange(220), torch.arange(250), indexing="ij")
    image, mask = torch.stack([x, y, x]).to(torch.uint8), x.to(torch.uint8)
    transform = RandomScaledCrop((100, 110), None, (factor, factor), cat_max_ratio=1.0)
    params = transform.make_params([tv_tensors.Image(image), tv_tensors.Mask(mask)])
    rows, columns = params["rows"], params["columns"]
    cropped = scaled_crop(image, rows, columns)
    centres = [span.start + (torch.arange(span.size) + 0.5) * span.step - 0.5 for span in (rows, columns)]
    inner = slice(1, -1)
    assert (cropped[0] - centres[1])[inner, inner].abs().max() <= 0.6  # rounding alone is 0.5
    assert (cropped[1] - centres[0][:, None])[inner, inner].abs().max() <= 0.6
    assert (params["mask"] - centres[1]).abs().max() <= 0.5 + 1e-4


def test_crops_reach_all_of_the_image():
    mask = torch.arange(90)[:, None].expand(90, 120).to(torch.uint8)
    image = tv_tensors.Image(torch.zeros(3, 90, 120, dtype=torch.uint8))
    transform = RandomScaledCrop((64, 64), None, (2.0, 2.0), cat_max_ratio=1.0)
    seen = torch.cat([transform(image, tv_tensors.Mask(mask))[1].unique() for _ in range(300)])
    assert (seen.min(), seen.max()) == (0, 89)
    assert len(seen.unique()) == 90


def test_cat_max_ratio_avoids_crops_of_one_class():
    # One class nearly everywhere, two classes in the lower right corner.
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[40:, 40:] = 1
    share = {}
    for cap in (0.75, 1.0):
        transform = RandomScaledCrop((24, 24), scale=(1.0, 1.0), cat_max_ratio=cap)
        crops = [transform(*pair(64, 64, mask))[1] for _ in range(200)]
        varied = [torch.bincount(crop.flatten()).max() < 0.75 * crop.numel() for crop in crops]
        share[cap] = sum(map(int, varied)) / len(varied)
    assert share[1.0] < 0.25
    assert share[0.75] > 0.6  # 1 - (1 - p)^10 for the p of about 0.13 that one crop has


def test_cat_max_ratio_does_not_count_ignored_pixels():
    # Half of every crop is ignored, and all that counts is one class: it fills its crop though its share is half.
    mask = torch.full((32, 64), 255, dtype=torch.uint8)
    mask[:16] = 3
    crop = RandomScaledCrop((32, 32), cat_max_ratio=0.75)
    assert not crop.is_varied(mask)
    mask[:16, 32:] = 4
    assert crop.is_varied(mask)
    assert not crop.is_varied(torch.full_like(mask, 255))


def test_evaluation_keeps_the_labels_size():
    image, mask = pair(20, 30)
    same = eval_transform()(image, mask)
    assert torch.equal(same[0], image)
    assert torch.equal(same[1], mask)
    resized, labels = eval_transform(40)(image, mask)
    assert resized.shape == (3, 40, 60)
    assert torch.equal(labels, mask)


def test_bad_transform_options():
    with pytest.raises(ValueError, match="crop_size is 0"):
        train_transform((32, 0))
    with pytest.raises(ValueError, match="short_side is -1"):
        train_transform(32, short_side=-1)
    with pytest.raises(ValueError, match=r"scale is \(2\.0, 0\.5\)"):
        train_transform(32, scale=(2.0, 0.5))
    with pytest.raises(ValueError, match="long_side is 0"):
        train_transform(32, long_side=0)
    with pytest.raises(ValueError, match="short_side is 4 and long_side 5; give one of them"):
        train_transform(32, short_side=4, long_side=5)
    with pytest.raises(ValueError, match="short_side is 0"):
        eval_transform(0)


def take(sampler, count: int) -> list[tuple[int, int]]:
    return list(itertools.islice(iter(sampler), count))


def test_every_epoch_is_a_fresh_permutation():
    keys = take(TrainingSampler(7, seed=3), 21)
    epochs = [[index for index, _ in keys[i : i + 7]] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({seed for _, seed in keys}) == 21
    assert keys == take(TrainingSampler(7, seed=3), 21)
    assert keys != take(TrainingSampler(7, seed=4), 21)


@pytest.mark.parametrize("start", [1, 6, 7, 20])
def test_sampler_resumes_anywhere(start):
    assert take(TrainingSampler(7, 0, start), 20) == take(TrainingSampler(7, 0), start + 20)[start:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_samples(world_size):
    whole = take(TrainingSampler(7, 0, 4), 30)
    for rank in range(world_size):
        assert take(TrainingSampler(7, 0, 4, rank, world_size), 10) == whole[rank::world_size][:10]


def batches(count: int, **options):
    transform = train_transform(24, scale=(0.8, 1.2))
    loader = make_training_loader(Shapes(size=32, length=10), transform, batch_size=3, seed=1, **options)
    return [batch[:3] for batch in itertools.islice(loader, count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_batches_do_not_depend_on_workers_or_resume():
    whole = batches(6)
    images, labels, params = whole[0]
    assert type(images) is torch.Tensor
    assert images.is_contiguous()
    assert (images.shape, images.dtype) == ((3, 3, 24, 24), torch.uint8)
    assert (labels.shape, labels.dtype) == ((3, 24, 24), torch.uint8)
    assert (params.shape, params.dtype) == ((3, 7), torch.float32)
    assert not torch.equal(whole[0][0], whole[1][0])
    assert not torch.equal(whole[0][2], whole[1][2])
    torch.manual_seed(99)
    assert_same(batches(6, workers=2), whole)
    assert_same(batches(4, start_step=2), whole[2:])
    assert_same(batches(3, start_step=3, workers=1), whole[3:])


def test_ranks_draw_what_one_process_would():
    whole = torch.cat([images for images, *_ in batches(4)])
    for rank in range(2):
        share = torch.cat([images for images, *_ in batches(1, start_step=1, rank=rank, world_size=2)])
        assert torch.equal(share, whole[6 + rank :: 2][:3])


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_leave_the_random_state_alone(workers):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    batches(2, workers=workers)
    next(iter(evaluation_loader(Shapes(size=32, length=2), workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_seed_decides_the_transform():
    dataset = TransformedDataset(Shapes(size=32), train_transform(24))
    first, again, other = (dataset[0, seed].tensors for seed in (5, 5, 6))
    assert_same([first], [again])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[2], other[2])
    assert len(dataset[0, 2**64 - 1].tensors) == 3


@pytest.mark.parametrize(("length", "world_size"), [(7, 1), (7, 2), (8, 3), (2, 3)])
def test_evaluation_sees_every_sample_once(length, world_size):
    dataset = Shapes(size=32, length=length)
    shares = [list(evaluation_loader(dataset, rank, world_size)) for rank in range(world_size)]
    seen = {}
    for rank, share in enumerate(shares):
        seen.update({rank + k * world_size: sample for k, sample in enumerate(share)})
    assert sum(map(len, shares)) == length
    assert sorted(seen) == list(range(length))
    for i, (image, labels) in seen.items():
        assert torch.equal(image, dataset[i][0][None])
        assert torch.equal(labels, dataset[i][1][None])


def test_evaluation_resizes_on_request():
    loader = evaluation_loader(Shapes(size=32, length=1), transform=eval_transform(48))
    image, labels = next(iter(loader))
    assert image.shape == (1, 3, 48, 48)
    assert labels.shape == (1, 32, 32)


def test_bad_loader_options():
    dataset = Shapes(size=32, length=2)
    with pytest.raises(ValueError, match="0 samples"):
        TrainingSampler(0, 0)
    with pytest.raises(ValueError, match="start_sample is -3"):
        make_training_loader(dataset, train_transform(16), 3, 0, start_step=-1)
    with pytest.raises(ValueError, match="rank is 2 and world_size 2"):
        make_training_loader(dataset, train_transform(16), 3, 0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="rank is -1 and world_size 1"):
        evaluation_loader(dataset, rank=-1)
