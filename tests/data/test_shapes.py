"""The generated dataset: its samples repeat, its labels are exact, and its options are checked."""

import numpy as np
import pytest
import torch

from unept.data import Shapes, shapes
from unept.data.shapes import PATTERNS, draw_objects


def test_shapes_are_a_function_of_seed_split_and_index():
    dataset = Shapes(length=20)
    image, mask = dataset[7]
    dataset[3]
    torch.manual_seed(5)
    again, mask_again = Shapes(length=9)[7]
    assert torch.equal(image, again)
    assert torch.equal(mask, mask_again)
    others = [dataset[8], Shapes(split="val")[7], Shapes(seed=1)[7]]
    assert not any(torch.equal(image, other) for other, _ in others)


def test_shapes_cover_all_classes_at_any_size():
    for size in (16, 61, 128):
        dataset = Shapes(size=size, length=40)
        counts = torch.zeros(8)
        for i in range(len(dataset)):
            image, mask = dataset[i]
            assert image.shape == (3, size, size)
            assert image.dtype == mask.dtype == torch.uint8
            counts += torch.bincount(mask.flatten(), minlength=8)
        shares = counts / counts.sum()
        assert 0.4 < shares[0] < 0.8
        assert shares[1:].min() > 0.02
    assert len(dataset.classes) == len(set(dataset.palette)) == 8


def test_shapes_edges_are_where_the_labels_are(monkeypatch):
    # Without noise, light and texture, the image has one colour an object: its edges must be the labels'.
    monkeypatch.setattr(shapes, "NOISE", 0.0)
    monkeypatch.setattr(shapes, "COLOR_JITTER", 0.0)
    monkeypatch.setattr(shapes, "clouds", lambda rng, height, width, period: np.full((height, width), 0.5, np.float32))
    monkeypatch.setattr(shapes, "PATTERNS", dict.fromkeys(PATTERNS, lambda u, v: 0 * (u + v)))
    colours = {}
    for image, mask in (Shapes(length=10)[i] for i in range(10)):
        for k in mask.unique().tolist():
            colours.setdefault(k, set()).update(map(tuple, image[:, mask == k].T.tolist()))
    assert sorted(colours) == list(range(8))
    assert all(len(seen) == 1 for seen in colours.values())
    assert len({colour for seen in colours.values() for colour in seen}) == 8


def test_later_shapes_hide_earlier_ones(monkeypatch):
    square = 50.0 * np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]])  # larger than any image
    monkeypatch.setattr(shapes, "polygon", lambda rng: square)
    monkeypatch.setattr(shapes, "ellipse", lambda rng: square)
    for seed in range(5):
        objects, materials = draw_objects(np.random.default_rng(seed), 32)
        assert (objects == len(materials) - 1).all()


def test_shapes_too_bright_or_dark_are_clipped(monkeypatch):
    monkeypatch.setattr(shapes, "NOISE", 300.0)
    image, _ = Shapes(length=1)[0]
    assert (image == 0).float().mean() > 0.1
    assert (image == 255).float().mean() > 0.1


def test_shapes_end_and_refuse_bad_options():
    dataset = Shapes(length=2)
    assert [dataset.name(i) for i in range(2)] == ["shapes_train_00000", "shapes_train_00001"]
    assert len(list(dataset)) == 2
    dataset.check()
    with pytest.raises(IndexError, match="no sample 2: the dataset has 2"):
        dataset[2]
    with pytest.raises(ValueError, match="size is 8"):
        Shapes(size=8)
    with pytest.raises(ValueError, match="length is 0"):
        Shapes(length=0)
    with pytest.raises(ValueError, match="split is 'training'; it must be"):
        Shapes(split="training")
