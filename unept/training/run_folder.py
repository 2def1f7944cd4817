"""Choose the folder of a training run, decide whether the run in it is continued, and prepare the folder."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .. import distributed
from ..config import TrainConfig
from ..files import finish_folder, remove_temporary_files, write_atomically
from ..pretrained import has_model
from .checkpoint import checkpoints, load_latest, set_aside
from .history import add_to_history, changed_options, check_steps, describe_changes
from .optimizer import describe_schedule
from .state import TrainingState

RUNS = Path("runs")


@contextlib.contextmanager
def reserved(config: TrainConfig, preset: str) -> Iterator[Path]:
    """Give the folder of a run (`choose_run_folder`) on all ranks; this is a context manager.

    Where an error ends the block before anything was written, the folder that was created for it is removed.

    Raises:
        FileExistsError: see `choose_run_folder`.
    """
    out = distributed.run_on_main(lambda: choose_run_folder(config, preset))
    try:
        yield out
    except BaseException:
        if config.out is None and distributed.is_main():
            with contextlib.suppress(OSError):  # the run has written something
                out.rmdir()
                out.parent.rmdir()
        raise


def choose_run_folder(config: TrainConfig, preset: str) -> Path:
    """Return `config.out` if it is set, else create runs/PRESET, with a number if that folder exists.

    Of two runs that start at the same time only one gets a folder. A run that continues gets the folder with the
    highest number.

    Raises:
        FileExistsError: `config.out` holds a run, and `resume` is not `auto`.
    """
    if config.out is not None:
        if not should_resume(config, config.out):
            refuse_existing_run(config.out)
        return config.out
    last = None
    for folder in _numbered(preset):
        if folder.exists():
            last = folder
            continue
        if last is not None and should_resume(config, last):
            return last
        with contextlib.suppress(FileExistsError):  # another run was faster
            folder.mkdir(parents=True)
            return folder
        last = folder
    raise AssertionError("unreachable")


def find_run(config: TrainConfig, preset: str) -> Path | None:
    """Return the folder of the run that `choose_run_folder` would continue; None if there is none."""
    folders = [config.out] if config.out else list(itertools.takewhile(Path.exists, _numbered(preset)))[-1:]
    continued = [out for out in folders if holds_state(out) and should_resume(config, out)]
    return continued[0] if continued else None


def _numbered(preset: str) -> Iterator[Path]:
    """The run folders of a preset, one after another, without end."""
    yield RUNS / preset
    yield from (RUNS / f"{preset}-{number}" for number in itertools.count(2))


def refuse_existing_run(folder: Path) -> None:
    """Raise FileExistsError if a folder holds a run."""
    if (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} holds a run already: continue it with --resume auto, or choose another folder with --out"
        )


def should_resume(config: TrainConfig, folder: Path) -> bool:
    """Whether to continue a run in the folder: if `resume` is `auto`, or if this start of torchrun began that run."""
    launch = folder / "launch"
    restarted = distributed.was_restarted() and launch.exists() and launch.read_text() == distributed.launch_id()
    return config.resume == "auto" or restarted


def holds_state(folder: Path) -> bool:
    """Whether a run folder holds a run that is past its first steps, so that it continues from a checkpoint."""
    return (folder / "config.json").is_file() and bool(checkpoints(folder / "checkpoints"))


def open_run_folder(config: TrainConfig, folder: Path, classes: Sequence[str], resume: bool) -> TrainingState | None:
    """Create the folder of a run, or read the state from which the run in it continues.

    A run that ended before its first checkpoint, as by a wrong option, may have other options when it starts again.
    Only rank 0 calls it, while it has locked the folder (`lock.locked`). What is continued, and with which changes, is
    printed and added to history.jsonl.

    Args:
        config: options of the run.
        folder: its folder.
        classes: class names of the data set.
        resume: whether to continue a run that is in the folder.

    Returns:
        The newest checkpoint that can be read, on the CPU; None if the run starts from its first step.

    Raises:
        FileExistsError: the folder holds a run that is not to be continued.
        ValueError: the run in the folder has other classes, or options that may not change, or has taken more steps
            than it is to take now, or none of its checkpoints can be read.
        OSError: the disk is full or not writable.
    """
    state, changed = None, {}
    if not resume:
        refuse_existing_run(folder)
    elif (folder / "config.json").exists() and (has_model(folder) or any((folder / "checkpoints").glob("*"))):
        changed = changed_options(config, folder)
        state = load_latest(folder / "checkpoints", torch.device("cpu"))
        if state is not None:
            check_same_classes(state, classes, folder)
            check_steps(config, state.step, folder)
            if state.samples is None:
                state.samples = state.step * changed.get("batch_size", (config.batch_size,))[0]
    step = -1 if state is None else state.step
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    remove_temporary_files(*(folder / part for part in ("checkpoints", "samples", "model")))
    set_aside(folder / "checkpoints", step)
    finish_folder(folder / "model")
    if (launch := distributed.launch_id()) is not None:
        write_atomically(folder / "launch", launch.encode())
    write_atomically(folder / "config.json", config.to_json().encode())
    add_to_history(folder, "start" if state is None else "continue", max(step, 0), changed=changed)
    if state is not None:
        announce(config, state.step, describe_changes(changed))
    return state


def announce(config: TrainConfig, step: int, changes: str) -> None:
    """Print where a run continues, with which changes, and what these do to the learning rate."""
    print(f"continues at step {step} of {config.iterations}{f', with {changes}' if changes else ''}")
    if changes:
        print(f"from here on {describe_schedule(config, step)}")


def check_same_classes(state: TrainingState, classes: Sequence[str], folder: Path) -> None:
    """Raise ValueError if a checkpoint is of a model with other classes than those of the data set."""
    if state.classes != list(classes):
        raise ValueError(
            f"the checkpoint in {folder} has {len(state.classes)} classes, the data set has {len(classes)}: "
            f"{state.classes} against {list(classes)}. Train in another folder, or give the data set that the run "
            "started with"
        )
