"""What the commands share: how options are parsed, how a command ends, and advice where memory runs out."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import NoReturn

import torch
import tyro

from .config import TrainConfig
from .distributed import Device as Device
from .distributed import choose_device as choose_device
from .inference import InferenceOptions
from .model.loss import LossWeights
from .pretrained import has_model as has_model
from .pretrained import load as load
from .pretrained import load_run as load_run

# The options of a command's `inference` field: without the field's name, and left out rather than given as None.
InferenceArguments = tyro.conf.OmitArgPrefixes[tyro.conf.DisallowNone[InferenceOptions]]

REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _loss_weights(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[LossWeights] | None:
    """`--loss-weights` takes the four numbers of Eq. 7."""
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
    """Run a command and exit: with what it returns (None is 0), or with 2 and one line where the input is at fault.

    ValueError is how this package reports bad input, OSError how a disk or a network does, FloatingPointError a loss
    that is no number any more, MemoryError too large a batch; anything else is a bug, and its traceback is shown.
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
            f"this process is one of {processes} (WORLD_SIZE), but this command works in a single one: start it "
            "without torchrun"
        )


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turn PyTorch's errors about memory, a GPU's or the machine's, into a MemoryError that ends in `advice`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise MemoryError(f"out of memory {advice}") from error
        raise


def memory_advice(config: TrainConfig, local_batch: int) -> str:
    """How a training step of `local_batch` images a rank gets by with less memory: the end of `out_of_memory`'s."""
    height, width = config.data.crop_size
    at_once = local_batch // config.accumulate
    smaller = (
        f"--accumulate {config.accumulate * 2} keeps the batch and sees it in twice as many parts"
        if at_once % 2 == 0
        else "--batch-size takes fewer images"
    )
    return (
        f"with {at_once} images of {height}x{width} at once (batch_size {config.batch_size}): {smaller}; --crop-size "
        "makes images smaller; --amp bf16 halves most of the rest. --resume auto goes on from the last checkpoint"
    )
