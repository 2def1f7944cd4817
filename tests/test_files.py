"""Files are written whole or not at all, alone and together; JSON has null for NaN, and bad lines are left out."""

import contextlib
import itertools
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from unept.files import (
    append_json_line,
    complete_folder,
    finish_folder,
    json_ready,
    read_json_lines,
    remove_temporary_files,
    temporary_file,
    write_atomically,
    write_folder,
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


def test_what_is_half_written_has_another_name_for_each_writer(tmp_path):
    path = tmp_path / ("n" * 250 + ".png")
    with temporary_file(path) as first, temporary_file(path) as second:
        assert first != second
        assert {first.suffix, second.suffix} == {".png"}
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"
    with contextlib.suppress(RuntimeError), temporary_file(path) as temporary:
        temporary.write_bytes(b"third")
        raise RuntimeError
    assert path.read_bytes() == b"first"
    (tmp_path / temporary.name).write_bytes(b"of a killed process")
    remove_temporary_files(tmp_path, tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "gone" / "file"):
        with pytest.raises(OSError, match=f"while writing {path}\\. The files"):
            write_atomically(path, b"")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("killed_after", range(8))
def test_files_of_a_folder_are_all_old_or_all_new(tmp_path, monkeypatch, killed_after):
    """A process is killed at each of its system calls that change what the folder holds, and after the last."""
    folder = tmp_path / "model"

    def write(text: str):
        def write_files(new):
            new.mkdir()
            (new / "a").write_text(text)
            (new / "b").write_text(text)

        return write_files

    write_folder(folder, write("old"))
    (folder / "own").write_text("of the user")
    calls = itertools.count()

    class Killed(BaseException):
        pass

    def kill(function):
        def called(*arguments, **options):
            if next(calls) >= killed_after:
                raise Killed
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "copyfile"), (shutil, "rmtree")):
            patch.setattr(owner, name, kill(getattr(owner, name)))
        write_folder(folder, write("new"))
    found = {(complete_folder(folder) / name).read_text() for name in "ab"}
    assert found in ({"old"}, {"new"})
    finish_folder(folder)
    assert {(folder / name).read_text() for name in "ab"} == found
    write_folder(folder, write("newer"))
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a": "newer", "b": "newer", "own": "of the user"}
    assert list(tmp_path.iterdir()) == [folder]


def test_bad_lines_are_left_out_and_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    write_json_lines(path, [{"step": 1}])
    append_json_line(path, {"step": 2, "iou": [0.5, float("nan")]})
    expected = [{"step": 1}, {"step": 2, "iou": [0.5, None]}]
    assert read_json_lines(path) == expected
    with open(path, "a") as file:
        file.write('{"step": ')
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a torn last line is nothing to be told of
        assert read_json_lines(path) == expected
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[2], b"\xff", b"3", lines[1], b""]))
    with pytest.warns(UserWarning, match=r"lines.jsonl is damaged in line 2, 3, 4: the other lines are kept"):
        assert read_json_lines(path) == expected


def test_a_line_that_does_not_fit_on_the_disk_is_not_begun(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"while writing .*lines\.jsonl"):
            append_json_line(path, {"step": 2})
    append_json_line(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_class_that_does_not_occur_is_null_in_json(tmp_path):
    value = {"iou": [0.5, float("nan")], "rate": float("inf"), "inference": {"scales": (1.0,)}}
    expected = {"iou": [0.5, None], "rate": None, "inference": {"scales": [1.0]}}
    assert json.loads(json.dumps(json_ready(value), allow_nan=False)) == expected
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text()) == expected
