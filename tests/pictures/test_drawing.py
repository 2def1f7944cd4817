"""Pictures are read back from disk: their pixels say what was drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from unept.pictures import drawing

PALETTE = [[200, 0, 0], [0, 150, 0], [10, 20, 250]]
CLASSES = ["roof", "lawn", "pool"]


def labels() -> torch.Tensor:
    """(6, 8): the three classes in stripes, and two ignored pixels."""
    ids = torch.arange(3).repeat_interleave(2)[:, None].repeat(1, 8)
    ids[0, 0], ids[5, 7] = 255, -1
    return ids


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_colorize(dtype):
    colors = drawing.colorize(labels().to(dtype), PALETTE)
    assert colors.dtype == torch.uint8
    for y in range(6):
        for x in range(8):
            expected = [0, 0, 0] if (y, x) in ((0, 0), (5, 7)) else PALETTE[y // 2]
            assert colors[:, y, x].tolist() == expected


def test_colorize_of_masks_as_datasets_give_them():
    ids = labels().to(torch.uint8)  # -1 becomes 255
    assert torch.equal(drawing.colorize(ids, PALETTE), drawing.colorize(labels(), PALETTE))


def test_overlay():
    image = torch.full((3, 6, 8), 100, dtype=torch.uint8)
    mixed = drawing.overlay(image, labels(), PALETTE, alpha=0.25)
    assert mixed[:, 0, 1].tolist() == [125, 75, 75]
    assert mixed[:, 0, 0].tolist() == [100, 100, 100]
    assert torch.equal(drawing.overlay(image, labels(), PALETTE, alpha=0.0), image)


def test_palette_png_holds_the_ids_and_shows_the_colors(tmp_path):
    ids = labels().clamp_min(0)
    drawing.save_palette_png(ids, PALETTE, tmp_path / "ids.png")
    with Image.open(tmp_path / "ids.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), ids.numpy())
        shown = np.asarray(picture.convert("RGB"))
    assert np.array_equal(shown, drawing.colorize(ids, PALETTE).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("wrong", [-1, 256])
def test_palette_png_refuses_what_8_bits_do_not_hold(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{wrong}"):
        drawing.save_palette_png(torch.tensor([[1, wrong]]), PALETTE, tmp_path / "ids.png")
    assert not list(tmp_path.iterdir())


def has_color(path, color) -> bool:
    """Whether a picture has more than 20 pixels of about this colour."""
    with Image.open(path) as picture:
        difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - color).max(axis=2)
    return int((difference < 4).sum()) > 20


def sample(**maps) -> drawing.Sample:
    image = torch.full((3, 6, 8), 77, dtype=torch.uint8)
    truth = torch.zeros(6, 8, dtype=torch.uint8)
    prediction = torch.ones(6, 8, dtype=torch.int64)
    return drawing.Sample("a", image, truth, prediction, maps.get("refined"), maps.get("boundary"))


def test_panel_shows_every_column(tmp_path):
    full = sample(refined=torch.full((6, 8), 2), boundary=torch.full((6, 8), 0.2))
    drawing.sample_panel([full, full], CLASSES, PALETTE, tmp_path / "panel.png")
    for color in (*PALETTE, [77, 77, 77], [51, 51, 51]):  # image and boundary
        assert has_color(tmp_path / "panel.png", color), color


def test_panel_of_a_model_without_boundaries_is_narrower(tmp_path):
    full = sample(refined=torch.full((6, 8), 2), boundary=torch.full((6, 8), 0.2))
    drawing.sample_panel([full], CLASSES, PALETTE, tmp_path / "full.png")
    drawing.sample_panel([sample()], CLASSES, PALETTE, tmp_path / "short.png")
    widths = []
    for name in ("full", "short"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            widths.append(picture.width)
    assert widths[1] < 0.7 * widths[0]
    assert not has_color(tmp_path / "short.png", PALETTE[2])


def drawn_lines(monkeypatch) -> dict[str, list[tuple[float, float]]]:
    """Label and points of every line that is drawn from now on."""
    drawn: dict[str, list[tuple[float, float]]] = {}

    class Recorder(drawing.Figure):
        def savefig(self, path):
            for axis in self.axes:
                drawn.update({line.get_label(): line.get_xydata().tolist() for line in axis.lines})
            super().savefig(path)

    monkeypatch.setattr(drawing, "Figure", Recorder)
    return drawn


def test_curves(tmp_path, monkeypatch):
    drawn = drawn_lines(monkeypatch)
    lines = [
        {"step": 20, "loss": 6.0, "segmentation": 2.0, "lr": 1e-4, "images_per_s": 9.0},
        {"step": 40, "loss": 5.0, "segmentation": 1.5, "lr": 1e-4, "images_per_s": 9.0},
        {"step": 40, "mIoU": 0.3, "pixAcc": 0.6, "boundary_f": 0.25, "boundary_f_unrefined": 0.2},
    ]
    drawing.curves(lines, tmp_path / "curves.png")
    assert drawn == {
        "loss": [[20, 6.0], [40, 5.0]],
        "segmentation": [[20, 2.0], [40, 1.5]],
        "mIoU": [[40, 0.3]],
        "pixAcc": [[40, 0.6]],
        "boundary F": [[40, 0.25]],
        "boundary F unrefined": [[40, 0.2]],
        "lr": [[20, 1e-4], [40, 1e-4]],
    }
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000


def test_curves_before_anything_is_known(tmp_path):
    drawing.curves([], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_bars_are_ranked_and_leave_absent_classes_out(tmp_path, monkeypatch):
    bars = {}

    class Recorder(drawing.Figure):
        def savefig(self, path):
            (axis,) = self.axes
            names = [label.get_text() for label in axis.get_yticklabels()]
            bars.update(zip(names, [bar.get_width() for bar in axis.patches], strict=True))
            super().savefig(path)

    monkeypatch.setattr(drawing, "Figure", Recorder)
    scores = {"iou": [0.5, float("nan"), 0.25, 0.75], "mIoU": 0.5}
    drawing.class_bars(scores, ["a", "b", "c", "d"], tmp_path / "bars.png")
    assert list(bars.items()) == [("c", 0.25), ("a", 0.5), ("d", 0.75)]  # from below
