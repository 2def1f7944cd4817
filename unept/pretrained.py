"""Trained models: from a run folder, from a folder that `save_pretrained` wrote, or from the Hugging Face hub."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from .config import TrainConfig
from .model.network import UNEPT

RUNS = Path("runs")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


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
    model = _read_model(folder / "model", device)
    model.preprocessing = {**config.inference().protocol(), **model.preprocessing}  # old versions saved none
    return config, model


def load(source: str | Path, device: torch.device) -> UNEPT:
    """A trained model in evaluation mode; its `preprocessing` says how it is to see images (`unept.inference.resolve`).

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
    return load_run(folder, device)[1]


def _read_model(source: str | Path, device: torch.device) -> UNEPT:
    """The model in a folder, a Path, or in a repository of the hub, a str."""
    try:
        return UNEPT.from_pretrained(str(source)).to(device).eval()
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


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder under `runs` whose model is the newest.

    Raises:
        FileNotFoundError: if there is none.
    """
    folders = [folder for folder in sorted(runs.glob("*/")) if has_model(folder)]
    if not folders:
        raise FileNotFoundError(
            f"there is no run folder with a model under {runs}/: train one with `python -m unept.train`, "
            "or name one with --run"
        )
    return max(folders, key=lambda folder: (folder / "model" / "model.safetensors").stat().st_mtime)
