"""What the commands share: how options are parsed, exit codes for errors, and loops over images."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NoReturn, TextIO

import tyro
from tqdm import tqdm

from .data import DatasetError
from .data.finding import FoundImage, find_images
from .distributed import Device as Device
from .distributed import choose_device as choose_device
from .files import create_folder
from .inference import InferenceConfig, InferenceOptions, resolve
from .memory import out_of_memory as out_of_memory
from .model.loss import LossWeights
from .model.network import UNEPT
from .pretrained import DEMO, DEMO_NOTICE, RUNS, newest_run
from .pretrained import has_model as has_model
from .pretrained import load as load
from .pretrained import load_run as load_run

# The options of a command's `inference` field: without the field's name, and left out rather than given as None.
InferenceArguments = tyro.conf.OmitArgPrefixes[tyro.conf.DisallowNone[InferenceOptions]]

# Errors of the disk, after which no other file could be written either.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _loss_weights(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[LossWeights] | None:
    """Take the four numbers of Eq. 7 for `--loss-weights`."""
    if type_info.type is not LossWeights:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=4,
        metavar="FLOAT FLOAT FLOAT FLOAT",
        instance_from_str=lambda numbers: LossWeights(*map(float, numbers)),
        is_instance=lambda value: isinstance(value, LossWeights),
        str_from_instance=lambda weights: [str(weight) for weight in astuple(weights)],
    )


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its return value (None means 0), or with 2 and one line if the input is at fault.

    This package reports bad input as ValueError, a disk or a network its failures as OSError, training a loss that is
    not finite as FloatingPointError, and too large a batch is a MemoryError. Any other exception is a bug, and its
    traceback is shown. Ctrl-C exits with 130 (128 + SIGINT).
    """
    try:
        with out_of_memory("of the device or of the machine: --help names options that take less, such as --window"):
            status = main() or 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        rank = os.environ.get("RANK", "0")
        for line in (f"error: {error}" if rank == "0" else f"error of rank {rank}: {error}").split("\n"):
            say(line, sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    raise SystemExit(status)


def refuse_several_processes() -> None:
    """Raise ValueError under torchrun, for commands whose processes would each write the same files."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(
            f"this process is one of {processes} (WORLD_SIZE), but this command works in a single process: start it "
            "without torchrun"
        )


def open_model(
    run: Path | None, device: Device, inference: InferenceOptions, out: Path | None
) -> tuple[UNEPT, InferenceConfig]:
    """Load the model with which a command sees images, create the folder for the results, and print what is loaded.

    Args:
        run: what `unept.pretrained.load` takes; None means the newest run folder, or the demo model if there is none.
        device: the option of that name.
        inference: the options for inference.
        out: the folder for the results; None where a command has none.

    Returns:
        The model in evaluation mode, and how it sees images.

    Raises:
        FileNotFoundError, ValueError: see `unept.pretrained.load` and `unept.inference.resolve`.
    """
    source = run or newest_run()
    model = load(source or DEMO, choose_device(device))
    config = resolve(inference, model)
    if model.in_chans != 3:
        raise ValueError(
            f"the model takes images of {model.in_chans} channels, and image files are read as RGB: give "
            "unept.Segmenter arrays of as many channels"
        )
    if out is not None:
        create_folder(out)
    if source is None:
        say(f"There is no --run and no model under {RUNS}/. This is {DEMO_NOTICE}")
    else:
        say(f"Model of {source}")
    return model, config


def say(text: object, file: TextIO | None = None) -> None:
    """Print one line, on stdout by default; what a terminal or its encoding does not take is escaped.

    File names may hold line breaks, control characters and bytes that are no text.
    """
    file = sys.stdout if file is None else file
    line = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in str(text))
    encoding = getattr(file, "encoding", None) or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=file)  # above a bar of progress
    file.flush()


def find_named_images(
    paths: Sequence[Path], recursive: bool, out: Path, writes_images: bool = True
) -> tuple[list[FoundImage], int]:
    """Find the images that a command is given (`find_images`); report on stderr what is left out.

    Results in a folder `out` below the folders are not among them; in a folder of images itself they may lie
    unless they are images too (`writes_images`).

    Returns:
        The images, and the exit status: 1 if a path is missing or a folder holds no image, else 0.

    Raises:
        FileNotFoundError, ValueError: see `find_images`; or `out` is one of the folders, and the results are images.
    """
    results = out.resolve()
    among_images = any(path.is_dir() and path.resolve() == results for path in paths)
    if writes_images and among_images:
        raise ValueError(f"the results in {out} would be images of the next run: give another folder with --out")
    found = find_images(paths, recursive)
    if recursive and not among_images:
        found = found._replace(images=[i for i in found.images if results not in i.path.resolve().parents])
    for line in found.problems:
        say(f"error: {line}", sys.stderr)
    for line in found.left_out:
        say(f"note: {line}", sys.stderr)
    return found.images, min(1, len(found.problems))


def process_images(images: Sequence[FoundImage], process: Callable[[FoundImage], Iterable[str]], failure: str) -> int:
    """Process images one after another, and go on after one that can't be processed.

    Args:
        images: the images.
        process: processes one of them, and yields lines to print; a line is printed only the first time. What it raises
            about this image alone is reported on stderr: a `DatasetError`, a `MemoryError`, a `FloatingPointError`, or
            an `OSError` about its name or path, rather than about the disk.
        failure: what could not be done with such an image, for the last line on stderr, such as "read".

    Returns:
        The exit status: 1 if any image could not be processed, else 0.

    Raises:
        OSError: the disk is full or not writable.
    """
    failed, printed = 0, set()
    for image in tqdm(images, unit="image", disable=True if len(images) < 2 else None, leave=False):
        try:
            with out_of_memory(f"with {image.path}: make the image smaller, or ask for less of it"):
                for line in process(image):
                    if line not in printed:
                        say(line)
                        printed.add(line)
        except (DatasetError, MemoryError) as error:
            say(f"error: {error}", sys.stderr)
            failed += 1
        except FloatingPointError as error:
            say(f"error: with {image.path}: {error}", sys.stderr)
            failed += 1
        except OSError as error:
            if error.errno is None or error.errno in DISK_ERRORS:
                raise
            advice = "make the folder writable" if error.errno in (errno.EACCES, errno.EPERM) else "rename it"
            reason = os.strerror(error.errno)
            say(f"error: the results of {image.path} can't be written ({reason}): {advice}", sys.stderr)
            failed += 1
    if failed:
        say(f"error: {failed} of {len(images)} images could not be {failure}", sys.stderr)
    return min(failed, 1)
