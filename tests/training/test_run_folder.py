"""Which folder a run goes to, when it continues the run in it and with which options, and who may write into it."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest

from tests.helpers.states import training_state
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.files import read_json_lines
from unept.memory import memory_advice
from unept.recipe import RecipeConfig
from unept.training import checkpoint
from unept.training.history import ADVISED_TO_CHANGE, FREE_TO_CHANGE, changed_options
from unept.training.lock import locked
from unept.training.run_folder import choose_run_folder, open_run_folder, reserved, should_resume


def test_existing_run_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"--resume auto.*--out"):
        choose_run_folder(TrainConfig(out=tmp_path / "run"), "shapes")
    with pytest.raises(FileExistsError, match=r"--resume auto.*--out"):  # which another run has begun meanwhile
        open_run_folder(TrainConfig(), tmp_path / "run", ["a"], resume=False)
    assert choose_run_folder(TrainConfig(out=tmp_path / "run", resume="auto"), "shapes") == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    for number in ("", "-2", "-3"):  # each takes a folder of its own at once
        assert choose_run_folder(TrainConfig(), "shapes") == Path(f"runs/shapes{number}")
    assert choose_run_folder(TrainConfig(resume="auto"), "shapes") == Path("runs/shapes-3")
    assert choose_run_folder(TrainConfig(resume="auto"), "camvid") == Path("runs/camvid")


def test_of_runs_that_start_together_each_has_its_folder(tmp_path, monkeypatch):
    """Another run makes the folder between the look at it and its creation."""
    monkeypatch.chdir(tmp_path)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path) and path.name != "shapes")
    (tmp_path / "runs" / "shapes").mkdir(parents=True)
    assert choose_run_folder(TrainConfig(), "shapes") == Path("runs/shapes-2")


def test_folder_of_a_run_that_could_not_start_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for written, left in ((False, []), (True, ["runs"])):
        with pytest.raises(ValueError, match="no data"), reserved(TrainConfig(), "shapes") as out:  # noqa: PT012
            if written:
                (out / "config.json").write_text("{}")
            raise ValueError("no data")
        assert [path.name for path in tmp_path.iterdir()] == left


def test_restart_continues_its_own_run_only(tmp_path, monkeypatch):
    config = TrainConfig()
    (tmp_path / "launch").write_text("job 7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not should_resume(config, tmp_path), "a first start"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert should_resume(config, tmp_path)
    assert not should_resume(config, tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 8")
    assert not should_resume(config, tmp_path), "another's run"


def _hold(folder: Path, locks, children) -> None:
    """Lock a folder, start a process as a loader does, and wait."""
    with locked(folder):
        child = multiprocessing.get_context("fork").Process(target=signal.pause)
        child.start()
        children.put(child.pid)
        locks.set()
        signal.pause()


def test_lock_lasts_as_long_as_the_process_that_holds_it(tmp_path):
    context = multiprocessing.get_context("fork")
    locks, children = context.Event(), context.Queue()
    holder = context.Process(target=_hold, args=(tmp_path / "run", locks, children))
    holder.start()
    assert locks.wait(60)
    child = children.get()
    with pytest.raises(FileExistsError, match=rf"training in .*run now \(process {holder.pid} on .*--out"):
        locked(tmp_path / "run").__enter__()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    os.kill(child, 0)  # lives on, without the lock
    with locked(tmp_path / "run"), pytest.raises(FileExistsError, match=r"now \(this process\)"):
        locked(tmp_path / "." / "run").__enter__()
    with locked(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)


# --- options of a continued run ---------------------------------------------------------------------------------------


def begun(folder: Path, config: TrainConfig, step: int) -> None:
    """The folder of a run that was interrupted after a checkpoint."""
    open_run_folder(config, folder, ["a", "b"], resume=False)
    checkpoint.save_checkpoint(folder / "checkpoints", training_state(step))


def test_every_option_that_a_message_names_may_change(tmp_path):
    """Those of too little memory and of divergence, with which --resume auto is advised."""
    config = TrainConfig(batch_size=4)
    advice = [memory_advice(config, 4), memory_advice(config, 1), checkpoint.divergence_advice(tmp_path)]
    source = Path(__file__).parents[2] / "unept" / "training" / "trainer.py"
    advice += re.findall(r"out_of_memory\((f?\".*\")\)", source.read_text())
    assert len(advice) == 4
    named = {name.replace("-", "_") for text in advice for name in re.findall(r"--([a-z][a-z-]*)", text)}
    assert named >= {"accumulate", "batch_size", "crop_size", "amp", "window", "lr", "warmup", "resume"}
    assert named <= ADVISED_TO_CHANGE | FREE_TO_CHANGE
    parts = (TrainConfig, DataConfig, ModelConfig, RecipeConfig)
    known = {field.name for part in parts for field in dataclasses.fields(part)}
    assert known >= ADVISED_TO_CHANGE | FREE_TO_CHANGE
    page = (Path(__file__).parents[2] / "docs" / "train_on_your_data.md").read_text()
    told = page[page.index("**Other options.**") : page.index("may be changed when a run continues")]
    assert {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)`", told)} == ADVISED_TO_CHANGE


def test_changes_are_kept_in_the_history_and_the_rest_is_strict(tmp_path, capsys):
    config = TrainConfig(iterations=12, schedule="step")
    begun(tmp_path, config, 12)
    config.lr = 0.5
    config.data.crop_size = (32, 32)
    workers = config.data.workers  # as many as this machine has cores, at most 8
    config.data.workers = 9
    config.iterations = 24
    assert open_run_folder(config, tmp_path, ["a", "b"], resume=True).step == 12
    assert capsys.readouterr().out == (
        "continues at step 12 of 24, with crop_size [480, 480] -> [32, 32], iterations 12 -> 24, lr 0.0001 -> 0.5\n"
        "from here on the learning rate is 5.0e-01 at step 12 of 24 and falls to 5.0e-02 at step 16\n"
    )
    first, second = read_json_lines(tmp_path / "history.jsonl")
    assert (first["event"], first["step"], first["changed"]) == ("start", 0, {})
    assert (second["event"], second["step"]) == ("continue", 12)
    assert second["changed"]["lr"] == [0.0001, 0.5]
    assert second["changed"]["workers"] == [workers, 9]
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.5
    assert changed_options(config, tmp_path) == {}, "they are the run's options now"
    for name, value in {"seed": 1, "weight_decay": 0.5, "ema": 0.5}.items():
        with pytest.raises(ValueError, match=rf"other options: {name} \(was .*--lr"):
            open_run_folder(dataclasses.replace(config, **{name: value}), tmp_path, ["a", "b"], resume=True)
    with pytest.raises(ValueError, match=r"iterations is 11, but the run in .* has taken 12 steps"):
        open_run_folder(dataclasses.replace(config, iterations=11), tmp_path, ["a", "b"], resume=True)


def test_a_run_without_a_first_checkpoint_may_have_other_options(tmp_path):
    """A wrong option may be why it ended; its folder is neither lost nor to be emptied by hand."""
    open_run_folder(TrainConfig(), tmp_path, ["a", "b"], resume=False)
    other = TrainConfig(seed=1)
    assert open_run_folder(other, tmp_path, ["a", "b"], resume=True) is None
    assert TrainConfig.from_json(tmp_path / "config.json").seed == 1
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).touch()
    with pytest.raises(ValueError, match="other options: seed"):  # its checkpoints were removed to save space
        open_run_folder(TrainConfig(), tmp_path, ["a", "b"], resume=True)


def test_leavings_of_a_killed_process_are_cleared_away(tmp_path):
    config = TrainConfig()
    begun(tmp_path, config, 4)
    for name in ("checkpoints", "samples", "model"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / ".tmp-1.pt").write_text("half of a file")
    (tmp_path / "model.new").mkdir()
    (tmp_path / "model.new" / "config.json").write_text("new")
    (tmp_path / "checkpoints" / "step_00000008.pt").write_text("torn")
    with pytest.warns(UserWarning, match="damaged"):
        assert open_run_folder(config, tmp_path, ["a", "b"], resume=True).step == 4
    assert not list(tmp_path.rglob(".tmp-*"))
    assert (tmp_path / "model" / "config.json").read_text() == "new"
    assert not (tmp_path / "model.new").exists()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000004.pt", "step_00000008.pt.damaged"]
