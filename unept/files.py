"""Write files whole or not at all, and read and write JSON. Every file that this package writes is written here."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Of the names of files that are being written. A killed process leaves them behind.
_TEMPORARY = ".tmp-"


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all, by anything that takes a path; this is a context manager.

    The block writes the file at the path that it is given, beside `path` and with the same suffix. When the block ends
    without an error, the content is synced to the disk and then takes the name `path`; until then, what was there
    before stays. The temporary name is unique, so that of two processes that write the same file one wins.

    Raises:
        OSError: the disk is full or not writable; no file that was there before has changed.
    """
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}{path.suffix[:20]}")
    try:
        with named_errors(path):
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # which must not hide the first one
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all (`temporary_file`).

    Raises:
        OSError: the disk is full or not writable; no file that was there before has changed.
    """
    with temporary_file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add to an OSError which file could not be written, and what to do; this is a context manager."""
    try:
        yield
    except OSError as error:
        message = f"{error.strerror or error} while writing {path}. The files that were there before are intact"
        if error.errno == errno.ENAMETOOLONG:
            raise OSError(error.errno, f"{message}: choose a shorter name") from error
        message += ": free some space or make the folder writable, then start again"
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error


def _sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary_files(*folders: Path) -> None:
    """Remove what a killed process was writing in folders into which no other process writes now."""
    for folder in folders:
        for path in folder.glob(f"{_TEMPORARY}*"):
            path.unlink(missing_ok=True)


# --- folders whose files belong together ------------------------------------------------------------------------------


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write files that belong together into a folder: however a process ends, all are old or all are new.

    They are written into `<folder>.writing`, which is renamed to `<folder>.new` when all are complete. From then on
    they count (`complete_folder`), and they are copied over those of the same names in the folder. Other files in the
    folder stay. Only one process at a time may write a folder.

    Args:
        folder: where the files go; it is created if it does not exist.
        write: writes the files into the folder that it is given, which does not exist yet.

    Raises:
        OSError: the disk is full or not writable; the files that were there before are intact.
    """
    finish_folder(folder)
    writing, new = _stages(folder)
    shutil.rmtree(writing, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with named_errors(folder):
            write(writing)
            for file in writing.iterdir():
                _sync(file)
            writing.rename(new)
            _sync(folder.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    finish_folder(folder)


def finish_folder(folder: Path) -> None:
    """Finish what a killed process had begun in `write_folder`, if it had."""
    writing, new = _stages(folder)
    if not new.is_dir():
        return
    folder.mkdir(exist_ok=True)
    for file in sorted(new.iterdir()):
        with temporary_file(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    shutil.rmtree(writing, ignore_errors=True)
    new.rename(writing)  # at once, so that no half of it ever counts
    shutil.rmtree(writing)


def complete_folder(folder: Path) -> Path:
    """Return where the files of a folder that `write_folder` writes are complete: in the folder, or beside it."""
    new = _stages(folder)[1]
    return new if new.is_dir() else folder


def _stages(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".writing"), folder.with_name(folder.name + ".new")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits, as the command `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- JSON -------------------------------------------------------------------------------------------------------------


def create_folder(folder: Path) -> None:
    """Create a folder for results, and those above it, if it does not exist.

    Raises:
        OSError: it cannot be created, or a file has its name; the message says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "a file has this name" if isinstance(error, FileExistsError) else error.strerror
        raise type(error)(f"the folder {folder} can't be created ({what}): choose another one with --out") from error


def result_path(folder: Path, name: Path, ending: str) -> Path:
    """The path of a result in a folder: NAME_ENDING, below the subfolder that the name has, which is created."""
    path = folder / name.with_name(f"{name.name}_{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def json_ready(value: Any) -> Any:
    """Return the value with None for NaN and infinity, which JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON (`json_ready`), whole or not at all (`write_atomically`)."""
    write_atomically(path, (json.dumps(json_ready(value), indent=2) + "\n").encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    A torn last line, which a killed process may leave, is left out. So is any other line that cannot be read; a warning
    names those.

    Returns:
        The objects in order; an empty list if there is no such file.
    """
    lines: list[dict[str, Any]] = []
    bad: list[int] = []
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:  # of JSON or of UTF-8
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif text.strip() and number < len(texts):
            bad.append(number)
    if bad:
        listed = ", ".join(map(str, bad[:10])) + (" and more" if len(bad) > 10 else "")
        warnings.warn(f"{path} is damaged in line {listed}: the other lines are kept", stacklevel=2)
    return lines


def write_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a file with one JSON object per line, whole or not at all."""
    write_atomically(path, "".join(_json_line(line) for line in lines).encode())


def append_json_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON object as a line of its own, and sync it to the disk.

    Raises:
        OSError: the disk is full or not writable; the lines that were there before are intact.
    """
    with named_errors(path), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        content = memoryview(_json_line(line).encode())
        try:
            while content:  # a nearly full disk takes a part
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(json_ready(line)) + "\n"
