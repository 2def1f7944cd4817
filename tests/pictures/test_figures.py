"""The paper's figures: the window that is enlarged, and what refinement changes."""

import numpy as np
import pytest
import torch

from tests.helpers.figures import on_save
from tests.helpers.runs import CLASSES, PALETTE, small_model
from unept.inference import InferenceConfig
from unept.model.output import UNEPTOutput
from unept.pictures import drawing, figures


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def test_the_window_of_most_change():
    first = torch.zeros(40, 80, dtype=torch.int64)
    second = first.clone()
    second[5, 7] = 1
    second[30:34, 60:65] = 2
    top, left, height, width = figures.most_different(first, second)
    assert (height, width) == (10, 20)
    assert top <= 30
    assert top + height >= 34
    assert left <= 60
    assert left + width >= 65


@pytest.mark.parametrize(("size", "window"), [((40, 80), (15, 30, 10, 20)), ((2, 3), (0, 1, 1, 1))])
def test_the_window_where_nothing_changes(size, window):
    ids = torch.zeros(size, dtype=torch.int64)
    assert figures.most_different(ids, ids) == window


def edge_at_20() -> UNEPTOutput:
    """Classes change at x = 20 of 16x32 pixels; all is boundary, refined 1 pixel from the left for each `scale`."""
    logits = torch.zeros(1, 3, 2, 4)
    logits[:, 0] = torch.tensor([1.0, 1.0, 0.0, -1.0])
    logits[:, 1] = -logits[:, 0]
    logits[:, 2] = -9
    direction = torch.zeros(1, 8, 2, 4)
    direction[:, 0] = 1
    return UNEPTOutput(logits, torch.full((1, 1, 2, 4), 5.0), direction)


@pytest.mark.parametrize("scale", [1, 3])
def test_refinement_picture(tmp_path, monkeypatch, scale):
    drawn = []
    panel = drawing.refinement_panel
    monkeypatch.setattr(drawing, "refinement_panel", lambda *args: (drawn.extend(args[:2]), panel(*args)))
    image = noise(16, 32)
    share = figures.draw_refinement(
        small_model(), image, edge_at_20(), InferenceConfig(refine_scale=scale), "a", tmp_path / "a.png"
    )
    assert share == pytest.approx(scale / 32)
    sample, (_, left, _, width) = drawn
    changed = (sample.prediction != sample.refined).any(dim=0).nonzero().flatten()
    assert changed.tolist() == [20 + i for i in range(scale)]
    assert left <= 20
    assert 20 + scale <= left + width
    torch.testing.assert_close(sample.boundary, torch.full((16, 32), 5.0).sigmoid())
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_window_is_framed_and_enlarged(tmp_path, monkeypatch):
    rows = []

    def look(figure):
        for axis in figure.axes:
            frames = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axis.patches]
            rows.append((axis.images[0].get_array(), frames))

    on_save(monkeypatch, look)
    ids = torch.randint(0, 3, (20, 30))
    sample = drawing.Sample("a", noise(20, 30), None, ids, ids, torch.rand(20, 30))
    drawing.refinement_panel(sample, (3, 12, 5, 7), CLASSES, PALETTE, tmp_path / "a.png")
    for (whole, frames), (window, none) in zip(rows[:4], rows[4:], strict=True):
        assert set(frames) == {(11.5, 2.5, 7, 5)}
        assert none == []
        assert np.array_equal(window, whole[3:8, 12:19])
