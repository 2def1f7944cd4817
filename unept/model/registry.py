"""Models by name, as in timm."""

import fnmatch
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from .backbone import RESNET50, close_names, read_weights
from .finite import require_finite
from .network import UNEPT
from .transfer import load_fitting

PREFIX = "unept_"
# Short names and their backbones; the first two are the paper's (Sec. 4.2).
BACKBONES = {
    "unept_resnet50": RESNET50,
    "unept_deit_base": "deit_base_distilled_patch16_384",
    "unept_lite0": "tf_efficientnet_lite0",
    "unept_dinov3_base": "vit_base_patch16_dinov3",  # its weights come under the licence of DINOv3
}
# Names of whole sizes, smaller than the paper's: options of `UNEPT`. Their context queries see the encoder's output and
# their residual branches start at zero, since they learn faster then (bench/results/README.md).
SIZES: dict[str, dict[str, Any]] = {
    "unept_tiny": {
        "backbone": "tf_efficientnet_lite0",
        "d_model": 128,
        "num_heads": 4,
        "num_points": 8,
        "ffn_dim": 512,
        "context_queries": "spatial+encoder",
        "zero_init_residual": True,
        "boundary_upsampling": "subpixel",
        "boundary_features": "spatial+decoder",
    },
    "unept_small": {
        "backbone": "tf_efficientnet_lite0",
        "d_model": 256,
        "num_heads": 8,
        "num_points": 8,
        "ffn_dim": 1024,
        "context_queries": "spatial+encoder",
        "zero_init_residual": True,
        "boundary_upsampling": "subpixel",
        "boundary_features": "spatial+decoder",
    },
}
# Options that a trained network may be built without: of training, of its start, and names.
UNSEEN = {"backbone", "dropout", "zero_init_residual", "scale_encoding_std", "classes", "palette"}
UNSEEN |= {"num_classes", "preprocessing", "evaluation"}


def list_models(
    filter: str | Sequence[str] = "",
    *,
    exclude_filters: str | Sequence[str] = "",
    pretrained: bool = False,
    all_backbones: bool = False,
) -> list[str]:
    """List the names that `create_model` takes, sorted.

    Args:
        filter: list only the names that match this pattern, or one of these, with `*` and `?`.
        exclude_filters: leave out the names that match this pattern, or one of these.
        pretrained: list only the names whose backbone has pretrained weights in timm.
        all_backbones: list `unept_NAME` for every model of timm too; `create_model` refuses those that give no feature
            maps.
    """
    names = {*BACKBONES, *SIZES}
    if all_backbones:
        names |= {PREFIX + name for name in timm.list_models()}
    if wanted := _patterns(filter):
        names = {name for pattern in wanted for name in fnmatch.filter(names, pattern)}
    names -= {name for pattern in _patterns(exclude_filters) for name in fnmatch.filter(names, pattern)}
    if pretrained:
        names = {name for name in names if timm.models.is_model_pretrained(_backbone_of(name))}
    return sorted(names)


def _patterns(filters: str | Sequence[str]) -> list[str]:
    return [pattern for pattern in ([filters] if isinstance(filters, str) else filters) if pattern]


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int,
    pretrained_backbone: bool = False,
    checkpoint_path: str | Path | None = None,
    ignore_mismatched_sizes: bool = False,
    **options: Any,
) -> UNEPT:
    """Create a network.

    Args:
        name: one of `list_models()`, or `unept_` followed by the name of any model of timm, with or without a tag.
        pretrained: start from timm's pretrained weights of the backbone, downloaded from its hub. There are none of the
            other parts.
        num_classes: K.
        pretrained_backbone: the same, as `UNEPT` calls it.
        checkpoint_path: start from the weights of the whole network in this file (.safetensors, or a .pth or .pt of
            tensors, such as a run's checkpoints) or folder (of `save_pretrained`, or of a run); nothing is downloaded.
        ignore_mismatched_sizes: take the tensors of `checkpoint_path` that fit, and say in a warning what is left as it
            was initialised. With another `num_classes` this is a network to fine-tune.
        options: further arguments of `UNEPT`, such as `in_chans`, which replace those of a named size.

    Raises:
        ValueError: the name is unknown, the file holds another network, the config.json beside it says that its weights
            were trained with other options, or the options do not fit together.
        FileNotFoundError: there is no such file.
        ConnectionError: the backbone's weights cannot be downloaded.

    Example:
        >>> create_model("unept_lite0", pretrained=True, num_classes=11)
    """
    options = {**SIZES.get(name, {}), "backbone": _backbone_of(name), **options}
    weights = None if checkpoint_path is None else _weights_file(checkpoint_path)
    state = None if weights is None else read_weights(weights, "checkpoint_path")
    downloads = (pretrained or pretrained_backbone) and state is None
    model = UNEPT(num_classes, pretrained_backbone=downloads, **options)
    if weights is None or state is None:
        return model
    if ignore_mismatched_sizes:
        warnings.warn(f"{checkpoint_path}: {load_fitting(model, state).describe()}", stacklevel=2)
    else:
        _check_options(model, weights)
        _load(model, state, f"{checkpoint_path} does not fit {name} with {num_classes} classes")
    return model


def _weights_file(path: str | Path) -> Path:
    """The file that holds the weights of a folder; a file as it is."""
    places = [Path(path), Path(path) / "model.safetensors", Path(path) / "model" / "model.safetensors"]
    return next((place for place in places if place.is_file()), Path(path))


def _backbone_of(name: str) -> str:
    return SIZES[name]["backbone"] if name in SIZES else _backbone(name)


def _backbone(name: str) -> str:
    if name in BACKBONES:
        return BACKBONES[name]
    backbone = name.removeprefix(PREFIX)
    if name.startswith(PREFIX) and timm.is_model(backbone.split(".")[0]):
        return backbone
    hint = close_names(PREFIX + backbone, list_models(all_backbones=True))
    raise ValueError(
        f"there is no model {name!r}{hint}. unept.list_models() lists {', '.join([*BACKBONES, *SIZES])}; {PREFIX} "
        "followed by any name of timm.list_models() works too"
    )


def _check_options(model: UNEPT, weights: Path) -> None:
    """Raise ValueError if the config.json beside weights says that they were trained in another network.

    Shapes do not tell what the context queries see, for instance. Another number of classes is for `_load` to report.
    """
    config = weights.with_name("config.json")
    try:
        stored = json.loads(config.read_bytes()) if config.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{config} is damaged ({error}): restore it, or give the weights alone") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{config} is damaged (it must hold options by name): restore it, or give the weights alone")
    own = json.loads(json.dumps(model.options, default=str))
    differing = [k for k in own if k in stored and k not in UNSEEN and own[k] != stored[k]]
    if differing:
        raise ValueError(
            f"{weights} was trained with {', '.join(f'{k}={stored[k]!r}' for k in differing)}, and this network has "
            f"{', '.join(f'{k}={own[k]!r}' for k in differing)}: give the former as options, or "
            "use UNEPT.from_pretrained, which reads them from config.json; ignore_mismatched_sizes=True takes what fits"
        )


def _load(model: UNEPT, state: dict[str, Tensor], failure: str) -> None:
    require_finite(state, failure.partition(" does not fit ")[0])
    stored = state.get("classifier.weight")
    if stored is not None and len(stored) != model.num_classes:
        failure += f" (it holds {len(stored)} classes)"
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{failure}: give the options it was trained with, or ignore_mismatched_sizes=True to take what fits. "
            f"{error}"
        ) from error
