"""Look at what matplotlib draws."""

from collections.abc import Callable

from unept.pictures import drawing


def on_save(monkeypatch, look: Callable[[drawing.Figure], None]) -> None:
    """Call `look` with every figure of `unept.pictures.drawing`, before it is written to its file."""

    class Watched(drawing.Figure):
        def savefig(self, *args, **options):
            look(self)
            super().savefig(*args, **options)

    monkeypatch.setattr(drawing, "Figure", Watched)
