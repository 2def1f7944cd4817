"""Progress on a terminal and in a file."""

import io
import sys

from unept.progress import step_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(monkeypatch, stream: io.StringIO, enabled: bool = True) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with step_progress(4, 1, enabled) as progress:
        for step in (2, 3, 4):
            progress.update()
            if step % 2 == 0:
                progress.set_postfix({"loss": f"{1 / step:.2f}", "lr": "1e-04"})
    return stream.getvalue()


def test_a_file_gets_whole_lines(monkeypatch):
    expected = "step 2 of 4: loss 0.50, lr 1e-04\nstep 4 of 4: loss 0.25, lr 1e-04\n"
    assert report(monkeypatch, io.StringIO()) == expected
    assert report(monkeypatch, io.StringIO(), enabled=False) == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    text = report(monkeypatch, Terminal())
    assert "4/4" in text
    assert "\r" in text
