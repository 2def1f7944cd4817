"""Which folder a run goes to, and when it continues the run in it."""

from pathlib import Path

import pytest

from unept.config import TrainConfig
from unept.training.run_folder import choose_run_folder, should_resume


def test_existing_run_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"--resume auto.*--out"):
        choose_run_folder(TrainConfig(out=tmp_path / "run"), "shapes")
    assert choose_run_folder(TrainConfig(out=tmp_path / "run", resume="auto"), "shapes") == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert choose_run_folder(TrainConfig(), "shapes") == Path("runs/shapes")
    for name in ("shapes", "shapes-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert choose_run_folder(TrainConfig(), "shapes") == Path("runs/shapes-3")
    assert choose_run_folder(TrainConfig(resume="auto"), "shapes") == Path("runs/shapes-2")


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
