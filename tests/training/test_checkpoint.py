"""Checkpoints survive a killed run, a full disk and damage of any kind; those of older versions are read."""

import os
import pickle
import random
import warnings

import pytest
import torch

from tests.helpers.states import training_state
from unept.training import checkpoint
from unept.training.state import TrainingState

CPU = torch.device("cpu")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    checkpoint.save_checkpoint(folder, training_state(1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*step_00000002\.pt.*intact"):
        checkpoint.save_checkpoint(folder, training_state(2))
    assert names(folder) == ["step_00000001.pt"]
    assert checkpoint.load_latest(folder, CPU).step == 1


def test_torn_checkpoint_falls_back_to_the_one_before(tmp_path):
    for step in (1, 2):
        path = checkpoint.save_checkpoint(tmp_path, training_state(step))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.warns(UserWarning, match=r"step_00000002\.pt is damaged"):
        assert checkpoint.load_latest(tmp_path, CPU).step == 1
    first = checkpoint.checkpoints(tmp_path)[0]
    first.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="none of the 2 checkpoints"):
        checkpoint.load_latest(tmp_path, CPU)


def test_damage_anywhere_in_a_checkpoint_is_noticed_or_harmless(tmp_path):
    """Single bits and zeroed pages: PyTorch alone reads three in four of such files without a word."""
    for step in (1, 2):
        path = checkpoint.save_checkpoint(tmp_path, training_state(step))
    whole, chosen, fallen_back = path.read_bytes(), random.Random(0), 0
    for i in range(60):
        content, place = bytearray(whole), chosen.randrange(len(whole))
        if i % 4:
            content[place] ^= 1 << chosen.randrange(8)
        else:
            content[place - place % 4096 : place - place % 4096 + 4096] = bytes(4096)
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            state = checkpoint.load_latest(tmp_path, CPU)
        fallen_back += state.step == 1
        assert (state.step == 1) == any("is damaged" in str(warning.message) for warning in warned)
        assert torch.equal(state.model["weight"], torch.full((1000,), float(state.step)))
    assert fallen_back > 40


@pytest.mark.parametrize("kind", ["folder", "dangling link", "fifo", "empty", "text", "other state", "not finite"])
def test_whatever_is_named_like_a_checkpoint_is_set_aside(tmp_path, kind):
    good, odd = checkpoint.save_checkpoint(tmp_path, training_state(1)), tmp_path / "step_00000002.pt"
    if kind == "folder":
        odd.mkdir()
    elif kind == "dangling link":
        odd.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(odd)
    elif kind == "other state":
        torch.save({"step": 2}, odd)
    elif kind == "not finite":
        state = training_state(2).to_dict()
        state["model"]["weight"][7] = float("nan")
        torch.save(state, odd)
    else:
        odd.write_text("" if kind == "empty" else "no checkpoint \udce9", errors="surrogateescape")
    (tmp_path / "step_best.pt").write_text("of the user")
    with pytest.warns(UserWarning, match=r"step_00000002\.pt is damaged"):
        assert checkpoint.load_latest(tmp_path, CPU).step == 1
    checkpoint.set_aside(tmp_path, 1)
    assert names(tmp_path) == [good.name, "step_00000002.pt.damaged", "step_best.pt"]
    for step in (2, 3):  # the run goes on, and no good checkpoint gives way to the odd one
        checkpoint.save_checkpoint(tmp_path, training_state(step))
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [2, 3]


@pytest.mark.parametrize("error", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"), KeyError("x"), RecursionError()])
def test_no_exception_hides_the_older_checkpoint(tmp_path, monkeypatch, error):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, training_state(step))
    load = torch.load

    def failing(path, **options):
        if "step_00000002" in str(path):
            raise error
        return load(path, **options)

    monkeypatch.setattr(torch, "load", failing)
    with pytest.warns(UserWarning, match=r"step_00000002\.pt is damaged"):
        assert checkpoint.load_latest(tmp_path, CPU).step == 1
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(MemoryError, match=r"while reading .*step_00000002\.pt"):  # the file is good
        checkpoint.load_latest(tmp_path, CPU)


@pytest.mark.parametrize("part", ["model", "averaged", "optimizer"])
def test_state_that_is_not_finite_is_not_saved(tmp_path, part):
    checkpoint.save_checkpoint(tmp_path, training_state(1))
    bad = torch.tensor([1.0, float("inf")])
    state = training_state(2, **{part: {"state": {3: {"exp_avg": bad}}} if part == "optimizer" else {"w": bad}})
    with pytest.raises(FloatingPointError, match=r"not finite after step 2: 1 of \d tensors, such as .*(w|exp_avg)"):
        checkpoint.save_checkpoint(tmp_path, state)
    assert names(tmp_path) == ["step_00000001.pt"]


def test_checkpoint_with_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "executed"),))

    torch.save({"step": Payload()}, tmp_path / "step_00000001.pt")
    (tmp_path / "step_00000002.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="can be read"):
        checkpoint.load_latest(tmp_path, CPU)
    assert not (tmp_path / "executed").exists()


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save_checkpoint(tmp_path, training_state(step))
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000003.pt", "step_00000010.pt"]


def test_what_is_saved_is_said_as_it_is(tmp_path):
    assert checkpoint.describe_saved(tmp_path).startswith("Nothing has been saved")
    checkpoint.save_checkpoint(tmp_path / "checkpoints", training_state(3))
    text = checkpoint.describe_saved(tmp_path)
    assert text.startswith("The checkpoint of step 3 is in")
    assert "model" not in text.replace(str(tmp_path), "")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "The checkpoint of step 3 and the best model so far are in" in checkpoint.describe_saved(tmp_path)


def test_state_of_an_older_version_is_read():
    """It has the losses of a step in one tensor, without their names."""
    losses = {"loss": 4.0, "segmentation": 1.0, "refined": 0.5, "boundary": 0.25, "direction": 0.125}
    state = training_state(7, loss_history=[{name: torch.tensor(loss) for name, loss in losses.items()}])
    old = state.to_dict()
    for name in ("loss_history", "averaged", "evaluated"):
        del old[name]
    for names_then in (list(losses), list(losses)[:2]):  # a model without a spatial branch has two
        old["pending"] = [torch.tensor([losses[name] for name in names_then])]
        read = TrainingState.from_dict(old)
        assert read.loss_history == [{name: state.loss_history[0][name] for name in names_then}]
        assert (read.step, read.classes, read.best, read.skipped) == (7, ["a", "b"], 0.5, 1)
        assert (read.averaged, read.evaluated) == (None, True)
    assert TrainingState.from_dict(state.to_dict()) == state
