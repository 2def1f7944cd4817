"""`python -m unept.train`: its presets, its help, and its errors in one line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from unept import train
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.presets import PRESETS
from unept.recipe import RecipeConfig


def test_no_argument_is_the_shapes_preset():
    assert train.parse([])[0] == "shapes"
    assert train.parse(["--lr", "0.5"]) == ("shapes", dataclasses.replace(PRESETS["shapes"](), lr=0.5))


@pytest.mark.parametrize("option", ["--category-cap", "--category_cap", "--cat-max-ratio"])
def test_renamed_option_keeps_its_old_name(option):
    for arguments in ([option, "0.5"], [f"{option}=0.5"]):
        assert train.parse(arguments)[1].data.cat_max_ratio == 0.5


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_help_explains_every_option(preset, capsys):
    with pytest.raises(SystemExit):
        train.parse([preset, "--help"])
    text = capsys.readouterr().out
    for part in (ModelConfig, DataConfig, RecipeConfig, TrainConfig):
        for field in dataclasses.fields(part):
            if field.name not in ("model", "data", "recipe"):
                assert f"--{field.name.replace('_', '-')}" in text or f"--no-{field.name.replace('_', '-')}" in text
    words = " ".join(text.replace("│", " ").split())
    for explanation in ("lambda_1..4 of Eq. 7", "Optimiser steps", "Mirror half of the training images"):
        assert explanation in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["campus", "--lr", "1"], r"there is no preset 'campus'; close names: camvid.*train --help lists"),
        (["--root", "d", "folder"], r"the preset comes first: python -m unept\.train folder --root \.\.\."),
        (["--no-flip", "folder", "--root", "d"], r"the preset comes first: python -m unept\.train folder --no-flip"),
        (["--check-data", "camvid"], r"the preset comes first: python -m unept\.train camvid --check-data"),
        (["--lr=1e-3", "camvid"], r"the preset comes first: python -m unept\.train camvid"),
    ],
)
def test_presets_that_are_not_found(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.parse(arguments)


def test_a_value_that_is_named_as_a_preset_is_none():
    assert train.parse(["--tracker", "none", "--out", "camvid"])[1].out == Path("camvid")


def test_errors_of_options_point_to_the_help_of_the_preset(capsys):
    for options in (["--lr", "-1"], ["--crop-size", "4", "4"], ["--no-such-option"]):
        with pytest.raises(SystemExit):
            train.parse(["camvid", *options])
        assert "python -m unept.train camvid --help" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_folder_is_one_line_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "unept.train", "camvid", "--root", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a run that could not start leaves nothing behind"
