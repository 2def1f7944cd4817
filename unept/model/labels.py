"""The classes that a network predicts: their number, names and colours."""

from collections.abc import Sequence
from typing import Any

from ..colors import default_palette


class Labelled:
    """A network with `num_classes`, `classes` and `palette`; `UNEPT` inherits it.

    Names and colours may be set to others of the same number; `save_pretrained` keeps them.
    """

    num_classes: int
    """K."""

    def set_labels(
        self, num_classes: int, classes: Sequence[str] | None, palette: Sequence[Sequence[int]] | None
    ) -> None:
        """Set all three; None gives names and colours by default."""
        self.num_classes = num_classes
        self.classes = list(classes) if classes is not None else [f"class {k}" for k in range(num_classes)]
        self.palette = [list(color) for color in palette or default_palette(num_classes)]

    @property
    def classes(self) -> list[str]:
        """Names of the K classes."""
        return self._classes

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        check_labels(self.num_classes, classes=names)
        self._classes = list(names)

    @property
    def palette(self) -> list[list[int]]:
        """(r, g, b) of each class, from 0 to 255."""
        return self._palette

    @palette.setter
    def palette(self, colors: Sequence[Sequence[int]]) -> None:
        check_labels(self.num_classes, palette=colors)
        self._palette = [list(color) for color in colors]


def check_labels(num_classes: int, **listed: Sequence[Any] | None) -> None:
    """Raise ValueError for a list with another number of entries than there are classes, or for what is no color."""
    for name, entries in listed.items():
        if entries is not None and len(entries) != num_classes:
            raise ValueError(f"num_classes is {num_classes}, but {name} has {len(entries)} entries; give one per class")
    for color in listed.get("palette") or ():
        if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
            raise ValueError(f"palette has the color {color}; a color is r, g, b, each from 0 to 255")
