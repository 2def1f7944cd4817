"""Evaluate a trained model: `python -m unept.evaluate RUN` prints a table and writes JSON and a picture (Sec. 4)."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from . import cli, distributed
from .evaluation.comparison import format_means
from .evaluation.evaluator import check_classes as check_classes
from .evaluation.evaluator import evaluate_model as evaluate_model
from .evaluation.evaluator import format_table as format_table
from .files import json_ready as json_ready
from .files import write_json
from .inference import InferenceOptions, resolve
from .memory import out_of_memory
from .pictures import drawing
from .pictures.figures import draw_samples as draw_samples
from .pretrained import load_run


@dataclass
class EvaluateConfig:
    """Evaluate a trained model; writes evaluation.json and evaluation.png into its run folder."""

    run: tyro.conf.Positional[Path]
    """Run folder that unept.train wrote."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """More run folders, each of which is evaluated likewise; their means and standard deviations come last."""
    split: Literal["val", "train", "test"] = "val"
    """Part of the data set."""
    root: Path | None = None
    """Folder of the data set. None: as in training."""
    boundary_tolerance: int | None = None
    """Distance in pixels within which a boundary counts as found. None: as in training."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    device: distributed.Device = "auto"
    """auto: CUDA if there is a device."""
    workers: int = 2
    """Number of processes that read the data; 0 reads in the main process."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a file that cannot be read or breaks a rule. error: stop. skip: leave its image out, and say how
    many were left out."""


def evaluate_run(options: EvaluateConfig) -> None:
    """Evaluate the best model of a run folder; print the table, write evaluation.json and evaluation.png.

    Of several runs the means are printed too.

    Under torchrun each process evaluates its share; rank 0 prints and writes.

    Raises:
        FileNotFoundError, ValueError: see `unept.pretrained.load_run`, `unept.data.build_dataset` and `evaluate_model`.
        MemoryError: the memory of the GPU or of the machine is used up.
    """
    device = distributed.choose_device(options.device)
    with distributed.process_group(device):
        scores = [_evaluate_run(replace(options, run=run), device) for run in (options.run, *options.others)]
        if len(scores) > 1 and distributed.is_main():
            print(f"\n{format_means(scores)}")


def _evaluate_run(options: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    trained, model = load_run(options.run, device)
    dataset = trained.data.build(options.split, options.root)
    config = resolve(options.inference, model)
    tolerance = trained.boundary_tolerance if options.boundary_tolerance is None else options.boundary_tolerance
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
        )
    if not distributed.is_main():
        return scores
    print(f"{format_table(scores, dataset.classes)}\nProtocol: {config.describe()}.")
    record = {"split": options.split, "classes": list(dataset.classes), **scores, "inference": asdict(config)}
    json_path, picture_path = options.run / "evaluation.json", options.run / "evaluation.png"
    write_json(json_path, record)
    drawing.class_bars(scores, dataset.classes, picture_path)
    print(f"Written: {json_path} and {picture_path}")
    return scores


def main() -> None:
    """Run the command line."""
    cli.run(lambda: evaluate_run(tyro.cli(EvaluateConfig, prog="python -m unept.evaluate")))


if __name__ == "__main__":
    main()
