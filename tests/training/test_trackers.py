"""Weights & Biases and MLflow, offline and on disk; where a package is absent, one line says how to get it."""

import sys

import pytest

from tests.helpers import layouts
from tests.helpers.training import arguments
from unept import train
from unept.config import TrainConfig
from unept.recipe import RecipeConfig
from unept.training.recorder import Recorder
from unept.training.trackers import start_tracker


def config(tracker: str) -> TrainConfig:
    return TrainConfig(recipe=RecipeConfig(tracker=tracker), seed=7)


def record(folder, tracker: str, steps, after: int) -> None:
    """Record losses of steps as a run does that has completed the step `after` before."""
    recorder = Recorder(folder, after, tracker=start_tracker(config(tracker), folder))
    for step in steps:
        recorder.write({"step": step, "loss": 1 / step, "note": "not a number"})
    recorder.close()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_absent_package_is_named(tracker, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ValueError, match=rf'tracker is {tracker}, .* pip install "unept\[{tracker}\]"') as raised:
        start_tracker(config(tracker), tmp_path)
    assert "\n" not in str(raised.value)


def test_absent_package_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = layouts.shapes(tmp_path / "data", train=2, val=1)
    monkeypatch.chdir(tmp_path)
    options = arguments(data, "--workers", "0", "--device", "cpu", "--tracker", "wandb")
    for out in ([], ["--out", "run"]):
        with pytest.raises(ValueError, match="tracker is wandb, which is not installed"):
            train.train([*options, *out])
        assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_none_by_default(tmp_path):
    assert start_tracker(TrainConfig(), tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_mlflow(tmp_path, monkeypatch):
    """The options and the losses of a run, continued under the same id, read back by MLflow."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "camvid").mkdir()
    record(tmp_path / "camvid", "mlflow", [1, 2], after=0)
    record(tmp_path / "camvid", "mlflow", [3], after=2)
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("unept").experiment_id])
    assert (run.info.run_name, run.info.status) == ("camvid", "FINISHED")
    assert (run.data.params["seed"], run.data.params["d_model"], run.data.params["tracker"]) == ("7", "256", "mlflow")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {metric.step: metric.value for metric in history} == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}
    assert set(run.data.metrics) == {"loss"}


def test_wandb(tmp_path, monkeypatch):
    """An offline run, whose file holds the options and the losses."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "camvid").mkdir()
    record(tmp_path / "camvid", "wandb", [1, 2], after=0)
    wandb.teardown()  # its process writes the rest of the file when ours ends
    (log,) = (tmp_path / "camvid" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"camvid" in content
    assert b"segmentation_loss" in content
    assert b"loss" in content
    assert b"not a number" not in content
