"""The options of a run: which values they take, and what config.json may hold."""

import json
from pathlib import Path

import pytest

from unept.config import DataConfig, ModelConfig, TrainConfig


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (TrainConfig, {"batch_size": 6, "accumulate": 4}, "is not a multiple of accumulate"),
        (TrainConfig, {"iterations": 0}, "must be positive"),
        (TrainConfig, {"batch_size": 0}, "must be positive"),
        (TrainConfig, {"num_samples": -1}, "0 or more"),
        (TrainConfig, {"window": 100}, "window is 100; it must be a positive multiple of 8"),
        (TrainConfig, {"refine_scale": 128}, "between 1 and 127"),
        (TrainConfig, {"refine_steps": 0}, "refine_steps is 0; it must be positive"),
        (TrainConfig, {"ema": 1.0}, "ema is 1.0"),
        (TrainConfig, {"class_weights": (-1.0,)}, "class_weights are"),
        (DataConfig, {"crop_size": (4, 64)}, "at least 8 pixels"),
        (DataConfig, {"dataset": "shapes", "root": Path("x")}, "omit --root"),
        (ModelConfig, {"dropout": 1.0}, r"must be in \[0, 1\)"),
        (ModelConfig, {"d_model": 100}, "is not a multiple of num_heads"),
    ],
)
def test_bad_options(part, options, message):
    with pytest.raises(ValueError, match=message):
        part(**options)


def test_config_of_another_version_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "data": {}, "momentum": 0.9}))
    with pytest.raises(ValueError, match="does not know: momentum"):
        TrainConfig.from_json(tmp_path / "config.json")


def test_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        TrainConfig.from_json(tmp_path / "config.json")


def test_config_with_an_old_name_is_read(tmp_path):
    """`category_cap` was renamed to `cat_max_ratio`."""
    config = TrainConfig(data=DataConfig(cat_max_ratio=0.5))
    stored = json.loads(config.to_json())
    stored["data"]["category_cap"] = stored["data"].pop("cat_max_ratio")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert TrainConfig.from_json(tmp_path / "config.json") == config
