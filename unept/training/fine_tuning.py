"""Start from a trained model: the options of its network, and its weights as far as they fit."""

import dataclasses
from typing import Any

import torch

from .. import distributed
from ..config import ModelConfig
from ..model.backbone import own_normalization
from ..model.transfer import load_fitting
from ..pretrained import load
from ..recipe import RecipeConfig

CPU = torch.device("cpu")


def network_of(source: str) -> ModelConfig:
    """Return the options of the network of a trained model, whose weights are its own.

    Args:
        source: what `unept.pretrained.load` takes.

    Raises:
        FileNotFoundError, ValueError: see `unept.pretrained.load`.
    """
    model = load(source, CPU)
    options, own = dict(model.options), own_normalization(model.options["backbone"], model.in_chans)
    for name, values in zip(("mean", "std"), own, strict=True):
        if model.preprocessing[name] != [*values]:  # set after the model was made, or another timm's
            options[name] = model.preprocessing[name]
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    kept: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in options.items() if name in names
    }
    return ModelConfig(**{**kept, "pretrained_backbone": False, "backbone_weights": None})


def initialise(model: Any, source: str) -> str:
    """Take every tensor of a trained model that fits; the classifier only where the classes are the same.

    Args:
        model: the network to train, a `UNEPT`.
        source: what `unept.pretrained.load` takes.

    Returns:
        A line that says what was taken, and what was left.

    Raises:
        FileNotFoundError, ValueError: see `unept.pretrained.load` and `unept.model.transfer.load_fitting`.
    """
    trained = load(source, CPU)
    same = list(trained.classes) == list(model.classes)
    try:
        transfer = load_fitting(model, trained.state_dict(), anew=() if same else ("classifier.",))
    except ValueError as error:
        raise ValueError(f"init_from {source}: {error}") from error
    return f"Started from {source}: {transfer.describe()}"


def prepare_model(model: Any, recipe: RecipeConfig, resumes: bool) -> Any:
    """Give a new network the weights of `init_from`, unless a checkpoint follows, and set gradient checkpointing."""
    if recipe.init_from and not resumes:
        started = initialise(model, recipe.init_from)
        if distributed.is_main():
            print(started)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()
    return model
