"""The README.md of a saved model, as the Hugging Face hub reads it: nothing is stated that is not known."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

if TYPE_CHECKING:
    from .network import UNEPT

PAPER = "https://arxiv.org/abs/2107.14209"
DATASETS = {
    "shapes": "shapes (made in memory by unept)",
    "camvid": "CamVid",
    "folder": "a folder of images",
    "ade20k": "ADE20K",
    "cityscapes": "Cityscapes",
    "pascal_context": "PASCAL-Context",
}
METRICS = {"mIoU": "mean_iou", "pixAcc": "pixel_accuracy", "boundary_f": "boundary_f"}  # name of ours: type on the hub


def model_card(
    model: "UNEPT", base: ModelCardData, repo_id: str | None = None, metadata: Mapping[str, Any] | None = None
) -> ModelCard:
    """The card of a model.

    Args:
        model: its `evaluation` may be empty.
        base: metadata that all models share.
        repo_id: what the example of use loads; None: a placeholder.
        metadata: more fields of `ModelCardData`; they count before those of `base`.
    """
    name = f"unept_{_config(model)['backbone']}"
    fields = {"model_name": name, "eval_results": _results(model.evaluation) or None, **base.to_dict()}
    fields |= metadata or {}
    data = ModelCardData(**copy.deepcopy(fields))
    sections = [
        f"# {name}",
        f"Semantic segmentation into {model.num_classes} classes with UN-EPT ([paper]({PAPER})), backbone "
        f"`{_config(model)['backbone']}` of timm.",
        "## Use",
        _usage(repo_id),
        *_evaluation(model.evaluation),
        "## Classes",
        _classes(model.classes, model.evaluation.get("iou")),
        "## Preprocessing",
        "\n".join(f"- `{key}`: {value}" for key, value in model.preprocessing.items()),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _config(model: "UNEPT") -> dict[str, Any]:
    return model._hub_mixin_config  # type: ignore[return-value]


def _results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The scores for the hub's model index, which wants to know the data set."""
    if "dataset" not in evaluation:
        return []
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=evaluation["dataset"],
            dataset_name=DATASETS.get(evaluation["dataset"], evaluation["dataset"]),
            dataset_split=evaluation.get("split"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(evaluation[name], 4),
        )
        for name, kind in METRICS.items()
        if evaluation.get(name) is not None
    ]


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
    """A heading and a sentence or two, or nothing."""
    scores = [
        f"{label} {100 * evaluation[name]:.2f} %"
        for name, label in (("mIoU", "mIoU"), ("pixAcc", "pixel accuracy"), ("boundary_f", "boundary F"))
        if evaluation.get(name) is not None
    ]
    if not scores:
        return []
    where = [f"{evaluation['images']} images" if "images" in evaluation else ""]
    if "dataset" in evaluation:
        where.append(f"of {DATASETS.get(evaluation['dataset'], evaluation['dataset'])}")
    if "split" in evaluation:
        where.append(f"(split `{evaluation['split']}`)")
    sentences = [" ".join(["On", *filter(None, where)]) + ": " if any(where) else "", ", ".join(scores)]
    if "boundary_f" in evaluation and "boundary_tolerance" in evaluation:
        sentences.append(f" (within {evaluation['boundary_tolerance']} px)")
    sentences.append(".")
    if "step" in evaluation:
        sentences.append(
            f" Of the run's evaluations this one, after {evaluation['step']} steps, had the best mIoU: the split chose "
            "the model."
        )
    return ["## Evaluation", "".join(sentences)]


def _classes(classes: Sequence[str], iou: Sequence[float | None] | None) -> str:
    """A table: id and name, and the IoU where there is one."""
    cells = [[str(k), name.replace("|", "\\|")] for k, name in enumerate(classes)]
    header = ["id", "class"]
    if iou is not None:
        header.append("IoU")
        cells = [
            [*row, "-" if value is None else f"{100 * value:.2f} %"] for row, value in zip(cells, iou, strict=True)
        ]
    rows = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
