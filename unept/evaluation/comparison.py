"""Two evaluated runs side by side (Fig. 8)."""

import json
from pathlib import Path
from typing import Any

from ..validation import check_type


def load_evaluation(run: Path) -> dict[str, Any]:
    """Read the classes, IoU, mIoU and split that `unept.evaluate` wrote into a run folder.

    Raises:
        FileNotFoundError: if the run has not been evaluated.
        ValueError: if the file is damaged.
    """
    path = run / "evaluation.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: measure the run first with `python -m unept.evaluate {run}`")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"classes": list[str], "iou": list[float | None], "mIoU": float, "split": str}
        for key, kind in kinds.items():
            check_type(key, record[key], kind)
        return {key: record[key] for key in kinds}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): evaluate the run again") from error


def compare_classes(first: Path, second: Path) -> tuple[list[tuple[str, float, float]], tuple[float, float]]:
    """Compare the classes of two evaluated runs.

    Classes that have no IoU in one of the runs, because they never occur, are left out.

    Returns:
        rows: per class its name and the two IoU; the class with the largest gain of the first run comes first.
        means: the mIoU of both runs.

    Raises:
        FileNotFoundError: if a run has not been evaluated.
        ValueError: if an evaluation is damaged, or the runs differ in their classes or the split, or no class has an
            IoU in both.
    """
    one, other = load_evaluation(first), load_evaluation(second)
    if one["classes"] != other["classes"]:
        raise ValueError(
            f"the {len(one['classes'])} classes of {first} and the {len(other['classes'])} of {second} differ in name "
            "or order: compare runs with the same class list"
        )
    if one["split"] != other["split"]:
        raise ValueError(
            f"{first} was evaluated on {one['split']} and {second} on {other['split']}: evaluate one again with --split"
        )
    rows = [
        (name, a, b)
        for name, a, b in zip(one["classes"], one["iou"], other["iou"], strict=True)
        if a is not None and b is not None
    ]
    if not rows:
        raise ValueError(f"{first} and {second} have no class with an IoU in both: evaluate them on labelled images")
    return sorted(rows, key=lambda row: row[2] - row[1]), (one["mIoU"], other["mIoU"])


def short_names(first: Path, second: Path) -> tuple[str, str]:
    """The names of two run folders, or their whole paths where the names are the same."""
    return (str(first), str(second)) if first.name == second.name else (first.name, second.name)
