"""Evaluated runs side by side (Fig. 8), and their mean."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import complete_folder
from ..model.hub import saved_model
from ..validation import check_type


def load_evaluation(run: Path) -> dict[str, Any]:
    """Read the classes, IoU, mIoU and split that `unept.evaluate` wrote into a run folder.

    Where it has not run, they are those of the last validation that gave a better model, which the model keeps.

    Raises:
        FileNotFoundError: if the run has not been evaluated.
        ValueError: if the file is damaged.
    """
    path = run / "evaluation.json"
    alone = saved_model(run)  # without its run
    model = (alone or complete_folder(run / "model")) / "config.json"
    try:
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
        else:
            path, known = model, json.loads(model.read_text(encoding="utf-8")) if model.is_file() else {}
            record = {"classes": known.get("classes"), **(known.get("evaluation") or {})}
            if "iou" not in record:
                missing = run / "evaluation.json"
                how = f"python -m unept.evaluate {run}"
                if alone is not None:
                    how += f" --preset PRESET --root ROOT --out {run}"
                raise FileNotFoundError(f"there is no {missing}: measure it first with `{how}`")
        kinds = {"classes": list[str], "iou": list[float | None], "mIoU": float, "split": str}
        for key, kind in kinds.items():
            check_type(key, record[key], kind)
        return {key: record[key] for key in kinds}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): evaluate the run again") from error


def compare_classes(*runs: Path) -> tuple[list[tuple[str, tuple[float, ...]]], tuple[float, ...]]:
    """Compare the classes of two or more evaluated runs.

    Classes that have no IoU in one of the runs, because they never occur, are left out.

    Returns:
        rows: per class its name and the IoU in each run; the class that differs most between the runs comes first.
        means: the mIoU of the runs.

    Raises:
        FileNotFoundError: if a run has not been evaluated.
        ValueError: if an evaluation is damaged, or the runs differ in their classes or the split, or no class has an
            IoU in all of them.
    """
    records = [load_evaluation(run) for run in runs]
    first = records[0]
    for run, record in zip(runs, records, strict=True):
        if record["classes"] != first["classes"]:
            raise ValueError(
                f"the {len(first['classes'])} classes of {runs[0]} and the {len(record['classes'])} of {run} differ in "
                "name or order: compare runs with the same class list"
            )
        if record["split"] != first["split"]:
            raise ValueError(
                f"{runs[0]} was evaluated on {first['split']} and {run} on {record['split']}: evaluate one again with "
                "--split"
            )
    scores = zip(*(record["iou"] for record in records), strict=True)
    rows = [(name, iou) for name, iou in zip(first["classes"], scores, strict=True) if None not in iou]
    if not rows:
        raise ValueError(f"{short_list(runs)} have no class with an IoU in all: evaluate them on labelled images")
    return sorted(rows, key=lambda row: min(row[1]) - max(row[1])), tuple(record["mIoU"] for record in records)


def short_list(runs: Sequence[Path]) -> str:
    """The paths of runs in a sentence."""
    return ", ".join(map(str, runs[:-1])) + f" and {runs[-1]}"


def short_names(*runs: Path) -> tuple[str, ...]:
    """The names of run folders, or their whole paths where two names are the same."""
    names = tuple(run.name for run in runs)
    return names if len(set(names)) == len(names) else tuple(map(str, runs))


def mean_and_deviation(values: Sequence[float | None], scale: float = 1.0, digits: int = 2) -> str:
    """Format the mean of one value per run, with their standard deviation if there are several.

    Values that are None or NaN are left out; without any other the result is empty.
    """
    known = [scale * value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def mean_scores(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The label and the name of each score of `evaluate_model` over all classes that has an unrefined counterpart."""
    means = [("mIoU", "mIoU"), ("pixAcc", "pixAcc"), ("boundary F", "boundary_f"), ("boundary IoU", "boundary_iou")]
    further = [name for name in scores if name.startswith("boundary_f_") and f"{name}_unrefined" in scores]
    return means + [(f"boundary F, {name.removeprefix('boundary_f_').removesuffix('px')} px", name) for name in further]


def format_means(scores: Sequence[Mapping[str, Any]]) -> str:
    """Format the means of several runs' scores (`evaluate_model`) in percent, with their standard deviations.

    Raises:
        ValueError: the runs were evaluated on different data sets.
    """
    datasets = list(dict.fromkeys(score["dataset"] for score in scores))
    if len(datasets) > 1:
        raise ValueError(f"there is no mean of runs on different data: {', '.join(datasets)}")
    lines = [f"{f'mean of {len(scores)} runs':16}  {'refined':>14}  {'unrefined':>14}"]
    for label, key in mean_scores(scores[0]):
        cells = (mean_and_deviation([score[name] for score in scores], 100) for name in (key, f"{key}_unrefined"))
        lines.append("  ".join([f"{label:16}", *(f"{cell or '-':>14}" for cell in cells)]))
    return "\n".join(lines)
