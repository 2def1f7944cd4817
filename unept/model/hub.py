"""Models on disk and on the Hugging Face hub: config.json, weights, and a README.md (the model card)."""

import contextlib
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..files import sha256
from ..validation import check_type
from .card import make_card
from .finite import require_finite
from .limits import check_sizes, least_parameters
from .transfer import as_dtype, load_fitting

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# The model that ships with the package: `unept_tiny`, trained on CamVid; its README.md says how, and what it reaches.
DEMO = Path(__file__).parents[1] / "assets" / "camvid_tiny"
# The key of config.json that holds the SHA-256 of model.safetensors.
DIGEST = "weights_sha256"
# Constructor's options that say where weights come from. A saved model carries its weights, and loads without them.
UNSAVED_OPTIONS = ("pretrained_backbone", "backbone_weights")


def saved_model(source: str | Path) -> Path | None:
    """The folder of a saved model that a source names without the run that trained it; `camvid_tiny` names `DEMO`.

    None where the source is something else: a run folder, a repository of the hub, or nothing.
    """
    folder = Path(source)
    if str(source) == DEMO.name and not folder.exists():
        return DEMO
    return folder if (folder / "model.safetensors").is_file() else None


class NotAModel(FileNotFoundError):
    """A folder or repository is there, but holds no model."""


class DamagedWeights(ValueError):
    """The weights of a saved model are not those that were saved with its config.json."""


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
    classes: Any
    """Names of the K classes, a list."""
    palette: Any
    """(r, g, b) of each class, a list of lists."""
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
        self.options.update(classes=self.classes, palette=self.palette)
        super()._save_pretrained(save_directory)
        self.options.update(preprocessing=self.preprocessing, evaluation=self.evaluation)
        self.options[DIGEST] = sha256(save_directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any):
        """Load a model that `save_pretrained` or `push_to_hub` wrote, in evaluation mode on the CPU.

        Its config.json is data: values are checked, nothing that it names is opened, and no weights but its own are
        fetched.

        Args:
            pretrained_model_name_or_path: the folder, or ORG/NAME of the repository on the Hugging Face hub, or
                `camvid_tiny`, the demo model that ships with the package.
            options: of the constructor, instead of the stored ones; of `huggingface_hub` (`revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`); and these:
                `dtype` (or `torch_dtype`): converts the weights, such as `torch.float16` or `"bfloat16"`.
                `ignore_mismatched_sizes`: takes the tensors that fit, and says in a warning what is left as it was
                initialised. With another `num_classes` this is a model to fine-tune on other classes.

        Raises:
            FileNotFoundError: there is no such folder or repository, or it holds no model.
            ValueError: config.json or the weights are damaged, or hold values that no model has; no weight fits; or
                there is no such dtype.
            RuntimeError: weights do not fit, and `ignore_mismatched_sizes` was not given.
        """
        source = str(pretrained_model_name_or_path)
        source = str(saved_model(source) or source)
        is_file = Path(source).is_file()
        if is_file or not (Path(source).exists() or REPOSITORY.fullmatch(source)):
            raise FileNotFoundError(
                f"{source} {'is a file' if is_file else 'does not exist'}: give a folder that save_pretrained wrote, "
                "or ORG/NAME of a repository on the Hugging Face hub"
            )
        try:
            return super().from_pretrained(source, **options)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"config.json of {source} is damaged ({error}): restore it") from error
        except AttributeError as error:
            if error.name != "items":  # what the reader of huggingface_hub asks for of anything
                raise
            raise ValueError(
                f"config.json of {source} is damaged: it must hold the options of a model by name; restore it"
            ) from error
        except OSError as error:
            if Path(source).exists() or isinstance(error, NotAModel):
                raise
            reason = str(error).partition("\n")[0]
            raise FileNotFoundError(
                f"there is no folder {source}, and no model of that name could be loaded from the Hugging Face hub "
                f"({reason}): check the name and the connection"
            ) from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | None = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **options,
    ):
        """Load a model; missing weights are an error, not random numbers, and so is a missing config.json.

        The stored mean and standard deviation count, not what the installed version of timm has for the backbone.
        """
        for name in UNSAVED_OPTIONS:  # a file that somebody else wrote must not open or fetch others
            options.pop(name, None)
        if "num_classes" not in options or config is None:
            raise NotAModel(
                f"{model_id} has no config.json of a model that can be read: give a folder that save_pretrained wrote "
                "(model/ in a folder of unept.train), or ORG/NAME of one that push_to_hub wrote"
            )
        chosen = as_dtype(dtype or torch_dtype or torch.float32)
        other_classes = options["num_classes"] != config.get("num_classes")
        other_channels = options.get("in_chans", 3) != config.get("in_chans", 3)
        stale = ("classes", "palette") * other_classes + ("mean", "std") * other_channels
        for name in stale:  # those of the stored model are of other classes or channels
            if options.get(name) == config.get(name):
                options.pop(name, None)
        strict = strict and not ignore_mismatched_sizes
        try:
            _check_stored(Path(model_id), options, config, complete=strict)
            with contextlib.redirect_stdout(None):  # PyTorchModelHubMixin announces local folders
                model = super()._from_pretrained(model_id=model_id, strict=strict, **options)
            stored = dict(config.get("preprocessing", {}))
            for name in ("mean", "std"):  # the stored ones are of other channels, or the caller gives others
                if model.in_chans != config.get("in_chans", 3) or options.get(name) != config.get(name):
                    stored.pop(name, None)
            model.preprocessing.update(stored)
            if not other_classes:
                model.evaluation.update(config.get("evaluation", {}))
            model.set_normalization(model.preprocessing["mean"], model.preprocessing["std"])
        except ValueError as error:
            if not strict or isinstance(error, DamagedWeights):
                raise
            raise ValueError(f"config.json of {model_id} cannot be used: {error}") from error
        except RuntimeError as error:
            changed = [f"{name}={value}" for name, value in options.items() if name in config and value != config[name]]
            if not changed or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"the weights of {model_id} do not fit a network with {', '.join(changed)}: "
                f"ignore_mismatched_sizes=True takes those that fit. {error}"
            ) from error
        require_finite(model.state_dict(), f"{model_id}/model.safetensors")
        return model if chosen == torch.float32 else model.to(chosen)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Load all weights or, if not `strict`, those that fit; they must be those of the config.json beside them."""
        _check_digest(Path(model_file))
        if strict:
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        transfer = load_fitting(model, load_file(model_file, device=map_location))
        if transfer.reshaped or transfer.new or transfer.unused:
            warnings.warn(f"{model_file}: {transfer.describe()}", stacklevel=2)
        return model.eval()

    def generate_model_card(self, repo_id: str | None = None, **metadata: Any) -> ModelCard:
        """Make the README.md of a saved model: its classes, how it sees images, what it reached, how to use it.

        Args:
            repo_id: what the example of use loads; None leaves a placeholder.
            metadata: more fields of `huggingface_hub.ModelCardData`, such as `license="cc-by-4.0"` or
                `datasets=["org/name"]`; they take precedence.
        """
        shared = self._hub_mixin_info.model_card_data.to_dict()
        return make_card(self, {**shared, **metadata}, repo_id)

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


def _check_digest(weights: Path) -> None:
    """Raise DamagedWeights if a file of weights is not the one whose SHA-256 config.json holds, if it holds one."""
    config = weights.with_name("config.json")
    expected = json.loads(config.read_text()).get(DIGEST) if config.is_file() else None  # older versions had none
    if expected is not None and sha256(weights) != expected:
        raise DamagedWeights(
            f"{weights} is damaged: its SHA-256 is not the {DIGEST} in config.json. Restore both files or train again; "
            f"if you have changed the weights on purpose, remove {DIGEST} from config.json"
        )


def _check_stored(folder: Path, options: Mapping[str, Any], config: Mapping[str, Any], complete: bool) -> None:
    """Raise ValueError for parts of config.json that no model has; the model checks its options itself.

    `complete`: whether all weights of the model must be in the folder.
    """
    for part in ("preprocessing", "evaluation"):
        check_type(part, config.get(part, {}), dict)
    weights = folder / "model.safetensors"
    numbers = {name: value for name, value in options.items() if type(value) is int}
    check_sizes(numbers)
    if not (complete and weights.is_file()):
        return
    try:
        with safe_open(weights, "pt") as file:
            stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedWeights(f"{weights} is damaged ({error}): restore it or train again") from error
    if (least := least_parameters(numbers)) > stored:
        raise ValueError(
            f"it describes a network of at least {least} parameters, but model.safetensors holds {stored}: restore the "
            "file that was saved with the weights"
        )
