"""The refinement on its own: any model's ids and logits, a UN-EPT's heads, training on labels, files."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import tv_tensors

from unept import UNEPT, Refiner
from unept.data.shapes import Shapes
from unept.evaluation.boundary_metrics import BoundaryFScore
from unept.model.boundary import Refinement
from unept.training.refiner import train_refiner


class Perfect(Refiner):
    """Knows that the image is bright on the right of a vertical edge, and how to walk away from it."""

    def forward(self, images):
        bright = images[:, :1].float() > 100
        edge = bright.float().diff(dim=3, prepend=bright[..., :1].float()).abs()
        near = nn.functional.max_pool2d(edge, (1, 9), 1, (0, 4)) > 0
        direction = torch.zeros(len(images), 8, *images.shape[2:])
        direction[:, 4:5][bright] = 1  # to the right where bright
        direction[:, 0:1][~bright] = 1
        return near.float() * 20 - 10, direction


def test_refines_ids_and_logits_of_any_model():
    images = torch.zeros(1, 3, 16, 32, dtype=torch.uint8)
    images[..., 16:] = 200
    wrong = (torch.arange(32) >= 14).long().expand(1, 16, 32)  # the edge two pixels too far left
    right = (torch.arange(32) >= 16).long().expand(1, 16, 32)
    refiner, two = Perfect(width=8), Refinement(scale=2)
    assert torch.equal(refiner.refine(wrong, images, two), right)
    assert refiner.refine(wrong.to(torch.uint8), images, two).dtype == torch.uint8
    logits = nn.functional.one_hot(wrong, 3).permute(0, 3, 1, 2).float()
    assert torch.equal(refiner.refine(logits, images, two), right)
    coarse = nn.functional.avg_pool2d(logits, 4)
    assert refiner.refine(coarse, images, two).shape == (1, 16, 32)
    for bad in (wrong[..., :8], wrong.float(), wrong.repeat(2, 1, 1)):
        with pytest.raises(
            ValueError, match=r"give integer ids \(1, 16, 32\), or floating-point logits \(1, K, h, w\)"
        ):
            refiner.refine(bad, images)


def test_what_cannot_be_refined():
    refiner, ids = Refiner(width=8), torch.zeros(1, 16, 32).long()
    with pytest.raises(ValueError, match=r"images have shape \(3, 16, 32\); they must be \(B, 3, H, W\)"):
        refiner.refine(ids[0], torch.zeros(3, 16, 32).byte())
    with pytest.raises(ValueError, match=r"images have shape \(1, 4, 16, 32\); they must have 3 channels"):
        refiner.refine(ids, torch.zeros(1, 4, 16, 32).byte())
    for options, message in (
        ({"width": 0}, "width is 0, hidden 128 and widths None; each must be at least 1"),
        ({"widths": (8, 0)}, r"widths \(8, 0\); each must be"),
        ({"num_directions": 7}, "num_directions is 7; it must be an even number"),
        ({"mean": [0.5] * 4}, "in_chans is 4, but std has 3 numbers"),
        ({"std": [0, 1, 1]}, "each number must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Refiner(**{"width": 8, **options})


def test_another_normalization_is_saved(tmp_path):
    refiner = Refiner(width=8, mean=np.array([0.1, 0.2, 0.3]), std=torch.tensor([1.0, 2, 3]))
    refiner.set_normalization([0.5, 0.25, 0.125], [0.5, 1, 2])
    refiner.save(tmp_path / "refiner.safetensors")
    loaded = Refiner.load(tmp_path / "refiner.safetensors")
    assert torch.equal(loaded.mean, refiner.mean)
    assert torch.equal(loaded.std, refiner.std)


def test_half_precision_normalises_in_float32():
    """Rounded to half precision, a mean of 123.675 would move all colours."""
    refiner = Refiner(width=8).bfloat16()
    assert refiner.mean.dtype == refiner.std.dtype == torch.float32
    assert torch.equal(refiner.mean, Refiner(width=8).mean)
    boundary, direction = refiner(torch.zeros(1, 3, 16, 32, dtype=torch.uint8))
    assert boundary.dtype == direction.dtype == torch.bfloat16


@pytest.mark.parametrize("upsampling", ["bilinear", "subpixel"])
def test_taken_from_a_model(upsampling):
    sizes = {"d_model": 16, "num_heads": 2, "num_points": 2, "ffn_dim": 16, "boundary_upsampling": upsampling}
    model = UNEPT(3, "resnet10t", **sizes).eval()
    for parameter in (*model.boundary_head.parameters(), *model.direction_head.parameters()):
        nn.init.normal_(parameter, std=0.5)
    images = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    refiner = Refiner.from_model(model)
    with torch.no_grad():
        output = model(images)
        boundary, direction = refiner(images)
    # At its border the network sees more of the padding.
    torch.testing.assert_close(boundary[..., :4, :4], output.boundary[..., :4, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(direction[..., :4, :4], output.direction[..., :4, :4], rtol=1e-4, atol=1e-5)
    seeing_more = UNEPT(3, "resnet10t", **sizes, boundary_features="spatial+decoder")
    with pytest.raises(ValueError, match="see the decoder's features: give a model"):
        Refiner.from_model(seeing_more)
    with pytest.raises(ValueError, match="do not exist: give a model"):
        Refiner.from_model(UNEPT(3, "resnet10t", **sizes, context_queries="learned"))


class Discs(Shapes):
    """A bright disc on a dark ground, which a few dozen steps are enough to learn."""

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        x, y, radius = (
            int(torch.randint(*bounds, (), generator=generator)) for bounds in ((16, 48), (16, 48), (8, 20))
        )
        column, row = torch.arange(64), torch.arange(64)[:, None]
        label = ((column - x) ** 2 + (row - y) ** 2 < radius**2).to(torch.uint8)
        noise = torch.randint(0, 20, (3, 64, 64), generator=generator)
        return tv_tensors.Image((50 + 140 * label + noise).to(torch.uint8)), tv_tensors.Mask(label)


def boundary_f(ids, labels) -> float:
    score = BoundaryFScore(2, tolerance=1)
    score.update(ids, labels)
    return score.scores().mean_f


def test_trained_on_labels_and_kept_in_a_file(tmp_path):
    """On images that it has not seen, it mends boundaries that are shifted, and those of a coarse prediction."""
    torch.manual_seed(0)
    refiner, discs = Refiner(width=16, hidden=32), Discs(split="train", size=64)
    losses = train_refiner(refiner, discs, iterations=60, batch_size=4, crop_size=64, lr=5e-3)
    assert len(losses) == 60
    assert not refiner.training
    images, labels = (torch.stack([*part]) for part in zip(*(discs[i] for i in range(900, 908)), strict=True))
    images, labels = images.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor).long()
    shifted = labels.roll((2, 1), (1, 2))
    coarse = nn.functional.max_pool2d(labels[:, None].float(), 8)[:, 0].long()
    coarse = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    for ids, refinement in ((shifted, Refinement(3, 1)), (coarse, Refinement(2, 3))):
        before, after = (boundary_f(x, labels) for x in (ids, refiner.refine(ids, images, refinement)))
        assert after > before + 0.2, f"boundary F {before:.2f}, refined {after:.2f}"
    refiner.save(tmp_path / "refiner.safetensors")
    again = Refiner.load(tmp_path / "refiner.safetensors")
    images = torch.randint(0, 256, (1, 3, 30, 44), dtype=torch.uint8)
    ids = torch.randint(0, 3, (1, 30, 44))
    assert torch.equal(again.refine(ids, images), refiner.refine(ids, images))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold a Refiner"):
        Refiner.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "refiner.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read .*: give a file that Refiner.save wrote"):
        Refiner.load(tmp_path / "cut.safetensors")
