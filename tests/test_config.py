"""The options of a run: which values they take, and what config.json may hold."""

import json
import os
from pathlib import Path

import pytest

from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.evaluate import EvaluateConfig


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
        (ModelConfig, {"num_heads": 0}, "num_heads is 0; it must be from 1 to 1024"),
        (ModelConfig, {"num_points": -4}, "num_points is -4; it must be from 1"),
        (ModelConfig, {"output_stride": 7}, "output_stride is 7; it must be 8, 16 or 32"),
        (ModelConfig, {"num_encoder_layers": 10**9}, "num_encoder_layers is 1000000000; it must be from 0 to 64"),
        (ModelConfig, {"d_model": 8192, "ffn_dim": 65536}, "the transformer would have 4 billion parameters"),
        (ModelConfig, {"ffn_dim": 2.5}, "ffn_dim is 2.5; it must be a whole number"),
        (ModelConfig, {"dropout": float("nan")}, "dropout is nan; it must be a finite number"),
        (TrainConfig, {"lr": -1.0}, "lr is -1.0; it must be positive"),
        (TrainConfig, {"lr": float("inf")}, "lr is inf; it must be a finite number"),
        (TrainConfig, {"backbone_lr": -1e-5}, "backbone_lr is -1e-05; it must be 0 or more"),
        (TrainConfig, {"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        (TrainConfig, {"seed": -1}, "seed is -1"),
        (TrainConfig, {"amp": "evil"}, "amp is 'evil'; it must be 'auto' or 'bf16' or 'off'"),
        (TrainConfig, {"iterations": True}, "iterations is True; it must be a whole number"),
        (TrainConfig, {"loss_weights": (1.0, -1.0, 1.0, 1.0)}, "the weight of the loss 'refined' is -1.0"),
        (TrainConfig, {"model": {"d_model": 8}}, "model is .* it must be of type ModelConfig"),
        (DataConfig, {"crop_size": (64, 64, 3)}, "crop_size is .* it must be 2 values, each a whole number"),
        (
            DataConfig,
            {"dataset": "camvid", "root": Path("x"), "label_ids": ("0=0",)},
            "an option of the data set 'folder'",
        ),
        (DataConfig, {"short_side": 0}, "short_side is 0; it must be from 8"),
        (DataConfig, {"long_side": 1 << 20}, "long_side is 1048576; it must be from 8"),
        (
            DataConfig,
            {"short_side": 64, "long_side": 80},
            "short_side is 64 and long_side 80; give one of them, and None for the other",
        ),
        (ModelConfig, {"attention": "performer"}, "attention is 'performer'; it must be 'sparse_sampling' or 'full'"),
        (ModelConfig, {"num_directions": 7}, "num_directions is 7; it must be an even number from 4 to 254"),
        (ModelConfig, {"num_directions": 256}, "num_directions is 256; it must be from 4 to 254"),
        (ModelConfig, {"spatial_widths": (64,)}, "spatial_widths is .* it must be 2 values, each a whole number"),
        (ModelConfig, {"spatial_widths": (64, 0)}, "a number of spatial_widths is 0; it must be from 1 to 8192"),
        (ModelConfig, {"scale_encoding_std": -1.0}, "scale_encoding_std is -1.0; it must be from 0 to"),
        (ModelConfig, {"level_norm": 1}, "level_norm is 1; it must be true or false"),
        (ModelConfig, {"position_resize": "nearest"}, "position_resize is 'nearest'; it must be 'bicubic' or"),
        (TrainConfig, {"lr_drop": 1.5}, r"lr_drop is 1.5; it must be in \(0, 1\]"),
        (TrainConfig, {"direction_pixels": "all"}, "direction_pixels is 'all'; it must be 'true' or 'predicted'"),
        (TrainConfig, {"boundary_balance": "focal"}, "boundary_balance is 'focal'; it must be 'none' or 'classes'"),
    ],
)
def test_bad_options(part, options, message):
    with pytest.raises(ValueError, match=message):
        part(**options)


def test_config_of_another_version_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "data": {}, "momentum": 0.9}))
    with pytest.raises(ValueError, match="does not know: momentum"):
        TrainConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"lr": ', "is damaged"),
        (b"\xff\xfe{", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"null", "its content is None; it must be of type dict"),
        (b"[1, 2]", r"its content is \[1, 2\]"),
        (b'{"model": 3}', "the part for ModelConfig is 3"),
        (b'{"lr": "fast"}', "lr is 'fast'; it must be a finite number"),
        (b'{"lr": null}', "lr is None"),
        (b'{"lr": NaN}', "lr is nan"),
        (b'{"data": {"crop_size": "480"}}', "crop_size is '480'"),
        (b'{"loss_weights": 7}', "weights are 7"),
        (b'{"loss_weights": {"refined": []}}', r"refined is \[\]; it must be a finite number"),
        (b'{"amp": {"evil": 1}}', "amp is {'evil': 1}"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_damaged_config_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}") as error:
        TrainConfig.from_json(tmp_path / "config.json")
    assert len(str(error.value)) < 500


def test_config_with_an_old_name_is_read(tmp_path):
    """`category_cap` was renamed to `cat_max_ratio`."""
    config = TrainConfig(data=DataConfig(cat_max_ratio=0.5))
    stored = json.loads(config.to_json())
    stored["data"]["category_cap"] = stored["data"].pop("cat_max_ratio")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert TrainConfig.from_json(tmp_path / "config.json") == config


def test_as_many_workers_as_each_process_has_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(24))
    for processes, expected in (("1", 8), ("8", 3), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert DataConfig().workers == EvaluateConfig(Path("run")).workers == expected
