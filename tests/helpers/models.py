"""Stand-ins for a network: what `unept.model.output.SegmentationModel` asks for, but for `forward`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unept.colors import default_palette


class StandIn(nn.Module):
    """A model that sees images as they are; a subclass has the `forward`.

    Args:
        classes: names of the classes, or their number.
        refines: whether `forward` predicts boundaries and directions.
    """

    def __init__(self, classes: int | Sequence[str], refines: bool = True):
        super().__init__()
        self.classes = [f"class {k}" for k in range(classes)] if isinstance(classes, int) else list(classes)
        self.num_classes = len(self.classes)
        self.palette = [list(color) for color in default_palette(self.num_classes)]
        self.refines = refines
        self.preprocessing: dict[str, Any] = {}

    def normalized(self, images: Tensor) -> Tensor:
        return images if images.is_floating_point() else images.float()


def missing_members(model: nn.Module, protocol: type) -> list[str]:
    """What a Protocol names and a model does not have. (`isinstance` would not find the buffers of a module.)"""
    parts = [part for part in protocol.__mro__ if getattr(part, "_is_protocol", False) and part.__module__ != "typing"]
    names = {name for part in parts for name in (*part.__annotations__, *vars(part))}
    return sorted(name for name in names if not name.startswith("_") and not hasattr(model, name))
