"""Keep parts of the network as they are: their weights and the statistics of their batch normalisation."""

from torch import nn

from ..model.output import TrainableModel
from ..recipe import RecipeConfig


def freeze(model: TrainableModel, recipe: RecipeConfig) -> None:
    """Stop the training of what `freeze_backbone` and `freeze_stages` name.

    Raises:
        ValueError: the backbone has fewer stages.
    """
    backbone = model.backbone
    if recipe.freeze_backbone:
        backbone.requires_grad_(False)
    elif recipe.freeze_stages:
        stages = backbone.layers(coarse=True)
        count = max(stages.values())
        if recipe.freeze_stages > count:
            raise ValueError(
                f"freeze_stages is {recipe.freeze_stages}, but the backbone has {count} stages after its stem: give "
                "fewer, or --freeze-backbone"
            )
        for name, parameter in backbone.features.named_parameters():
            if stages[name] <= recipe.freeze_stages:
                parameter.requires_grad_(False)


def training_mode(model: TrainableModel) -> None:
    """Put a model into training mode, but for the modules none of whose parameters is trained."""
    model.train()
    for module in model.modules():
        if is_frozen(module):
            module.eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none of them is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)
