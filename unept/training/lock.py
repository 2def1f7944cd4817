"""One run per folder at a time: a lock for the life of a run, which the system releases however the run ends."""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from .. import distributed
from ..files import create_folder

# The folders that this process has locked: a lock does not keep out the process that holds it.
_locked: set[Path] = set()
_guard = threading.Lock()
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other run out of a folder, which is created if it does not exist; this is a context manager.

    Rank 0 holds the lock, and all ranks call this function. It is a record lock of POSIX on the file `lock`: processes
    that this one starts do not share it, and the system releases it when the process ends, by SIGKILL too.

    Raises:
        FileExistsError: another run has locked the folder.
        OSError: the folder is not writable.
    """
    folder = folder.resolve()
    descriptors: list[int] = []  # not a result of the function that rank 0 calls, which would be sent to all ranks
    distributed.run_on_main(lambda: descriptors.append(_lock(folder)))
    try:
        yield
    finally:
        for descriptor in descriptors:
            with _guard:
                os.close(descriptor)
                _locked.discard(folder)


def _lock(folder: Path) -> int:
    """Lock a folder; the lock lasts until the file descriptor that is returned is closed."""
    create_folder(folder)
    path = folder / "lock"
    with _guard:
        if folder in _locked:
            raise FileExistsError(_refusal(folder, "this process"))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise FileExistsError(_refusal(folder, holder)) from None
                raise
            warnings.warn(f"{path} cannot be locked here ({error}): start no other run in this folder", stacklevel=2)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:
            os.close(descriptor)
            raise
        _locked.add(folder)
        return descriptor


def _refusal(folder: Path, holder: str) -> str:
    return (
        f"a run is training in {folder} now ({holder}): wait until it has ended, stop it, or choose another folder "
        "with --out"
    )
