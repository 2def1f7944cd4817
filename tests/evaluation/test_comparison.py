"""Two evaluated runs side by side: their classes, and runs that can't be compared."""

import pytest

from tests.helpers.runs import save_evaluation
from unept.evaluation.comparison import compare_classes, short_names


def test_comparison_of_classes(tmp_path):
    save_evaluation(tmp_path / "a", [0.5, None, 0.75, 0.25, 0.5])
    save_evaluation(tmp_path / "b", [0.5, 0.5, 0.25, 0.5, None])
    rows, means = compare_classes(tmp_path / "a", tmp_path / "b")
    assert rows == [("class 2", 0.75, 0.25), ("class 0", 0.5, 0.5), ("class 3", 0.25, 0.5)]
    assert means == (0.5, 0.4375)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["b", "a"]}, "differ in name or order"),
        ({"split": "test"}, "was evaluated on val and .*b on test"),
        ({"iou": [None, 0.5]}, "no class with an IoU in both"),
    ],
    ids=["classes", "split", "nothing in common"],
)
def test_runs_that_can_not_be_compared(tmp_path, change, message):
    save_evaluation(tmp_path / "a", [0.5, None], ["a", "b"])
    save_evaluation(tmp_path / "b", **{"iou": [0.5, 0.5], "classes": ["a", "b"]} | change)
    with pytest.raises(ValueError, match=message):
        compare_classes(tmp_path / "a", tmp_path / "b")


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    assert short_names(tmp_path / "a", tmp_path / "b") == ("a", "b")
    assert short_names(tmp_path / "x" / "run", tmp_path / "y" / "run") == (
        f"{tmp_path}/x/run",
        f"{tmp_path}/y/run",
    )
