"""Two evaluated runs side by side: their classes, and runs that can't be compared."""

import math
from pathlib import Path

import pytest

from tests.helpers.runs import CLASSES, save_evaluation, save_run, small_model
from unept.evaluation.comparison import compare_classes, format_means, load_evaluation, short_names


def test_comparison_of_classes(tmp_path):
    save_evaluation(tmp_path / "a", [0.5, None, 0.75, 0.25, 0.5])
    save_evaluation(tmp_path / "b", [0.5, 0.5, 0.25, 0.5, None])
    save_evaluation(tmp_path / "c", [0.5, 0.5, 0.5, 0.5, 0.5])
    rows, means = compare_classes(tmp_path / "a", tmp_path / "b")
    assert rows == [("class 2", (0.75, 0.25)), ("class 3", (0.25, 0.5)), ("class 0", (0.5, 0.5))]
    assert means == (0.5, 0.4375)
    rows, means = compare_classes(*(tmp_path / name for name in "abc"))
    assert rows == [("class 2", (0.75, 0.25, 0.5)), ("class 3", (0.25, 0.5, 0.5)), ("class 0", (0.5, 0.5, 0.5))]
    assert means == (0.5, 0.4375, 0.5)


def test_a_run_without_an_evaluation_has_that_of_its_model(tmp_path):
    """As training saves it; `unept.evaluate` comes first where it has run."""
    save_evaluation(tmp_path / "a", [0.5, 0.5, 0.25], CLASSES)
    model = small_model()
    model.evaluation = {"split": "val", "step": 5, "mIoU": 0.3125, "iou": [0.5, None, 0.125]}
    save_run(tmp_path / "b", model)
    rows, means = compare_classes(tmp_path / "a", tmp_path / "b")
    assert rows == [("sand", (0.25, 0.125)), ("sky", (0.5, 0.5))]
    assert means == (pytest.approx(1.25 / 3), 0.3125)
    save_run(tmp_path / "c", small_model())
    with pytest.raises(FileNotFoundError, match=r"measure it first with `python -m unept\.evaluate [^ ]*c`"):
        compare_classes(tmp_path / "a", tmp_path / "c")
    assert compare_classes(tmp_path / "a", tmp_path / "b" / "model")[1] == means, "a model without its run"
    with pytest.raises(FileNotFoundError, match=r"unept\.evaluate ([^ ]*model) --preset PRESET --root ROOT --out \1`"):
        compare_classes(tmp_path / "a", tmp_path / "c" / "model")
    assert load_evaluation(Path("camvid_tiny"))["mIoU"] > 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["b", "a"]}, "differ in name or order"),
        ({"split": "test"}, "was evaluated on val and .*b on test"),
        ({"iou": [None, 0.5]}, "a and .*b have no class with an IoU in all"),
    ],
    ids=["classes", "split", "nothing in common"],
)
def test_runs_that_can_not_be_compared(tmp_path, change, message):
    save_evaluation(tmp_path / "a", [0.5, None], ["a", "b"])
    save_evaluation(tmp_path / "b", **{"iou": [0.5, 0.5], "classes": ["a", "b"]} | change)
    with pytest.raises(ValueError, match=message):
        compare_classes(tmp_path / "a", tmp_path / "b")


def scores(miou, dataset="CamVid"):
    names = [f"{key}{end}" for key in ("mIoU", "pixAcc", "boundary_f", "boundary_iou") for end in ("", "_unrefined")]
    return {**dict.fromkeys(names, math.nan), "mIoU": miou, "pixAcc": 0.9, "dataset": dataset}


def test_mean_of_several_runs():
    lines = format_means([scores(0.5), scores(0.6), scores(0.7)]).splitlines()
    assert lines[0].split() == ["mean", "of", "3", "runs", "refined", "unrefined"]
    assert lines[1].split() == ["mIoU", "60.00", "±", "10.00", "-"]
    assert lines[2].split() == ["pixAcc", "90.00", "±", "0.00", "-"]
    further = {"boundary_f_1px": 0.4, "boundary_f_1px_unrefined": 0.25}
    last = format_means([scores(0.5) | further, scores(0.6) | further]).splitlines()[-1]
    assert last.split() == ["boundary", "F,", "1", "px", "40.00", "±", "0.00", "25.00", "±", "0.00"]
    with pytest.raises(ValueError, match="there is no mean of runs on different data: CamVid, ADE20K"):
        format_means([scores(0.5), scores(0.5, "ADE20K")])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    assert short_names(tmp_path / "a", tmp_path / "b") == ("a", "b")
    assert short_names(tmp_path / "x" / "run", tmp_path / "y" / "run") == (
        f"{tmp_path}/x/run",
        f"{tmp_path}/y/run",
    )
