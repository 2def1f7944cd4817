"""Every Triton kernel compiles for the GPUs that the project supports, whether or not one is here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import offline
import pytest


@pytest.fixture(scope="session")
def report():
    """The rows of tests/offline.py, from a process in which kernels are compiled rather than interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(offline.__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("op", offline.OPS)
def test_compiles(report, op, target):
    compiled = {row["dtype"] for row in report if row.get("op") == op and row.get("target") == target}
    assert compiled == set(offline.OPS[op][1])


@pytest.mark.parametrize("op", offline.OPS)
def test_a_configuration_keeps_everything_in_registers_on_sm_90(report, op):
    stacks: dict[tuple[str, str], list[int]] = {}
    for row in report:
        if row.get("op") == op and row.get("target") == "sm_90":
            print(row)
            stacks.setdefault((row["kernel"], row["dtype"]), []).append(row["stack"])
    assert stacks
    assert all(min(used) == 0 for used in stacks.values()), stacks


def test_no_kernel_is_left_out(report):
    assert {row["kernel"] for row in report[:-1]} == set(report[-1]["kernels"])


def test_autotuning_starts_from_zero_and_tells_sizes_apart(report):
    launches = [row for row in report if "key" in row]
    adding = {row["kernel"].split(".")[-1] for row in launches if row["added_into"]}
    assert adding == {"backward_kernel", "gather_backward_kernel", "losses_backward_kernel"}
    for row in launches:
        assert row["reset_to_zero"] == row["added_into"], row
        assert "size_class" in row["key"], row
