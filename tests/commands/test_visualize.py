"""`python -m unept.visualize` draws the paper's pictures of small saved runs, and compares two evaluated ones."""

import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.figures import on_save
from tests.helpers.runs import save_evaluation, save_run, small_model
from unept import visualize


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders: a convolutional backbone, a ViT, and one without a spatial branch."""
    folder = tmp_path_factory.mktemp("runs")
    networks = {
        "conv": small_model(),
        "vit": small_model(backbone="vit_tiny_patch16_224"),
        "learned": small_model(context_queries="learned"),
        "full": small_model(attention="full"),
    }
    for name, network in networks.items():
        save_run(folder / name, network)
    return folder


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in a folder with one image, a.png of 70 x 41 pixels; gives status, output and errors."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (41, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visualize", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            visualize.main()
        return end.value.code, *capsys.readouterr()

    return call


def written(folder) -> set[str]:
    return {path.name for path in folder.glob("visualizations/*")}


def test_all_pictures_of_a_vit(runs, command, tmp_path):
    status, out, _ = command("a.png", "--run", runs / "vit", "--query", 50, 9)
    assert status == 0
    assert written(tmp_path) == {f"a_{kind}.png" for kind in ("refinement", "pyramid", "attention", "points")}
    for name in written(tmp_path):
        assert f"visualizations/{name}" in out
        with Image.open(tmp_path / "visualizations" / name) as picture:
            assert picture.width > 800


def test_what_a_network_does_not_have_is_said_once(runs, command, tmp_path):
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    status, out, _ = command("a.png", "b.png", "--run", runs / "learned", "--pictures", "attention", "refinement")
    assert status == 0
    assert written(tmp_path) == set()
    assert out.splitlines()[1:] == [
        "no attention picture: the backbone has no attention; it takes a plain ViT, whose blocks see all tokens",
        "no refinement picture: this network has no spatial branch, so it does not refine",
    ]


def test_a_network_of_another_attention_samples_no_points(runs, command, tmp_path):
    status, out, _ = command("a.png", "--run", runs / "full", "--pictures", "points", "pyramid")
    assert status == 0
    assert written(tmp_path) == {"a_pyramid.png"}
    assert "no points picture: this network's attention is 'full', which samples no points" in out


@pytest.mark.parametrize(("run", "picture"), [("conv", "attention"), ("learned", "refinement"), ("full", "points")])
def test_only_what_the_network_does_not_have(runs, command, run, picture):
    status, _, err = command("a.png", "--run", runs / run, "--pictures", picture)
    assert status == 2
    assert err.startswith(f"error: no {picture} picture")
    assert err.count("\n") == 1


def test_a_bad_image_does_not_stop_the_others(runs, command, tmp_path):
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    status, _, err = command("bad.png", "a.png", "--run", runs / "conv", "--pictures", "pyramid")
    assert status == 1
    assert err.startswith("error: bad.png")
    assert err.endswith("error: 1 of 2 images could not be drawn\n")
    assert written(tmp_path) == {"a_pyramid.png"}


@pytest.mark.parametrize("query", [(70, 0), (-1, 0), (0, 41)], ids=str)
def test_a_query_outside_the_image(runs, command, tmp_path, query):
    status, _, err = command("a.png", "--run", runs / "conv", "--query", *query)
    assert status == 1
    assert "has 70 x 41 pixels: give --query X Y from 0 0 to 69 40" in err
    assert written(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["a.png", "--layer", "0"], "layer is 0"),
        (["a.png", "--no-refine"], "--no-refine leaves nothing to compare"),
        (["a.png", "--pictures"], "pictures is empty"),
        (["a.png", "--run", "nowhere"], "nowhere does not exist"),
        (["missing.png"], "there is no image or folder missing.png"),
        (["--compare", "x"], "--compare takes two or more run folders"),
        (["--compare", "x", "./x"], "--compare names a run twice: x, x"),
        (["a.png", "--samples", "3"], "samples is 3; give a number of images, together with --compare"),
        (["--compare", "x", "y"], "there is no x/evaluation.json: measure it first with"),
    ],
    ids=str,
)
def test_bad_options(command, arguments, message):
    status, out, err = command(*arguments)
    assert status == 2
    assert message in " ".join((out + err).split())


def test_comparison_shows_at_most_20_classes(command, tmp_path, monkeypatch):
    bars, order = [], [*range(24, 17, -1), *range(12, -1, -1)]  # 13 to 17 are nearest to 15 / 30

    def look(figure):
        (axis,) = figure.axes
        names = [label.get_text() for label in axis.get_yticklabels()]
        first, second = axis.containers
        bars.extend(zip(names, [bar.get_width() for bar in first], strict=True))
        assert [bar.get_width() for bar in second] == [0.5] * len(names)
        assert [text.get_text() for text in axis.texts] == [f"{100 * (i / 30 - 0.5):+.1f}" for i in order]

    on_save(monkeypatch, look)
    save_evaluation(tmp_path / "a", [i / 30 for i in range(25)])
    save_evaluation(tmp_path / "b", [0.5] * 25)
    status, out, _ = command("--compare", "a", "b")
    assert status == 0
    assert out == "visualizations/class_iou_comparison.png  the 20 of 25 classes that differ most\n"
    assert bars == [(f"class {i}", pytest.approx(i / 30)) for i in order]
    assert written(tmp_path) == {"class_iou_comparison.png"}


def test_bars_of_three_runs(command, tmp_path, monkeypatch):
    seen = []
    on_save(monkeypatch, lambda figure: seen.extend(len(bars) for bars in figure.axes[0].containers))
    for name in "abc":
        save_evaluation(tmp_path / name, [0.5, 0.25])
    status, out, _ = command("--compare", "a", "b", "c", "--out", "odd\udcff\n")
    assert (status, out) == (0, "odd\\udcff\\n/class_iou_comparison.png\n")
    assert seen == [2, 2, 2]


def test_runs_side_by_side(runs, command, tmp_path, monkeypatch):
    """Images of the validation set with truth and errors, an image file without."""
    titles = []
    on_save(monkeypatch, lambda figure: titles.append([axis.get_title() for axis in figure.axes if axis.get_title()]))
    for name in ("a", "b"):
        save_run(tmp_path / name, small_model(8), dataset="shapes")
    status, out, _ = command("a.png", "--compare", "a", "b", "--samples", 1)
    assert status == 0
    sample, file = out.splitlines()
    assert sample.endswith("_comparison.png")
    assert file == "visualizations/a_comparison.png"
    assert titles == [["image", "truth", "a", "b"], ["image", "a", "b"]]
    status, _, err = command("a.png", "--compare", "a", runs / "conv")
    assert status == 2
    assert "have different classes: compare runs on one data set" in err


def test_a_damaged_evaluation(command, tmp_path):
    for name in ("a", "b"):
        save_evaluation(tmp_path / name, [0.5])
    (tmp_path / "b" / "evaluation.json").write_text('{"classes": ["class 0"], "iou"')
    status, _, err = command("--compare", "a", "b")
    assert status == 2
    assert "b/evaluation.json is damaged" in err
