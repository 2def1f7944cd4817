"""Tables of what `bench.ablations` found, and the targets of the project."""

from typing import Any

from unept.evaluation.comparison import mean_and_deviation

from .ablation_plan import BASELINES, FINAL, PAPER_GB, Size, best_rate, plan

PERCENT = ("mIoU", "pixAcc", "boundary_f", "boundary_f1", "boundary_iou")
PERCENT += tuple(f"{name}_unrefined" for name in PERCENT if name != "pixAcc")
SCORES = (*PERCENT, "images_per_s")
Results = dict[str, dict[str, Any]]


def report(results: Results, size: Size = "paper") -> str:
    """Return Markdown: a table of the trainings, one of the memory, and the project's targets with pass or MISS.

    Trainings that differ only in their seed share a row: the mean, and the standard deviation between the seeds.
    """
    order = [job.row for job in plan(results, size=size)]
    place = lambda name: order.index(name) if name in order else len(order)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        if "mIoU" in result:
            rows.setdefault(name.removesuffix(f" seed {result.get('seed')}"), []).append(result)
    lines = [
        "| training | mIoU | pixAcc | boundary F 3 px | 1 px | boundary IoU "
        "| unrefined: mIoU | boundary F 3 px | 1 px | boundary IoU "
        "| M parameters | GMACs | training img/s | inference img/s | GiB | minutes |",
        "|---|" + "---:|" * 15,
    ]
    for name in sorted(rows, key=place):
        of = rows[name]
        title = name if len(of) == 1 else f"{name} ({len(of)} seeds)"
        percent = [mean_and_deviation([r[key] for r in of], 100, 2) for key in PERCENT]
        parameters, gmacs = f"{of[0]['parameters'] / 1e6:.1f}", f"{of[0]['gmacs']:.1f}"
        rest = ("training_images_per_s", "images_per_s", "peak_gib", "minutes")
        rates = [mean_and_deviation([r[key] for r in of], 1, 1) for key in rest]
        lines.append(f"| {' | '.join([title, *percent, parameters, gmacs, *rates])} |")
    measured = {name: r for name, r in results.items() if "peak_gb" in r}
    if measured:
        lines += ["", "| training step | peak GB | M parameters | GMACs |", "|---|---:|---:|---:|"]
        for name in sorted(measured, key=place):
            r = measured[name]
            lines.append(f"| {name} | {r['peak_gb']:.2f} | {r['parameters'] / 1e6:.1f} | {r['gmacs']:.1f} |")
    return "\n".join([*lines, "", *check_targets(results, size)])


def check_targets(results: Results, size: Size = "paper") -> list[str]:
    """Return a line per target of the project: pass, MISS or not measured."""
    score = lambda name, key="mIoU": results.get(name, {}).get(key)
    jobs = plan(results, size=size)
    best = {name: job.name for name in (FINAL, *BASELINES) if (job := best_rate(name, jobs, results)) is not None}
    final, baselines = score(best.get(FINAL, "")), [score(best[name]) for name in BASELINES if name in best]
    gain = None
    if final is not None:
        gain = score(best[FINAL], "boundary_f") - score(best[FINAL], "boundary_f_unrefined")
    claims: list[tuple[str, bool | None]] = [
        ("mIoU of the final network at least 0.72", None if final is None else final >= 0.72),
        (
            "mIoU above that of every network of segmentation-models-pytorch",
            None if final is None or len(baselines) < len(BASELINES) else final > max(baselines),
        ),
        ("refinement: at least one point of boundary F", None if gain is None else gain >= 0.01),
    ]
    for first, second in (("baseline", "pyramid"), ("pyramid", FINAL)):
        both = None not in (score(first), score(second))
        claims.append((f"{second} above {first}", score(second) > score(first) if both else None))
    for backbone, limit in PAPER_GB.items():
        peak = score(f"memory {backbone.split('_')[0]} B=2 triton bf16 compiled", "peak_gb")
        kept = None if peak is None else peak <= 0.4 * limit
        claims.append((f"{backbone}: at most 40 % of {limit} GB at batch 2", kept))
    words = {None: "not measured", True: "pass", False: "MISS"}
    return [f"- {words[outcome]}: {claim}" for claim, outcome in claims]
