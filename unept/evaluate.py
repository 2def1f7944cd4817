"""`python -m unept.evaluate RUN`: how good a trained model is, as a table, JSON and a picture (Sec. 4)."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from . import cli, distributed
from .data import DatasetError, SegmentationDataset, evaluation_loader
from .data.loader import OnBadSample, read_sample, report_skipped
from .evaluation.metrics import BoundaryFScore, ConfusionMatrix
from .inference import InferenceConfig, InferenceOptions, infer, resolve
from .model.output import SegmentationModel, boundary_probability, class_ids
from .pictures import drawing


@dataclass
class EvaluateConfig:
    """Evaluate a trained model; writes evaluation.json and evaluation.png into its run folder."""

    run: tyro.conf.Positional[Path]
    """Run folder that unept.train wrote."""
    split: Literal["val", "train", "test"] = "val"
    """Which part of the data set."""
    root: Path | None = None
    """Folder of the data set. None: as in training."""
    boundary_tolerance: int | None = None
    """Pixels within which a boundary counts as found. None: as in training."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""
    workers: int = 2
    """Processes that read the data; 0 reads in the main process."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A file that can't be read, or breaks a rule: error stops; skip leaves its image out, and says how many."""


class _Tally:
    """Region and boundary scores of one kind of prediction."""

    def __init__(self, dataset: SegmentationDataset, tolerance: float, device: torch.device):
        counted = {"num_classes": len(dataset.classes), "ignore_index": dataset.ignore_index, "device": device}
        self.regions = ConfusionMatrix(**counted)
        self.boundaries = BoundaryFScore(tolerance=tolerance, **counted)

    def update(self, ids: Tensor, labels: Tensor) -> None:
        self.regions.update(ids, labels)
        self.boundaries.update(ids, labels)

    def all_reduce(self) -> None:
        self.regions.all_reduce()
        self.boundaries.all_reduce()


def evaluate_model(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    config: InferenceConfig,
    device: torch.device,
    boundary_tolerance: float,
    progress: bool = False,
    workers: int = 0,
    on_bad_sample: OnBadSample = "error",
) -> dict[str, Any]:
    """Scores with and without refinement, from one pass of the network over the data set.

    Where a process group is initialised, each rank evaluates its share and all get the scores of the whole data set.

    Args:
        model: on `device`; left in the mode it is in.
        dataset: images and their labels, of the same size.
        config: views and refinement.
        device: of the model.
        boundary_tolerance: pixels within which a boundary counts as found.
        progress: show a bar.
        workers: processes that read the data; 0: this one.
        on_bad_sample: `"error"` raises for an image or label that can't be read, `"skip"` leaves its image out.

    Returns:
        `dataset`, its description; shares from 0 to 1, NaN where there is nothing to divide by: `mIoU`, `pixAcc`,
        `boundary_f`, the same three ending in `_unrefined`, `mean_accuracy`; lists by class `iou`, `accuracy`,
        `class_boundary_f` and `share` (of the counted pixels); `left_out`, the names of the classes that have no IoU
        (`ConfusionMatrix.scores`); and `boundary_tolerance`, `images` (their number), `skipped` (how many more
        were left out), `images_per_s` (reading and scoring included).

    Raises:
        ValueError: the model and the data set have different numbers of classes, or the data set is empty.
        DatasetError: a file of the data set breaks a rule; with `"skip"`, all images were left out.
    """
    check_classes(model, dataset)
    world_size = distributed.world_size()
    loader = evaluation_loader(dataset, distributed.rank(), world_size, workers, on_bad_sample=on_bad_sample)
    refined, unrefined = (_Tally(dataset, boundary_tolerance, device) for _ in range(2))
    start = time.perf_counter()
    for image, labels in tqdm(loader, desc="evaluate", unit="image", disable=not progress, leave=False):
        image, labels = image.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        output = infer(model, image, config)
        size = labels.shape[1:]
        refined.update(class_ids(output, size, config.refinement), labels)
        unrefined.update(class_ids(output, size, None), labels)
    if world_size > 1:
        refined.all_reduce()
        unrefined.all_reduce()
    skipped = distributed.sum_over_ranks(loader.skipped, device)
    if skipped == len(dataset):
        raise DatasetError(f"none of the {skipped} images could be read: see the reasons above")
    images = len(dataset) - skipped
    regions, boundaries = refined.regions.scores(), refined.boundaries.scores()
    truth = refined.regions.matrix.sum(1)
    plain = unrefined.regions.scores()
    return {
        "dataset": dataset.description,
        "mIoU": regions.mean_iou,
        "pixAcc": regions.pixel_accuracy,
        "boundary_f": boundaries.mean_f,
        "mIoU_unrefined": plain.mean_iou,
        "pixAcc_unrefined": plain.pixel_accuracy,
        "boundary_f_unrefined": unrefined.boundaries.scores().mean_f,
        "mean_accuracy": regions.mean_accuracy,
        "iou": list(regions.iou),
        "accuracy": list(regions.accuracy),
        "class_boundary_f": list(boundaries.f),
        "share": (truth / truth.sum()).tolist(),
        "left_out": [name for name, iou in zip(dataset.classes, regions.iou, strict=True) if math.isnan(iou)],
        "boundary_tolerance": boundary_tolerance,
        "images": images,
        "skipped": skipped,
        "images_per_s": images / (time.perf_counter() - start),
    }


def check_classes(model: SegmentationModel, dataset: SegmentationDataset) -> None:
    """Raise ValueError if a model does not predict the classes of a data set, or the data set is empty."""
    if model.num_classes != len(dataset.classes):
        raise ValueError(
            f"the model predicts {model.num_classes} classes, but the data set has {len(dataset.classes)}: "
            "evaluate it on data with the class list it was trained with, or train a model on this data"
        )
    differ = [(a, b) for a, b in zip(model.classes, dataset.classes, strict=True) if a != b]
    if differ and not all(name == f"class {k}" for k, name in enumerate(model.classes)):
        raise ValueError(
            f"the model's classes are not the data set's: its {differ[0][0]!r} stands where the data set has "
            f"{differ[0][1]!r}. Give the class list that the model was trained with, in the same order"
        )
    if not len(dataset):
        raise ValueError("the data set holds no image: check its root folder and the split")


def draw_samples(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    count: int,
    config: InferenceConfig,
    device: torch.device,
    path: Path,
    on_bad_sample: OnBadSample = "error",
) -> None:
    """Draw `count` images spread evenly over the data set and what the model makes of them (`drawing.sample_panel`).

    With `on_bad_sample` `"skip"`, the next image is drawn for one that can't be read.
    """
    check_classes(model, dataset)
    count = min(count, len(dataset))
    samples = []
    for i in (n * len(dataset) // count for n in range(count)):
        i, pair, skipped = read_sample(dataset, i, on_bad_sample)
        report_skipped(skipped)
        image, truth = (tensor.as_subclass(Tensor) for tensor in pair)
        output = infer(model, image.to(device), config)
        size = (truth.shape[0], truth.shape[1])
        prediction = class_ids(output, size, None)[0]
        refined = boundary = None
        probability = boundary_probability(output, size)
        if probability is not None:
            refined = class_ids(output, size, replace(config, refine=True).refinement)[0]
            boundary = probability[0]
        samples.append(drawing.Sample(dataset.name(i), image, truth, prediction, refined, boundary))
    drawing.sample_panel(samples, dataset.classes, dataset.palette, path)


def format_table(scores: Mapping[str, Any], classes: Sequence[str]) -> str:
    """What `evaluate_model` gives, as an aligned table of the classes, in percent, and a summary below it."""
    width = max(len("class"), *(len(name) for name in classes))
    header = f"{'class':{width}}  {'IoU':>6}  {'accuracy':>8}  {'boundary F':>10}  {'pixels':>6}"
    columns = (scores["iou"], scores["accuracy"], scores["class_boundary_f"], scores["share"])
    lines = [header, "-" * len(header)]
    for name, iou, accuracy, boundary_f, share in zip(classes, *columns, strict=True):
        numbers = f"{_percent(iou):>6}  {_percent(accuracy):>8}  {_percent(boundary_f):>10}  {_percent(share):>6}"
        lines.append(f"{name:{width}}  {numbers}")
    lines.append("-" * len(header))
    lines.append(f"{'':{len('boundary F')}}  {'refined':>10}  {'unrefined':>10}")
    for label, key in (("mIoU", "mIoU"), ("pixAcc", "pixAcc"), ("boundary F", "boundary_f")):
        values = f"{_percent(scores[key]):>10}  {_percent(scores[key + '_unrefined']):>10}"
        lines.append(f"{label:{len('boundary F')}}  {values}")
    unread = f" ({scores['skipped']} more left out, as they can't be read)" if scores["skipped"] else ""
    lines.append(
        f"{scores['dataset']}. All in percent; boundary F within {scores['boundary_tolerance']} px; "
        f"{scores['images']} images{unread}, {scores['images_per_s']:.1f} images/s."
    )
    if left_out := scores["left_out"]:
        lines.append(
            f"mIoU leaves out {len(left_out)} of {len(classes)} classes, found neither in the labels nor in the "
            "predictions; one that is only predicted counts as 0."
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def json_ready(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: json_ready(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def evaluate_run(options: EvaluateConfig) -> None:
    """Evaluate the best model of a run folder; print the table, write evaluation.json and evaluation.png.

    Raises:
        FileNotFoundError, ValueError: see `unept.cli.load_run`, `unept.data.build_dataset` and `evaluate_model`.
    """
    device = cli.choose_device(options.device)
    with distributed.process_group(device):
        _evaluate_run(options, device)


def _evaluate_run(options: EvaluateConfig, device: torch.device) -> None:
    trained, model = cli.load_run(options.run, device)
    dataset = trained.data.build(options.split, options.root)
    config = resolve(options.inference, model)
    tolerance = trained.boundary_tolerance if options.boundary_tolerance is None else options.boundary_tolerance
    reading: dict[str, Any] = {"workers": options.workers, "on_bad_sample": options.on_bad_sample}
    progress = distributed.is_main()
    with cli.out_of_memory("with whole images: --window sees them in parts, --window-batch fewer of these at once"):
        scores = evaluate_model(model, dataset, config, device, tolerance, progress, **reading)
    if not distributed.is_main():
        return
    print(f"{format_table(scores, dataset.classes)}\nProtocol: {config.describe()}.")
    record = {"split": options.split, "classes": list(dataset.classes), **scores, "inference": asdict(config)}
    json_path, picture_path = options.run / "evaluation.json", options.run / "evaluation.png"
    json_path.write_text(json.dumps(json_ready(record), indent=2) + "\n")
    drawing.class_bars(scores, dataset.classes, picture_path)
    print(f"Written: {json_path} and {picture_path}")


def main() -> None:
    """The command line."""
    cli.run(lambda: evaluate_run(tyro.cli(EvaluateConfig, prog="python -m unept.evaluate")))


if __name__ == "__main__":
    main()
