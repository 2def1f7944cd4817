"""What a run writes down while it trains: metrics.jsonl, TensorBoard events and curves.png."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..evaluate import json_ready
from ..pictures import drawing
from .checkpoint import write_atomically


class Recorder:
    """Appends to the records in a run folder; what an interrupted run wrote after `step` is taken out.

    Args:
        folder: the run folder.
        step: the last step that the run has done.

    Attributes:
        lines: of metrics.jsonl, so far.
    """

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        self.lines = [line for line in read_lines(folder / "metrics.jsonl") if line["step"] <= step]
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, which has `step`."""
        self.lines.append(line)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(json_ready(line)) + "\n")
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def draw_curves(self) -> None:
        """Draw the lines so far into curves.png."""
        drawing.curves(self.lines, self.folder / "curves.png")

    def close(self) -> None:
        """Finish the TensorBoard events."""
        self._writer.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without the torn last line that a killed process may leave."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
