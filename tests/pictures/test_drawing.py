"""Pictures are read back from disk: their pixels say what was drawn."""

import numpy as np
import torch
from PIL import Image

from tests.helpers.figures import on_save
from unept.pictures import drawing
from unept.pictures.charts import confusion_matrix
from unept.pictures.recording import SampledPoints

PALETTE = [[200, 0, 0], [0, 150, 0], [10, 20, 250]]
CLASSES = ["roof", "lawn", "pool"]


def has_color(path, color) -> bool:
    """Whether a picture has more than 20 pixels of about this color."""
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


def test_names_are_no_formulas(tmp_path, monkeypatch):
    """A $ in the name of a file or of a class is drawn as it is."""
    classes, drawn = ["price $5", "a$^$b", "$x$"], []
    monkeypatch.setattr("matplotlib.mathtext.MathTextParser.parse", lambda *args, **_: drawn.append(args))
    named = sample(refined=torch.full((6, 8), 2))._replace(name="a$^$b.png $x$")
    drawing.sample_panel([named], classes, PALETTE, tmp_path / "panel.png")
    drawing.class_bars({"iou": [0.5, 0.25, 1.0], "mIoU": 0.5}, classes, tmp_path / "bars.png")
    drawing.class_comparison([(n, (0.5, 0.25)) for n in classes], ["a$^$b", "$x$"], (0.5, 0.5), tmp_path / "both.png")
    confusion_matrix(torch.eye(3), classes, tmp_path / "confusion.png")
    assert not drawn


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


def test_a_tall_image_is_drawn_in_a_picture_of_bounded_height(tmp_path, monkeypatch):
    """A figure that is as tall as the image would take gigabytes."""
    heights: list[float] = []
    on_save(monkeypatch, lambda figure: heights.append(figure.get_figheight()))
    image, ids = torch.zeros(3, 900, 1, dtype=torch.uint8), torch.zeros(900, 1, dtype=torch.int64)
    tall = drawing.Sample("a", image, ids, ids, ids, torch.zeros(900, 1))
    path, window = tmp_path / "tall.png", (0, 0, 225, 1)
    drawing.refinement_panel(tall, window, CLASSES, PALETTE, path)
    drawing.prediction_panel("a", image, ids, {"run": ids}, window, CLASSES, PALETTE, path)
    drawing.picture_row({"image": image}, path)
    weights, xy = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 2)
    points = SampledPoints((0.0, 0.0), xy, weights, weights > 0, [(113, 1)], covered=(904.0, 8.0))
    drawing.sampled_points(points, image, "a", path)
    assert len(heights) == 4
    assert max(heights) < 70


def test_legend_names_a_class_that_only_the_refinement_gives(tmp_path, monkeypatch):
    named: list[str] = []
    on_save(monkeypatch, lambda figure: named.extend(text.get_text() for text in figure.legends[0].get_texts()))
    drawing.sample_panel([sample(refined=torch.full((6, 8), 2))], CLASSES, PALETTE, tmp_path / "panel.png")
    assert named == CLASSES


def drawn_lines(monkeypatch) -> dict[str, list[tuple[float, float]]]:
    """Label and points of every line that is drawn from now on."""
    drawn: dict[str, list[tuple[float, float]]] = {}

    def look(figure):
        for axis in figure.axes:
            drawn.update({line.get_label(): line.get_xydata().tolist() for line in axis.lines})

    on_save(monkeypatch, look)
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

    def look(figure):
        (axis,) = figure.axes
        names = [label.get_text() for label in axis.get_yticklabels()]
        bars.update(zip(names, [bar.get_width() for bar in axis.patches], strict=True))

    on_save(monkeypatch, look)
    scores = {"iou": [0.5, float("nan"), 0.25, 0.75], "mIoU": 0.5}
    drawing.class_bars(scores, ["a", "b", "c", "d"], tmp_path / "bars.png")
    assert list(bars.items()) == [("c", 0.25), ("a", 0.5), ("d", 0.75)]  # from below


def test_errors_of_predictions(tmp_path):
    truth = torch.tensor([[0, 0, 1, 255], [1, 1, 2, 255]]).repeat_interleave(20, 0).repeat_interleave(20, 1)
    wrong = truth.clone()
    wrong[:20, 20:40] = 2
    errors = drawing.error_map(wrong, truth)
    assert [tuple(errors[:, y, x].tolist()) for y, x in ((0, 0), (0, 30), (0, 70))] == [
        (235, 235, 235),
        (214, 39, 40),
        (90, 90, 90),
    ]
    image, window = torch.full((3, 40, 80), 77, dtype=torch.uint8), (0, 20, 10, 20)
    for name, prediction in (("right", truth.clamp(max=2)), ("wrong", wrong.clamp(max=2))):
        arguments = ("a", image, truth, {name: prediction}, window, CLASSES, PALETTE, tmp_path / f"{name}.png")
        drawing.prediction_panel(*arguments)
        assert has_color(tmp_path / f"{name}.png", [214, 39, 40]) == (name == "wrong")
