"""Trainings in processes of their own that are killed, signalled, starved of disk space and damaged, at random."""

import errno
import functools
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from unept import cli, train
from unept.training import checkpoint

# Processes are forked from one that has imported everything, which takes a tenth of a second instead of ten.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.faults"])
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def _train(options: list[str], folder: str, log: str, largest_file: int | None, full_after: int | None) -> None:
    """Run the command in a folder, with its output in a file; the limits are those of `Training`."""
    # As in a process that a shell starts; in a process of a fork server, each reader of data would import everything.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if full_after is not None:
        _fill_disk(full_after)
    cli.run(lambda: train.train(options))


def _fill_disk(full_after: int) -> None:
    """Let all calls of fsync but the first ones fail as on a full disk."""
    fsync, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        if next(calls) >= full_after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = full


class Training:
    """A training in a process of its own.

    Args:
        options: its command line.
        folder: where it is started.
        largest_file: the number of bytes after which writing a file fails, as where space runs out; None for no limit.
        full_after: the number of files and folders that are synced before the disk is full; None for no limit.

    Attributes:
        log: the file with its output.
    """

    def __init__(
        self, options: list[str], folder: Path, largest_file: int | None = None, full_after: int | None = None
    ):
        self.log = folder / f"{time.monotonic_ns()}.log"
        arguments = (options, str(folder), str(self.log), largest_file, full_after)
        self.process = CONTEXT.Process(target=_train, args=arguments)
        self.process.start()

    def wait(self, timeout: float = 600) -> int:
        """Return the exit status: negative for a signal that ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it hangs: {self.output()}"
        return self.process.exitcode

    def wait_for(self, path: Path, timeout: float = 600) -> None:
        """Wait until a file is there or the process has ended."""
        deadline = time.monotonic() + timeout
        while not path.exists() and self.process.is_alive():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.exists() else ""


def flip_bit(path: Path, chosen: random.Random) -> None:
    """Change a bit of a file."""
    content = bytearray(path.read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)


def zero_page(path: Path, chosen: random.Random) -> None:
    """Overwrite 4096 bytes of a file with zeros, as a bad disk or a power cut does."""
    content = bytearray(path.read_bytes())
    place = chosen.randrange(len(content)) // 4096 * 4096
    content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    path.write_bytes(content)


def cut(path: Path, chosen: random.Random) -> None:
    """Cut a file off."""
    os.truncate(path, chosen.randrange(path.stat().st_size))


def replace(path: Path, chosen: random.Random) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    make = chosen.choice([Path.mkdir, os.mkfifo, functools.partial(os.symlink, "nowhere")])
    make(path)


def damage_newest(folder: Path, chosen: random.Random) -> bool:
    """Damage the newest checkpoint of a run folder, if there is an older one; whether there was."""
    found = checkpoint.checkpoints(folder / "checkpoints")
    if len(found) < 2:
        return False
    chosen.choice([flip_bit, zero_page, cut, replace])(found[-1], chosen)
    return True


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run folder."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
