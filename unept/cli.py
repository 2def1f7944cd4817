"""What the commands share: how they end, the device, and how a trained model is found and loaded."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError

from .config import TrainConfig
from .distributed import Device as Device
from .distributed import choose_device as choose_device
from .inference import InferenceConfig
from .model.network import UNEPT, load_model

# The inference options that belong to a trained model, and which its config.json therefore has (`UNEPT.preprocessing`).
PROTOCOL = ("short_side", "window", "window_stride", "refine", "refine_scale", "amp")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


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


def load_run(folder: Path, device: torch.device) -> tuple[TrainConfig, UNEPT]:
    """Options and best model of a run folder, the model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, not one of `unept.train`, or one without a model yet; the message says which.
        ValueError: its config.json or its model can't be read by this version.
    """
    if not (folder / "config.json").is_file():
        what = "is no run folder" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: give a folder that unept.train wrote, with config.json and model/")
    config = TrainConfig.from_json(folder / "config.json")
    if not has_model(folder):
        raise FileNotFoundError(
            f"{folder} has no model/ yet: training writes it after its first evaluation, at step "
            f"{min(config.eval_every, config.iterations)}; wait for it, or continue the run with --resume auto"
        )
    return config, _read_model(folder / "model", device)


def load(source: str | Path, device: torch.device) -> UNEPT:
    """A trained model in evaluation mode; its `preprocessing` says how it is to see images (`as_described`).

    Args:
        source: a run folder of `unept.train`, a folder that `save_pretrained` wrote, or, where there is no such path,
            ORG/NAME of a repository on the Hugging Face hub.
        device: where to.

    Raises:
        FileNotFoundError: no such folder or repository, or one without a model; the message says which.
        ValueError: a config.json or weights that can't be read by this version.
    """
    folder = Path(source)
    if (folder / "model.safetensors").is_file():
        return _read_model(folder, device)
    if not folder.exists() and REPOSITORY.fullmatch(str(source)):
        return _read_model(str(source), device)
    config, model = load_run(folder, device)
    model.preprocessing = {**protocol(config), **model.preprocessing}  # models saved by older versions have none
    return model


def _read_model(source: str | Path, device: torch.device) -> UNEPT:
    """The model in a folder, a Path, or in a repository of the hub, a str."""
    try:
        return load_model(source, device)
    except SafetensorError as error:
        raise ValueError(f"{source}/model.safetensors is damaged ({error}): restore it or train again") from error
    except RuntimeError as error:  # of load_state_dict
        raise ValueError(
            f"the weights in {source} don't fit the network that its config.json describes, as this version "
            f"of unept builds it: use the version that saved them, or train again. {error}"
        ) from error
    except OSError as error:
        if isinstance(source, Path):
            raise
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{source} is no folder here, and no model of that name could be had from the Hugging Face hub ({reason})"
        ) from error


def has_model(folder: Path) -> bool:
    """Whether a run folder holds a saved model."""
    return all((folder / "model" / name).is_file() for name in ("config.json", "model.safetensors"))


def as_trained(inference: InferenceConfig, config: TrainConfig) -> InferenceConfig:
    """Inference options with what was left open filled in from the run, so that they say all that will be done."""
    chosen = {name: value for name, value in vars(inference).items() if value not in (None, "auto")}
    if "window" in chosen:
        chosen.setdefault("window_stride", None)  # the run's stride belongs to the run's window
    filled = dataclasses.replace(config.inference(), **chosen)
    return dataclasses.replace(
        filled,
        window=filled.window or None,
        window_stride=filled.stride or None,
        short_side=filled.short_side or None,
        refine=filled.refine and config.model.context_queries == "spatial",
    )


def protocol(config: TrainConfig) -> dict[str, Any]:
    """What a run fixed of the inference options: those of `PROTOCOL` that it did not leave open."""
    options = vars(as_trained(InferenceConfig(), config))
    return {name: options[name] for name in PROTOCOL if options[name] not in (None, "auto")}


def as_described(inference: InferenceConfig, model: UNEPT) -> InferenceConfig:
    """Inference options; those that are as by default follow the model's `preprocessing`, where it has them.

    Raises:
        ValueError: the two don't fit together.
    """
    chosen = {name: value for name, value in vars(inference).items() if value != getattr(InferenceConfig(), name)}
    described = {name: model.preprocessing[name] for name in PROTOCOL if name in model.preprocessing}
    if "window" in chosen:
        described.pop("window_stride", None)  # it belongs to the described window
    return InferenceConfig(**{**described, **chosen})
