"""What the commands share: how options are parsed, exit codes for errors, and loops over images."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NoReturn

import tyro
from tqdm import tqdm

from .data import DatasetError
from .distributed import Device as Device
from .distributed import choose_device as choose_device
from .inference import InferenceConfig, InferenceOptions, resolve
from .memory import out_of_memory as out_of_memory
from .model.loss import LossWeights
from .model.network import UNEPT
from .pretrained import has_model as has_model
from .pretrained import load as load
from .pretrained import load_run as load_run
from .pretrained import newest_run

# The options of a command's `inference` field: without the field's name, and left out rather than given as None.
InferenceArguments = tyro.conf.OmitArgPrefixes[tyro.conf.DisallowNone[InferenceOptions]]

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
    traceback is shown.
    """
    try:
        status = main() or 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error of rank {rank}: {error}", file=sys.stderr)
        status = 2
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
        run: what `unept.pretrained.load` takes; None means the newest run folder.
        device: the option of that name.
        inference: the options for inference.
        out: the folder for the results; None where a command has none.

    Returns:
        The model in evaluation mode, and how it sees images.

    Raises:
        FileNotFoundError, ValueError: see `unept.pretrained.load` and `unept.inference.resolve`.
    """
    source = newest_run() if run is None else run
    model = load(source, choose_device(device))
    config = resolve(inference, model)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    print(f"Model of {source}")
    return model, config


def process_images(files: Sequence[Path], process: Callable[[Path], Iterable[str]], failure: str) -> int:
    """Process image files one after another, and go on after one that can't be processed.

    Args:
        files: the image files.
        process: processes one file, and yields lines to print; a line is printed only the first time. A `DatasetError`
            that it raises is reported on stderr.
        failure: what could not be done with such a file, for the last line on stderr, such as "read".

    Returns:
        The exit status: 1 if any file could not be processed, else 0.
    """
    failed, printed = 0, set()
    for file in tqdm(files, unit="image", disable=True if len(files) < 2 else None, leave=False):
        try:
            for line in process(file):
                if line not in printed:
                    tqdm.write(line)
                    printed.add(line)
        except DatasetError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"error: {failed} of {len(files)} images could not be {failure}", file=sys.stderr)
    return min(failed, 1)
