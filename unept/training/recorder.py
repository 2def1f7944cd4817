"""Write training records: metrics.jsonl, TensorBoard events and curves.png."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..files import append_json_line, named_errors, read_json_lines, write_json_lines
from ..pictures import drawing
from .trackers import Tracker


class Recorder:
    """Append records to a run folder.

    Records that an interrupted run wrote after its last checkpoint are removed first: the continued run writes them
    again.

    Args:
        folder: the run folder.
        step: the last step that the run has completed.
        evaluated: whether the evaluation that is due at this step, if any, has been completed.
        tracker: gets the numbers of each record too.

    Attributes:
        lines: the records of metrics.jsonl so far, one dictionary each.
    """

    def __init__(self, folder: Path, step: int, *, evaluated: bool = True, tracker: Tracker | None = None):
        def completed(line: dict[str, Any]) -> bool:
            at = line.get("step")
            return isinstance(at, int) and (at < step or (at == step and (evaluated or "mIoU" not in line)))

        self.folder, self.tracker = folder, tracker
        self.lines = [line for line in read_json_lines(folder / "metrics.jsonl") if completed(line)]
        write_json_lines(folder / "metrics.jsonl", self.lines)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Append a record, which must have the key `step`; its numbers also become TensorBoard events.

        Raises:
            OSError: the disk is full or not writable; the records that were there before are intact.
        """
        self.lines.append(line)
        append_json_line(self.folder / "metrics.jsonl", line)
        numbers = {name: v for name, v in line.items() if isinstance(v, (int, float)) and name != "step"}
        with named_errors(self.folder / "events.out.tfevents"):
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, line["step"])
            self._writer.flush()  # a process that is killed closes nothing
        if self.tracker is not None:
            self.tracker.log(line["step"], numbers)

    def draw_curves(self) -> None:
        """Draw the records so far into curves.png."""
        drawing.curves(self.lines, self.folder / "curves.png")

    def close(self) -> None:
        """Finish the TensorBoard events, and the tracker's record."""
        self._writer.close()
        if self.tracker is not None:
            self.tracker.close()
