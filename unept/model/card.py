"""The README.md of a saved model, with the fields that the Hugging Face hub reads. What is not known is not in it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

PAPER = "https://arxiv.org/abs/2107.14209"
# Of the scores that a card lists: the key in `evaluation`, the metric's type on the hub, and its name in a sentence.
METRICS = (
    ("mIoU", "mean_iou", "mIoU"),
    ("pixAcc", "pixel_accuracy", "pixel accuracy"),
    ("boundary_f", "boundary_f", "boundary F"),
    ("boundary_iou", "boundary_iou", "Boundary IoU"),
)


def make_card(model: Any, fields: Mapping[str, Any], repo_id: str | None) -> ModelCard:
    """Make the card of a model.

    Args:
        model: a model with the attributes of `unept.model.hub.HubMixin`.
        fields: fields of `huggingface_hub.ModelCardData`, which take precedence over those that follow from the model.
        repo_id: what the example of use loads; None leaves a placeholder.
    """
    backbone, evaluation = model.options["backbone"], model.evaluation
    name = f"unept_{backbone}"
    known = {"model_name": name, "eval_results": _results(evaluation) or None, **fields}
    data = ModelCardData(**copy.deepcopy(known))
    sections = [
        f"# {name}",
        f"Semantic segmentation into {model.num_classes} classes with UN-EPT ([paper]({PAPER})), backbone `{backbone}` "
        "of timm.",
        "## Use",
        _usage(repo_id),
        *_evaluation(evaluation),
        "## Classes",
        _classes(model.classes, evaluation.get("iou")),
        "## Preprocessing",
        "\n".join(f"- `{key}`: {value}" for key, value in model.preprocessing.items()),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """Scores for the model index of the hub, which needs to know the data set."""
    if "dataset" not in evaluation:
        return []
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=evaluation["dataset"],
            dataset_name=_title(evaluation),
            dataset_split=evaluation.get("split"),
            metric_type=kind,
            metric_name=key,
            metric_value=round(evaluation[key], 4),
        )
        for key, kind, _ in METRICS
        if evaluation.get(key) is not None
    ]


def _title(evaluation: Mapping[str, Any]) -> str:
    """Name of the data set in a sentence."""
    return evaluation.get("dataset_title", evaluation["dataset"])


def _usage(repo_id: str | None) -> str:
    lines = [
        "```python",
        "from unept import Segmenter",
        f'segmenter = Segmenter("{repo_id or "THIS_FOLDER_OR_REPOSITORY"}")',
        'result = segmenter("image.jpg")  # or a PIL image, an array (H, W, 3), a tensor (3, H, W), a list of them',
        "print(result.classes[result.ids[0, 0]], result.confidence[0, 0])",
        'result.overlay().save("overlay.png")',
        "```",
    ]
    return "\n".join(lines)


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    """A heading and a sentence or two; nothing without scores."""
    scores = [f"{name} {100 * evaluation[key]:.2f} %" for key, _, name in METRICS if evaluation.get(key) is not None]
    if "boundary_tolerance" in evaluation:
        within = f" (within {evaluation['boundary_tolerance']} px)"
        scores = [score + within if score.startswith("boundary F ") else score for score in scores]
    if not scores:
        return []
    where = [f"{evaluation['images']} images" if "images" in evaluation else ""]
    if "dataset" in evaluation:
        where.append(f"of {_title(evaluation)}")
    if "split" in evaluation:
        where.append(f"(split `{evaluation['split']}`)")
    sentences = [" ".join(["On", *filter(None, where)]) + ": " if any(where) else "", ", ".join(scores)]
    sentences.append(".")
    if "step" in evaluation:
        sentences.append(
            f" Of the run's evaluations this one, after {evaluation['step']} steps, had the best mIoU: the split chose "
            "the model."
        )
    return ["## Evaluation", "".join(sentences)]


def _classes(classes: Sequence[str], iou: Sequence[float | None] | None) -> str:
    """A table of ids and names, with the IoU of each class where it is known."""
    cells = [[str(k), name.replace("|", "\\|")] for k, name in enumerate(classes)]
    header = ["id", "class"]
    if iou is not None:
        header.append("IoU")
        cells = [
            [*row, "-" if value is None else f"{100 * value:.2f} %"] for row, value in zip(cells, iou, strict=True)
        ]
    rows = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
