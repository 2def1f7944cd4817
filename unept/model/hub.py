"""Models on disk and on the Hugging Face hub: config.json, weights, and a README.md (the model card).

Nothing is stated in a card that is not known.
"""

import contextlib
import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin
from safetensors import safe_open

from ..validation import check_type
from .finite import require_finite
from .limits import check_sizes, least_parameters

PAPER = "https://arxiv.org/abs/2107.14209"
# Of the scores that a card lists: the key in `evaluation`, the metric's type on the hub, and its name in a sentence.
METRICS = (
    ("mIoU", "mean_iou", "mIoU"),
    ("pixAcc", "pixel_accuracy", "pixel accuracy"),
    ("boundary_f", "boundary_f", "boundary F"),
    ("boundary_iou", "boundary_iou", "Boundary IoU"),
)
# Constructor's options that say where weights come from. A saved model carries its weights, and loads without them.
UNSAVED_OPTIONS = ("pretrained_backbone", "backbone_weights")


class HubMixin(
    PyTorchModelHubMixin,
    library_name="unept",
    tags=["semantic-segmentation"],
    pipeline_tag="image-segmentation",
):
    """Saves, loads and shares a segmentation model: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    The class that inherits it is an `nn.Module`. The arguments of its constructor, `num_classes` and `backbone` among
    them, go into config.json as they are; so do `preprocessing` and `evaluation`.
    """

    num_classes: int
    """K."""
    classes: list[str]
    """Names of the K classes."""
    preprocessing: dict[str, Any]
    """How images are to be given and seen; `mean` and `std` of RGB in [0, 1] are among its keys."""
    evaluation: dict[str, Any]
    """What the model reached: `dataset` and `dataset_title`, `split`, `step`, `images`, and scores; empty if nobody has
    measured it."""

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise uint8 images with this mean and deviation of RGB in [0, 1]; called when a model is loaded."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor, as config.json holds them."""
        config = self._hub_mixin_config
        assert isinstance(config, dict)
        return config

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights; PyTorchModelHubMixin writes `options` into config.json afterwards."""
        for name in UNSAVED_OPTIONS:
            self.options.pop(name, None)
        self.options.update(preprocessing=self.preprocessing, evaluation=self.evaluation)
        super()._save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any):
        """Load a model that `save_pretrained` or `push_to_hub` wrote.

        Its config.json is data: values are checked, nothing that it names is opened, and no weights but its own are
        fetched.

        Args:
            pretrained_model_name_or_path: the folder, or `ORG/NAME` of the repository on the Hugging Face hub.
            options: arguments of `huggingface_hub.PyTorchModelHubMixin.from_pretrained` (`revision`, `token`, ...).

        Returns:
            The model on the CPU, in evaluation mode.

        Raises:
            ValueError: config.json or the weights are damaged, or hold values that no model has.
            FileNotFoundError: there is no config.json.
        """
        damaged = f"config.json of {pretrained_model_name_or_path} is damaged"
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{damaged} ({error}): restore it") from error
        except AttributeError as error:
            if error.name != "items":  # what the reader of huggingface_hub asks for of anything
                raise
            raise ValueError(f"{damaged}: it must hold the options of a model by name; restore it") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, strict: bool = True, **options):
        """Load a model; missing weights are an error, not random numbers, and so is a missing config.json.

        The stored mean and standard deviation count, not what the installed version of timm has for the backbone.
        """
        for name in UNSAVED_OPTIONS:  # a file that somebody else wrote must not open or fetch others
            options.pop(name, None)
        if "num_classes" not in options:
            raise FileNotFoundError(
                f"{model_id} has no config.json of a model that can be read: give a folder that save_pretrained wrote "
                "(model/ in a folder of unept.train), or ORG/NAME of one that push_to_hub wrote"
            )
        try:
            _check_stored(Path(model_id), options, config or {})
            with contextlib.redirect_stdout(None):  # PyTorchModelHubMixin announces local folders
                model = super()._from_pretrained(model_id=model_id, strict=strict, **options)
            model.preprocessing.update((config or {}).get("preprocessing", {}))
            model.evaluation.update((config or {}).get("evaluation", {}))
            model.set_normalization(model.preprocessing["mean"], model.preprocessing["std"])
        except ValueError as error:
            raise ValueError(f"config.json of {model_id} cannot be used: {error}") from error
        require_finite(model.state_dict(), f"{model_id}/model.safetensors")
        return model

    def generate_model_card(self, repo_id: str | None = None, **metadata: Any) -> ModelCard:
        """Make the README.md of a saved model: its classes, how it sees images, what it reached, how to use it.

        Args:
            repo_id: what the example of use loads; None leaves a placeholder.
            metadata: more fields of `huggingface_hub.ModelCardData`, such as `license="cc-by-4.0"` or
                `datasets=["org/name"]`; they take precedence.
        """
        name = f"unept_{self.options['backbone']}"
        shared = self._hub_mixin_info.model_card_data.to_dict()
        fields = {"model_name": name, "eval_results": _results(self.evaluation) or None, **shared, **metadata}
        data = ModelCardData(**copy.deepcopy(fields))
        sections = [
            f"# {name}",
            f"Semantic segmentation into {self.num_classes} classes with UN-EPT ([paper]({PAPER})), backbone "
            f"`{self.options['backbone']}` of timm.",
            "## Use",
            _usage(repo_id),
            *_evaluation(self.evaluation),
            "## Classes",
            _classes(self.classes, self.evaluation.get("iou")),
            "## Preprocessing",
            "\n".join(f"- `{key}`: {value}" for key, value in self.preprocessing.items()),
        ]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        """Save the model into a repository of the Hugging Face hub, in one commit, with a model card.

        Args:
            repo_id: `ORG/NAME`; it is created if it does not exist.
            model_card_kwargs: arguments of `generate_model_card`.
            options: arguments of `huggingface_hub.PyTorchModelHubMixin.push_to_hub` (`private`, `token`,
                `commit_message`, ...).

        Returns:
            URL of the commit.
        """
        card = {"repo_id": repo_id, **(model_card_kwargs or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)


def _check_stored(folder: Path, options: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise ValueError for parts of config.json that no model has; the model checks its options itself."""
    for part in ("preprocessing", "evaluation"):
        check_type(part, config.get(part, {}), dict)
    weights = folder / "model.safetensors"
    numbers = {name: value for name, value in options.items() if type(value) is int}
    check_sizes(numbers)
    if not weights.is_file():
        return
    with safe_open(weights, "pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    if (least := least_parameters(numbers)) > stored:
        raise ValueError(
            f"it describes a network of at least {least} parameters, but model.safetensors holds {stored}: restore the "
            "file that was saved with the weights"
        )


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
