"""Write files whole or not at all, and read and write JSON."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: what was there before stays until the new content is safely on disk.

    The content goes to `<name>.tmp` beside the file, is synced, and then takes the file's name.

    Raises:
        OSError: the disk is full or not writable; no file that was there before has changed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{error.strerror} while writing {path}. The files that were there before are intact: free some space or "
            "make the folder writable, then start again",
        ) from error
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_ready(value: Any) -> Any:
    """Return the value with None in the place of every NaN, which JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON (`json_ready`), whole or not at all (`write_atomically`)."""
    write_atomically(path, (json.dumps(json_ready(value), indent=2) + "\n").encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line, without the torn last line that a killed process may leave.

    Returns:
        The objects in order; an empty list if there is no such file.
    """
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a file with one JSON object per line, whole or not at all."""
    write_atomically(path, "".join(_json_line(line) for line in lines).encode())


def append_json_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON object as a line of its own."""
    with open(path, "a") as file:
        file.write(_json_line(line))


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(json_ready(line)) + "\n"
