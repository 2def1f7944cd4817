"""Make the demo model that ships with the package from a run: `python -m bench.demo_model RUN --root CAMVID`.

The weights are rounded to float16, and the scores in the card are measured after that.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from unept import cli
from unept.config import TrainConfig
from unept.evaluation.evaluator import evaluate_model, format_table
from unept.files import read_json_lines
from unept.inference import InferenceOptions, resolve
from unept.model.boundary import StepDirection
from unept.model.network import UNEPT
from unept.presets import PRESETS
from unept.pretrained import DEMO, load_run
from unept.training.checkpoint import save_model

# Options that do not say what was trained.
INCIDENTAL = {"out", "resume", "root", "device", "workers", "backbone_weights", "pretrained_backbone"}
INCIDENTAL |= {"eval_every", "checkpoint_every", "log_every", "num_samples", "init_from", "seed"}
INCIDENTAL |= {"refine_scale", "refine_steps", "refine_direction"}
ABOUT = """
## Training and use

The training images are the 367 of CamVid (G. J. Brostow, J. Fauqueur and R. Cipolla, "Semantic object classes in video:
a high-definition ground truth database", Pattern Recognition Letters 30(2), 2009), 480x360 in 11 classes. The backbone
started from timm's ImageNet weights of `{backbone}`. CamVid is distributed for research: use this model for research,
and ask the authors of the data about anything else.

The run was `python -m unept.train camvid --root CAMVID` with seed {seed}{changes}{continued}.
`python -m bench.demo_model` rounded the weights to float16 and then measured the scores above.
"""


@dataclass
class Options:
    """Make the demo model from a run on CamVid."""

    run: tyro.conf.Positional[Path]
    """Run folder that unept.train wrote."""
    root: Path | None = None
    """Folder of CamVid. None: as in training."""
    out: Path = DEMO
    """Folder for the model."""
    refine_scale: int | None = None
    """Length of a step of the refinement in pixels, which the model keeps. None: as in training."""
    refine_steps: int | None = None
    """Number of steps of the refinement, which the model keeps. None: as in training."""
    refine_direction: StepDirection | None = None
    """Direction of the steps of the refinement, which the model keeps. None: as in training."""


def round_weights(model: UNEPT) -> None:
    """Round the weights and statistics of a model to float16, which float32 then holds exactly."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())


def changes(config: TrainConfig) -> str:
    """The options in which a run differs from the preset camvid, in words."""

    def flatten(config: TrainConfig) -> dict[str, Any]:
        options = dataclasses.asdict(config)
        return {**options.pop("model"), **options.pop("data"), **options.pop("recipe"), **options}

    preset, run = flatten(PRESETS["camvid"]()), flatten(config)
    listed = [f"{name} {run[name]}" for name in run if name not in INCIDENTAL and run[name] != preset[name]]
    return f" and {', '.join(listed)}" if listed else ""


def continued(run: Path) -> str:
    """Where a run went on with other options (`history.jsonl`), in words."""
    parts = []
    for line in read_json_lines(run / "history.jsonl"):
        changed = {name: values for name, values in line.get("changed", {}).items() if name not in INCIDENTAL}
        if changed:
            listed = ", ".join(f"{name} {now} in place of {before}" for name, (before, now) in changed.items())
            parts.append(f"; it was continued at step {line['step']} with {listed}")
    return "".join(parts)


def make(options: Options) -> None:
    """Write the demo model and its card, and print its scores."""
    config, model = load_run(options.run, torch.device("cpu"))
    dataset = config.data.build("val", options.root)
    for name in ("refine_scale", "refine_steps", "refine_direction"):
        if (value := getattr(options, name)) is not None:
            setattr(config, name, value)
    config.amp = "auto"  # the model may run on a CPU without bfloat16
    model.preprocessing.pop("amp", None)
    model.preprocessing.update(config.inference().protocol())
    inference = resolve(InferenceOptions(), model)
    round_weights(model)
    scores = evaluate_model(model, dataset, inference, torch.device("cpu"), config.boundary_tolerance, progress=True)
    print(format_table(scores, dataset.classes))
    step = model.evaluation["step"]
    save_model(model.half(), options.out, config, step, scores)
    card = options.out / "README.md"
    about = ABOUT.format(
        backbone=config.model.backbone, seed=config.seed, changes=changes(config), continued=continued(options.run)
    )
    card.write_text(card.read_text() + about)


if __name__ == "__main__":
    cli.run(lambda: make(tyro.cli(Options, prog="python -m bench.demo_model")))
