"""Transforms keep image and mask together; loaders repeat a run to the bit from any step."""

import itertools

import pytest
import torch
from torchvision import tv_tensors

from unept.data import Shapes, TrainingSampler, TransformedDataset, eval_transform, evaluation_loader, train_transform
from unept.data import training_loader as make_training_loader
from unept.data.transforms import CategoryCapCrop, PhotometricDistortion, RandomShortSide


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
    transform = train_transform(crop, short_side=36)
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
    image, scaled = RandomShortSide(None, (factor, factor))(*pair(64, 100, mask))
    assert scaled.shape == image.shape[1:] == (round(64 * factor), round(100 * factor))
    assert set(scaled.unique().tolist()) == {0, 10}
    assert torch.equal(image[0] > 100, scaled == 10)


def test_scaling_down_averages_the_image():
    # Every fourth column is bright: bilinear sampling without antialiasing would miss them all.
    mask = torch.zeros(32, 64, dtype=torch.uint8)
    mask[:, ::4] = 10
    image, _ = RandomShortSide(None, (0.25, 0.25))(*pair(32, 64, mask))
    assert image[0, :, 1:-1].float().mean() == pytest.approx(50, abs=5)


def test_scales_are_spread_between_the_bounds_and_relative_to_the_short_side():
    transform = RandomShortSide(100, (0.5, 2.0))
    sides = torch.tensor([min(transform(*pair(20, 30))[1].shape) for _ in range(200)])
    assert 50 <= sides.min() < 70
    assert 180 < sides.max() <= 200
    assert abs(sides.float().mean() - 125) < 10
    mask = RandomShortSide(None, (2.0, 2.0))(*pair(20, 30))[1]
    assert mask.shape == (40, 60)


def test_category_cap_avoids_crops_of_one_class():
    # One class nearly everywhere, two classes in the lower right corner.
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[40:, 40:] = 1
    share = {}
    for cap in (0.75, 1.0):
        crops = [CategoryCapCrop((24, 24), cap)(*pair(64, 64, mask))[1] for _ in range(200)]
        varied = [torch.bincount(crop.flatten()).max() < 0.75 * crop.numel() for crop in crops]
        share[cap] = sum(map(int, varied)) / len(varied)
    assert share[1.0] < 0.25
    assert share[0.75] > 0.6  # 1 - (1 - p)^10 for the p of about 0.13 that one crop has


def test_category_cap_does_not_count_ignored_pixels():
    # Half of every crop is ignored, and all that counts is one class: it fills its crop though its share is half.
    mask = torch.full((32, 64), 255, dtype=torch.uint8)
    mask[:16] = 3
    crop = CategoryCapCrop((32, 32), 0.75)
    assert not crop._is_varied(mask)
    mask[:16, 32:] = 4
    assert crop._is_varied(mask)
    assert not crop._is_varied(torch.full_like(mask, 255))


def test_photometric_distortion_changes_colours_only():
    image, mask = pair(20, 30)
    results = [PhotometricDistortion()(image, mask) for _ in range(30)]
    assert all(torch.equal(result[1], mask) for result in results)
    assert sum(not torch.equal(result[0], image) for result in results) > 20
    # Channels are not permuted: the distorted blue of a blue picture stays the largest channel.
    blue = tv_tensors.Image(torch.tensor([30, 60, 200], dtype=torch.uint8)[:, None, None].expand(3, 8, 8).clone())
    assert all(PhotometricDistortion()(blue, mask)[0].argmax(0).eq(2).all() for _ in range(30))


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
    return list(itertools.islice(loader, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_batches_do_not_depend_on_workers_or_resume():
    whole = batches(6)
    images, labels = whole[0]
    assert type(images) is torch.Tensor
    assert (images.shape, images.dtype) == ((3, 3, 24, 24), torch.uint8)
    assert (labels.shape, labels.dtype) == ((3, 24, 24), torch.uint8)
    assert not torch.equal(whole[0][0], whole[1][0])
    torch.manual_seed(99)
    assert_same(batches(6, workers=2), whole)
    assert_same(batches(4, start_step=2), whole[2:])
    assert_same(batches(3, start_step=3, workers=1), whole[3:])


def test_ranks_draw_what_one_process_would():
    whole = torch.cat([images for images, _ in batches(4)])
    for rank in range(2):
        share = torch.cat([images for images, _ in batches(1, start_step=1, rank=rank, world_size=2)])
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
    first, again, other = dataset[0, 5], dataset[0, 5], dataset[0, 6]
    assert_same([first], [again])
    assert not torch.equal(first[0], other[0])
    assert len(dataset[0, 2**64 - 1]) == 2


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
