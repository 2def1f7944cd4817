"""The table of datasets: its rows fit the classes that they name, and the options of a run follow from them."""

import dataclasses
import inspect

import pytest
import tyro

from unept.config import DataConfig
from unept.data import DATASETS


@pytest.mark.parametrize("name", DATASETS)
def test_a_row_names_options_that_its_class_and_a_run_have(name):
    entry = DATASETS[name]
    own = set(inspect.signature(entry.create).parameters) - {"root", "split"}
    assert set(entry.options) <= own & {field.name for field in dataclasses.fields(DataConfig)}
    assert entry.in_memory or set(entry.options) == own  # what can be read can be set


def test_titles_differ():
    assert len({entry.title for entry in DATASETS.values()}) == len(DATASETS)


def test_the_command_line_takes_the_rows_and_the_help_names_them(capsys):
    assert all(tyro.cli(DataConfig, args=["--dataset", name]).dataset == name for name in DATASETS)
    with pytest.raises(SystemExit):
        tyro.cli(DataConfig, args=["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in DATASETS)


def test_a_config_of_an_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match="there is no dataset 'coco'; the datasets are shapes, camvid"):
        DataConfig(dataset="coco")
