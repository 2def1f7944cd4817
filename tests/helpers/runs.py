"""Small networks with random weights, and run folders that hold them as `unept.train` would write them."""

import json
from pathlib import Path
from typing import Any

from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.model import UNEPT

CLASSES, PALETTE = ["sky", "sea", "sand"], [[90, 160, 230], [10, 40, 120], [220, 200, 120]]
SMALL: dict[str, Any] = {
    "backbone": "resnet10t",
    "pretrained_backbone": False,
    "d_model": 32,
    "num_heads": 2,
    "num_points": 2,
    "ffn_dim": 32,
    "dropout": 0.0,
}


def small_model(num_classes: int | None = None, **options: Any) -> UNEPT:
    """A network of `SMALL` size in evaluation mode, of `num_classes` or, for None, of `CLASSES`.

    `options` are those of `ModelConfig` that differ from `SMALL`.
    """
    arguments = ModelConfig(**{**SMALL, **options}).options()
    if num_classes is not None:
        return UNEPT(num_classes, **arguments).eval()
    return UNEPT(len(CLASSES), classes=CLASSES, palette=PALETTE, **arguments).eval()


def save_run(folder: Path, model: UNEPT, **data: Any) -> UNEPT:
    """Write a run folder with `model` and its config.json, of a dataset with options `data`; gives the model."""
    folder.mkdir(parents=True)
    config = TrainConfig(model=ModelConfig(**SMALL), data=DataConfig(**data), eval_every=50)
    (folder / "config.json").write_text(config.to_json())
    model.save_pretrained(folder / "model")
    return model


def save_evaluation(
    folder: Path, iou: list[float | None], classes: list[str] | None = None, split: str = "val"
) -> None:
    """Write a run folder with an evaluation.json of these IoU."""
    folder.mkdir(parents=True)
    known = [x for x in iou if x is not None]
    record = {"classes": classes or [f"class {i}" for i in range(len(iou))], "iou": iou, "split": split}
    (folder / "evaluation.json").write_text(json.dumps(record | {"mIoU": sum(known) / len(known)}))
