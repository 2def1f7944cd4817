"""Checkpoints survive a killed run, a full disk and a torn file; those of older versions are read."""

import os

import pytest
import torch

from unept.training import checkpoint
from unept.training.checkpoint import TrainingState


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    checkpoint.save_checkpoint(folder, 1, {"step": 1, "weight": torch.ones(3)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*step_00000002\.pt.*intact"):
        checkpoint.save_checkpoint(folder, 2, {"step": 2, "weight": torch.zeros(3)})
    assert [p.name for p in folder.iterdir()] == ["step_00000001.pt"]
    assert checkpoint.load_latest(folder, torch.device("cpu"))["step"] == 1


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    for step in (1, 2):
        path = checkpoint.save_checkpoint(tmp_path, step, {"step": step, "weight": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.warns(UserWarning, match=r"step_00000002\.pt is damaged"):
        assert checkpoint.load_latest(tmp_path, torch.device("cpu"))["step"] == 1
    first = checkpoint.checkpoints(tmp_path)[0]
    first.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="none of the 2 checkpoints"):
        checkpoint.load_latest(tmp_path, torch.device("cpu"))


def test_checkpoint_with_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "executed"),))

    torch.save({"step": Payload()}, tmp_path / "step_00000001.pt")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="can be read"):
        checkpoint.load_latest(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step})
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000003.pt", "step_00000010.pt"]


def test_state_of_an_older_version_is_read():
    """It has the losses of a step in one tensor, without their names."""
    losses = {"loss": 4.0, "segmentation": 1.0, "refined": 0.5, "boundary": 0.25, "direction": 0.125}
    state = TrainingState(
        step=7,
        classes=["a", "b"],
        model={"weight": torch.ones(2)},
        optimizer={},
        scheduler={"last_epoch": 7},
        loss_history=[{name: torch.tensor(loss) for name, loss in losses.items()}],
        best=0.5,
        skipped=1,
    )
    old = state.to_dict()
    del old["loss_history"]
    for names in (list(losses), list(losses)[:2]):  # a model without a spatial branch has two
        old["pending"] = [torch.tensor([losses[name] for name in names])]
        read = TrainingState.from_dict(old)
        assert read.loss_history == [{name: state.loss_history[0][name] for name in names}]
        assert (read.step, read.classes, read.best, read.skipped) == (7, ["a", "b"], 0.5, 1)
    assert TrainingState.from_dict(state.to_dict()) == state
