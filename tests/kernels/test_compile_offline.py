"""Every Triton kernel compiles for the GPUs that the project supports, whether or not one is here."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import triton

from tests.helpers import offline

pytestmark = pytest.mark.xdist_group("compile_offline")  # the report takes minutes


@pytest.fixture(scope="session")
def report():
    return rows()


def rows(*options: str) -> list[dict[str, Any]]:
    """The rows of tests/helpers/offline.py, from a process in which kernels are compiled rather than interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.offline", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("op", offline.OPS)
def test_compiles(report, op, target):
    dtypes = offline.OPS[op][1]
    assert compiled(report, op, target) == set(dtypes if target == "sm_90" else dtypes[:1])


def compiled(report, op: str, target: str) -> set[str]:
    """The dtypes for which an op's kernels were compiled."""
    return {row["dtype"] for row in report if row.get("op") == op and row.get("target") == target}


@pytest.mark.slow
def test_every_configuration_on_every_target():
    report = rows("--all")
    for op, (_, dtypes) in offline.OPS.items():
        check_hot_loops(report, op)
        for target in offline.TARGETS:
            assert compiled(report, op, target) == set(dtypes), (op, target)


def on_sm_90(report, op: str) -> list[dict[str, Any]]:
    rows = [row for row in report if row.get("op") == op and row.get("target") == "sm_90"]
    for row in rows:
        print(row)
    assert rows
    return rows


@pytest.mark.parametrize("op", offline.OPS)
def test_hot_loops_keep_everything_in_registers(report, op):
    check_hot_loops(report, op)


def check_hot_loops(report, op: str) -> None:
    first: dict[tuple[str, str, int], int] = {}
    for row in on_sm_90(report, op):
        assert not {"LDL", "STL"} & {opcode.split(".")[0] for opcode in row["opcodes"]}, row
        first.setdefault((row["kernel"], row["dtype"], row["launch"]), row["stack"])
    for (kernel, dtype, _), stack in first.items():
        # Outside the hot loop the assembler may put aside a few values, to fit more programs on a multiprocessor.
        assert stack <= (0 if op in offline.OF_THE_PAPER and dtype == "bf16" else 32), (kernel, dtype, stack)


@pytest.mark.parametrize("op", offline.OPS)
def test_no_addition_is_a_loop_of_compare_and_swap(report, op):
    assert not any(row["compare_and_swap"] for row in on_sm_90(report, op))


@pytest.mark.parametrize("op", offline.OPS)
def test_no_kernel_tests_by_exact_cancellation(report, op):
    # `x - x` is not zero where x is a product that the compiler contracts: fma(a, b, -(a * b)).
    assert not any(row["differences"] for row in on_sm_90(report, op))


@pytest.mark.parametrize("op", ["sparse_sampling", "sparse_sampling, masked", "ms_deform"])
def test_attention_gathers_16_bytes_at_a_time(report, op):
    gathering = [r for r in on_sm_90(report, op) if "forward_kernel" in r["kernel"] or "points_" in r["kernel"]]
    assert gathering
    for row in gathering:
        config, bytes_a_row = row["config"], 32 * {"bf16": 2, "fp32": 4}[row["dtype"]]
        rows_a_warp = 4 * config["BLOCK_Q"] * config["BLOCK_N"] / config["num_warps"]
        assert row["opcodes"]["LDG.E.128"] == rows_a_warp * bytes_a_row / 16 / 32, row


def test_attention_adds_16_bytes_at_a_time(report):
    adding = [r for r in on_sm_90(report, "sparse_sampling, masked") if "scatter" in r["kernel"]]
    assert adding
    for row in adding:
        (opcode,) = [name for name in row["opcodes"] if name.startswith("RED")]
        assert "F32x4" in opcode, row


@pytest.mark.parametrize("op", offline.OPS)
def test_instruction_counts_are_those_recorded(report, op):
    """At most 10 % more than recorded; `python -m tests.helpers.offline --all --record` records the counts anew."""
    recorded = json.loads(offline.RECORD.read_text())
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    known = [name for name in recorded if tuple(map(int, name.split("."))) <= version]
    limits = recorded[max(known, key=lambda name: tuple(map(int, name.split("."))))]
    now = {offline.record_key(row): row["instructions"] for row in on_sm_90(report, op)}
    assert set(now) <= set(limits), "new configurations: record them"
    worse = {key: (count, limits[key]) for key, count in now.items() if count > 1.1 * limits[key]}
    assert not worse


def test_no_kernel_is_left_out(report):
    assert {row["kernel"] for row in report[:-1]} == set(report[-1]["kernels"])


def test_autotuning_starts_from_zero_and_tells_sizes_apart(report):
    launches = [row for row in report if "key" in row]
    adding = {row["kernel"].split(".")[-1] for row in launches if row["added_into"]}
    assert adding == {"scatter_backward_kernel", "gather_backward_kernel", "losses_backward_kernel"}
    for row in launches:
        assert row["reset_to_zero"] == row["added_into"], row
        assert "size_bucket" in row["key"] or not row["key"], row
        # Triton writes choices to disk as JSON, only where there is a GPU to choose for.
        assert all(isinstance(value, bool | int | str) for value in row["key_values"]), row
