"""What `unept.Refiner` adds to another network: `python -m bench.refiner --data CAMVID`.

Trains a refiner on the training labels of CamVid, and refines with it what a network of bench.ablations predicts for
the validation images; `python -m bench.ablations --only DeepLabV3+ ...` trains that network into OUT/runs. Prints a
table, and writes it with the refiner to OUT/refiner/.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from unept import Refiner
from unept.config import TrainConfig
from unept.data.base import SegmentationDataset
from unept.evaluation.evaluator import PredictionMetrics
from unept.files import write_json
from unept.inference import InferenceConfig, predict_ids
from unept.model.boundary import Refinement
from unept.model.output import SegmentationModel
from unept.training.refiner import train_refiner

from .harness import DEVICE, device_name, revision
from .pictures import load_trained

STEPS = {
    "unrefined": None,
    "best, 1 px": Refinement(),
    "best, 2 px": Refinement(scale=2),
    "mean, 2 px": Refinement(scale=2, direction="mean"),
    "mean, 4 px": Refinement(scale=4, direction="mean"),
}


@dataclass
class Options:
    """Train a refiner and measure what it adds to another network."""

    data: Path
    """Folder of CamVid."""
    out: Path = Path("bench/results/ablations")
    """Folder of the ablations, with runs/."""
    name: str = "DeepLabV3+"
    """Name of the training whose predictions are refined."""
    width: int = 64
    """Channels of the refiner's branch and heads."""
    iterations: int = 1000
    """Steps of the refiner's training."""
    batch_size: int = 8
    """Crops per step."""
    crop_size: int = 160
    """Height and width of a crop."""


TOLERANCES = (3, 1)  # of the boundary F, in pixels
COLUMNS = {
    "mIoU": "mIoU",
    "pixAcc": "pixAcc",
    "boundary F, 3 px": "boundary_f",
    "boundary F, 1 px": "boundary_f_1px",
    "boundary IoU": "boundary_iou",
}


def measure(model: SegmentationModel, refiner: Refiner, dataset: SegmentationDataset) -> dict[str, dict[str, float]]:
    """Score the predictions of a network for a data set, as they are and refined by each of STEPS."""
    scores = {name: PredictionMetrics(dataset, TOLERANCES) for name in STEPS}
    for image, labels in tqdm(itertools.islice(dataset, len(dataset)), total=len(dataset), desc="evaluate"):
        images, truth = image.as_subclass(Tensor)[None].to(DEVICE), labels.as_subclass(Tensor)[None]
        ids = predict_ids(model, images, InferenceConfig())
        for name, refinement in STEPS.items():
            refined = ids if refinement is None else refiner.refine(ids, images, refinement)
            scores[name].update(refined.cpu(), truth)
    means = {name: of.means() for name, of in scores.items()}
    return {name: {title: of[key] for title, key in COLUMNS.items()} for name, of in means.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown, in percent."""
    names = list(next(iter(results.values())))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    return "\n".join(
        [*lines, *(f"| {row} | {' | '.join(f'{100 * v:.2f}' for v in of.values())} |" for row, of in results.items())]
    )


def main() -> int:
    """Train, measure and write."""
    options = tyro.cli(Options, prog="python -m bench.refiner")
    try:
        model = load_trained([options.name], options.out)[options.name]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = TrainConfig.from_json(options.out / "runs" / options.name / "config.json").data
    torch.manual_seed(0)
    refiner = Refiner(width=options.width, hidden=options.width).to(DEVICE)
    start = time.perf_counter()
    train_refiner(
        refiner,
        data.build("train", options.data),
        iterations=options.iterations,
        batch_size=options.batch_size,
        crop_size=options.crop_size,
        workers=1,
    )
    minutes = (time.perf_counter() - start) / 60
    results = measure(model, refiner, data.build("val", options.data))
    folder = options.out / "refiner"
    folder.mkdir(parents=True, exist_ok=True)
    refiner.save(folder / "refiner.safetensors")
    about = {"device": device_name(), "revision": revision(), "date": time.strftime("%Y-%m-%d"), "minutes": minutes}
    of = {name: getattr(options, name) for name in ("name", "width", "iterations", "batch_size", "crop_size")}
    write_json(folder / "results.json", {**about, **of, "scores": results})
    print(json.dumps(about), table(results), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
