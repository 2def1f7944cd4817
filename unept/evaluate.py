"""Evaluate a trained model: `python -m unept.evaluate RUN` prints a table, writes it and draws it (Sec. 4)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from . import cli, distributed
from .data import SegmentationDataset
from .evaluation.comparison import format_means
from .evaluation.evaluator import check_classes as check_classes
from .evaluation.evaluator import evaluate_model as evaluate_model
from .evaluation.evaluator import format_table as format_table
from .evaluation.inspection import Inspection, write_class_table
from .files import create_folder, write_json
from .files import json_ready as json_ready
from .inference import InferenceOptions, resolve
from .memory import out_of_memory
from .model.hub import REPOSITORY, saved_model
from .pictures import charts, drawing
from .pictures.figures import draw_samples as draw_samples
from .pictures.figures import draw_worst
from .presets import PRESETS
from .pretrained import load, load_run
from .validation import check_range

FILES = ("evaluation.json", "evaluation.csv", "evaluation.png", "confusion.png", "calibration.png")


@dataclass
class EvaluateConfig:
    """Evaluate a trained model. Writes into its run folder, or into --out: evaluation.json, evaluation.csv (a line per
    class), evaluation.png (IoU per class), confusion.png, calibration.png and worst.png (images of the lowest mIoU).
    """

    run: tyro.conf.Positional[Path]
    """Run folder that unept.train wrote. With --preset also a folder that save_pretrained wrote, ORG/NAME of a
    repository on the Hugging Face hub, or camvid_tiny, the demo model."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """More run folders, each of which is evaluated likewise; their means and standard deviations come last."""
    split: Literal["val", "train", "test"] = "val"
    """Part of the data set."""
    preset: str | None = None
    """Preset of unept.train whose data set to evaluate on, with its --root. None: that of the run."""
    root: Path | None = None
    """Folder of the data set. None: as in training."""
    out: Path | None = None
    """Folder for the files; of several runs, each has a folder of its name in it. None: the run folder; with --preset
    the folder `evaluation`."""
    boundary_tolerance: tuple[int, ...] | None = None
    """Distance in pixels within which a boundary counts as found; of further ones the boundary F-score is added. None:
    as in training."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    device: distributed.Device = "auto"
    """auto: CUDA if there is a device."""
    worst: int = 6
    """Number of images of the lowest mIoU to draw into worst.png, with their truth; 0 draws none."""
    workers: int = field(default_factory=distributed.default_workers)
    """Number of processes that read the data; 0 reads in the main process."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a file that cannot be read or breaks a rule. error: stop. skip: leave its image out, and say how
    many were left out."""

    def __post_init__(self) -> None:
        if self.worst < 0:
            raise ValueError(f"worst is {self.worst}; give a number of images, or 0 for none")
        check_range("workers", self.workers, 0, 1024)
        if self.preset is not None:
            if self.preset not in PRESETS:
                raise ValueError(f"there is no preset {self.preset!r}: give one of {', '.join(PRESETS)}")
            self.out = self.out or Path("evaluation")
        for tolerance in self.boundary_tolerance or ():
            check_range("boundary_tolerance", tolerance, 0, 1024)


def evaluate_run(options: EvaluateConfig) -> None:
    """Evaluate the best model of each run folder; print its table, write the files that `EvaluateConfig` names.

    The folder for them is created before the evaluation, so that one that cannot be written costs no evaluation. Of
    several runs the means are printed too.

    Under torchrun each process evaluates its share; rank 0 prints and writes.

    Raises:
        FileNotFoundError, ValueError: see `unept.pretrained.load_run`, `unept.data.build_dataset`, `evaluate_model` and
            `format_means`; or two runs of one name have a common --out.
        OSError: the folder for the results is not writable, or the disk is full.
        MemoryError: the memory of the GPU or of the machine is used up.
    """
    folders = _result_folders(options)
    device = distributed.choose_device(options.device)
    with distributed.process_group(device):
        scores = [_evaluate_run(options, run, out, device) for run, out in folders]
        if len(scores) > 1 and distributed.is_main():
            if len(datasets := dict.fromkeys(score["dataset"] for score in scores)) == 1:
                print(f"\n{format_means(scores)}")
            else:
                cli.say("")
                cli.say(f"There is no mean of runs on different data: {', '.join(datasets)}")


def _result_folders(options: EvaluateConfig) -> list[tuple[Path, Path]]:
    """Each run folder, and the folder of its results."""
    runs = (options.run, *options.others)
    if options.out is None:
        return [(run, run) for run in runs]
    if len(runs) == 1:
        return [(options.run, options.out)]
    results: dict[Path, Path] = {}
    for run in runs:
        if (other := results.setdefault(options.out / run.resolve().name, run)) is not run:
            raise ValueError(
                f"the results of {other} and {run} would share one folder below {options.out}: evaluate each of them "
                "by itself, with different --out"
            )
    return [(run, out) for out, run in results.items()]


def _evaluate_run(options: EvaluateConfig, run: Path, out: Path, device: torch.device) -> dict[str, Any]:
    if options.preset is None:
        if saved_model(run) is not None:
            raise ValueError(
                f"{run} is a model without the run that trained it: say with --preset and --root what to evaluate it on"
            )
        if not run.exists() and REPOSITORY.fullmatch(str(run)):
            raise FileNotFoundError(
                f"{run} does not exist: give a folder that unept.train wrote; if it is a model on the Hugging Face "
                "hub, say with --preset and --root what to evaluate it on"
            )
        trained, model = load_run(run, device)
    else:
        trained, model = PRESETS[options.preset](), load(run, device)
    dataset = trained.data.build(options.split, options.root)
    config = resolve(options.inference, model)
    distributed.run_on_main(lambda: create_folder(out))
    tolerance = options.boundary_tolerance or trained.boundary_tolerance
    inspection = Inspection(len(dataset.classes), dataset.ignore_index, device)
    with out_of_memory("with whole images: --window sees them in parts, --window-batch fewer of these at once"):
        scores = evaluate_model(
            model,
            dataset,
            config,
            device,
            tolerance,
            progress=distributed.is_main(),
            workers=options.workers,
            on_bad_sample=options.on_bad_sample,
            inspection=inspection,
        )
    if not distributed.is_main():
        return scores
    record = {"split": options.split, "classes": list(dataset.classes), **scores, "inference": asdict(config)}
    worst = inspection.worst(options.worst)
    files = report(record, dataset, inspection, config.describe(), out)
    if worst:
        files.append(out / "worst.png")
        draw_worst(model, dataset, worst, config, device, files[-1])
    cli.say(f"Written: {', '.join(map(str, files))}")
    return scores


def report(
    record: dict[str, Any], dataset: SegmentationDataset, inspection: Inspection, protocol: str, folder: Path
) -> list[Path]:
    """Print, write and draw what was measured.

    Args:
        record: what evaluation.json holds besides the calibration and the confusion matrix, with the scores.
        dataset: the data set that was evaluated.
        inspection: what was counted.
        protocol: how images were seen (`InferenceConfig.describe`).
        folder: where the files are written.

    Returns:
        The files.

    Raises:
        ValueError: no pixel was counted.
    """
    if not inspection.images:
        raise ValueError(
            f"no pixel of the {record['images']} images has a class: all of their labels are {dataset.ignore_index}, "
            "which is ignored. Label them, or evaluate another split"
        )
    calibration = inspection.calibration.scores()
    print(f"{format_table(record, dataset.classes)}\nProtocol: {protocol}.")
    print(f"Expected calibration error {calibration.ece:.2%}.")
    record = record | {"calibration": asdict(calibration), "confusion": inspection.matrix.tolist()}
    files = [folder / name for name in FILES]
    write_json(files[0], record)
    write_class_table(record, dataset.classes, files[1])
    drawing.class_bars(record, dataset.classes, files[2])
    charts.confusion_matrix(inspection.matrix, dataset.classes, files[3])
    charts.calibration_curve(calibration, files[4])
    return files


def main() -> None:
    """Run the command line."""
    cli.run(lambda: evaluate_run(tyro.cli(EvaluateConfig, prog="python -m unept.evaluate")))


if __name__ == "__main__":
    main()
