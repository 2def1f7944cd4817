"""Files are written whole or not at all; JSON has null for NaN, and a torn last line is left out."""

import json
import os

import pytest

from unept.files import (
    append_json_line,
    json_ready,
    read_json_lines,
    write_atomically,
    write_json,
    write_json_lines,
)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    write_atomically(path, b"first")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*file\.bin.*intact: free some space"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    write_json_lines(path, [{"step": 1}])
    append_json_line(path, {"step": 2, "iou": [0.5, float("nan")]})
    expected = [{"step": 1}, {"step": 2, "iou": [0.5, None]}]
    assert read_json_lines(path) == expected
    with open(path, "a") as file:
        file.write('{"step": ')
    assert read_json_lines(path) == expected


def test_a_class_that_does_not_occur_is_null_in_json(tmp_path):
    value = {"iou": [0.5, float("nan")], "inference": {"scales": (1.0,)}}
    expected = {"iou": [0.5, None], "inference": {"scales": [1.0]}}
    assert json.loads(json.dumps(json_ready(value), allow_nan=False)) == expected
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text()) == expected
