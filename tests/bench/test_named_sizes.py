"""The table of named sizes."""

import re

import pytest

from bench import named_sizes


def test_the_table_has_the_documented_counts_and_a_rate_of_each_precision(monkeypatch, capsys):
    arguments = ["unept_tiny", "--size", "64", "64", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["bench.named_sizes", *arguments])
    named_sizes.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| `unept_tiny`"))
    parameters, gmacs, *rates = (float(cell) for cell in re.findall(r"\| ([\d.]+)", row))
    assert (parameters, gmacs) == (4.4, 7.5), "docs/choose_a_backbone.md has these"
    assert len(rates) == 2
    assert min(rates) > 0


@pytest.mark.parametrize(("name", "parameters", "gmacs"), [("unept_small", 7.6, 20.5), ("unept_resnet50", 30.8, 134.1)])
def test_the_documented_counts_are_those_of_the_sizes(name, parameters, gmacs):
    assert named_sizes.count(name) == pytest.approx((parameters, gmacs), abs=0.05)
