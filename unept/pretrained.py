"""Trained models: from a run folder, from a folder that `save_pretrained` wrote, or from the Hugging Face hub."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from .config import TrainConfig
from .files import complete_folder
from .memory import out_of_memory
from .model.hub import DEMO, REPOSITORY, DamagedWeights, saved_model
from .model.network import UNEPT
from .precision import uses_bfloat16

RUNS = Path("runs")
DEMO_NOTICE = (
    "the demo model that ships with unept: street scenes, the 11 classes of CamVid, for research (its card is "
    f"{DEMO / 'README.md'})"
)


def load_run(folder: Path, device: torch.device) -> tuple[TrainConfig, UNEPT]:
    """Load the options and the best model of a run folder.

    Args:
        folder: the run folder.
        device: device of the model.

    Returns:
        The options, and the model in evaluation mode; its `preprocessing` says how it is to see images.

    Raises:
        FileNotFoundError: there is no such folder, `unept.train` did not write it, or it has no model yet; the message
            says which.
        ValueError: its config.json or its model cannot be read by this version.
    """
    if saved_model(folder) is not None:
        raise ValueError(
            f"{folder} is a model without the run that trained it, whose options are needed here: give a folder that "
            "unept.train wrote"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} {_no_run(folder)}")
    config = TrainConfig.from_json(folder / "config.json")
    if not has_model(folder):
        raise FileNotFoundError(
            f"{folder} has no model/ yet: training writes it after its first evaluation, at step "
            f"{min(config.eval_every, config.iterations)}; wait for it, or continue the run with --resume auto"
        )
    try:
        model = _read_model(complete_folder(folder / "model"), device)
    except (DamagedWeights, FileNotFoundError):  # perhaps a run was replacing them just then
        model = _read_model(complete_folder(folder / "model"), device)
    model.preprocessing = {**config.inference().protocol(), **model.preprocessing}  # old versions saved none
    return config, model


def _no_run(path: Path) -> str:
    """What a path is that is no run folder, and what to give."""
    if path.is_file():
        inside = next((folder for folder in path.parents if (folder / "config.json").is_file()), None)
        here = "" if inside is None else f", here {inside}"
        return f"is a file: give the folder of a run or of a model{here}"
    what = "is not a run folder" if path.is_dir() else "does not exist"
    return f"{what}: give a folder that unept.train wrote, with config.json and model/"


def load(source: str | Path, device: torch.device) -> UNEPT:
    """Load a trained model.

    Args:
        source: a run folder of `unept.train`, a folder that `save_pretrained` wrote, or, where there is no such path,
            ORG/NAME of a repository on the Hugging Face hub, or `camvid_tiny`, the demo model.
        device: device of the model.

    Returns:
        The model in evaluation mode; its `preprocessing` says how it is to see images (`unept.inference.resolve`).

    Raises:
        FileNotFoundError: there is no such folder or repository, or it has no model; the message says which.
        ValueError: its config.json or its weights cannot be read by this version.
    """
    folder = Path(source)
    if (saved := saved_model(source)) is not None:
        return _read_model(saved, device)
    if not folder.exists() and REPOSITORY.fullmatch(str(source)):
        return _read_model(str(source), device)
    return load_run(folder, device)[1]


def _read_model(source: str | Path, device: torch.device) -> UNEPT:
    """Load the model in a folder (a Path) or in a repository of the hub (a str)."""
    try:
        model = UNEPT.from_pretrained(str(source))
    except SafetensorError as error:
        raise ValueError(f"{source}/model.safetensors is damaged ({error}): restore it or train again") from error
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of memory while {source} was loaded: free memory, or use --device cpu") from error
    except RuntimeError as error:  # of load_state_dict
        raise ValueError(
            f"the weights in {source} do not fit the network that its config.json describes, as this version "
            f"of unept builds it: use the version that saved them, or train again. {error}"
        ) from error
    with out_of_memory(f"while the model was moved to {device}: free the device, or use --device cpu"):
        model = model.to(device).eval()
        # As `unept.inference` gives it images.
        return model.to(memory_format=torch.channels_last) if uses_bfloat16("auto", device.type) else model


def has_model(folder: Path) -> bool:
    """Whether a run folder holds a saved model."""
    model = complete_folder(folder / "model")
    return all((model / name).is_file() for name in ("config.json", "model.safetensors"))


def newest_run(runs: Path = RUNS) -> Path | None:
    """The run folder under `runs` whose model is the newest; None if there is none."""
    folders = [folder for folder in sorted(runs.glob("*/")) if has_model(folder)]

    def written(folder: Path) -> float:
        return (complete_folder(folder / "model") / "model.safetensors").stat().st_mtime

    return max(folders, key=written, default=None)
