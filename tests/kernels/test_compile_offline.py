"""Every Triton kernel compiles for the GPUs that the project supports, whether or not one is here."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import triton

from tests.helpers import offline

# What is compiled: the paper's kernels in their first configuration for one GPU, or everything.
OF_THE_PAPER = [pytest.param("paper", op, id=op) for op in offline.OF_THE_PAPER]
EVERYTHING = [pytest.param("everything", op, id=f"all-{op}", marks=pytest.mark.exhaustive) for op in offline.OPS]
every_op = pytest.mark.parametrize(("selection", "op"), [*OF_THE_PAPER, *EVERYTHING])


@pytest.fixture(scope="session")
def reports():
    """The rows of a selection; they are made once."""
    return cache(lambda selection: rows(*["--all"] if selection == "everything" else []))


def rows(*options: str) -> list[dict[str, Any]]:
    """The rows of tests/helpers/offline.py, from a process in which kernels are compiled rather than interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.offline", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@every_op
def test_compiles(reports, selection, op):
    for target in offline.TARGETS if selection == "everything" else ["sm_90"]:
        assert compiled(reports(selection), op, target) == set(offline.OPS[op][1])


def compiled(report, op: str, target: str) -> set[str]:
    """The dtypes for which an op's kernels were compiled."""
    return {row["dtype"] for row in report if row.get("op") == op and row.get("target") == target}


def on_sm_90(report, op: str) -> list[dict[str, Any]]:
    """The rows of an op on sm_90, at least one; they are printed for the report of a failure."""
    rows = [row for row in report if row.get("op") == op and row.get("target") == "sm_90"]
    for row in rows:
        print(row)
    assert rows
    return rows


@every_op
def test_hot_loops_keep_everything_in_registers(reports, selection, op):
    first: dict[tuple[str, str, int], int] = {}
    for row in on_sm_90(reports(selection), op):
        if op == "sparse_sampling, widest":  # a warp then holds a thousand channels
            continue
        assert not {"LDL", "STL"} & {opcode.split(".")[0] for opcode in row["opcodes"]}, row
        first.setdefault((row["kernel"], row["dtype"], row["launch"]), row["stack"])
    for (kernel, dtype, _), stack in first.items():
        # Outside the hot loop the assembler may put aside a few values, to fit more programs on a multiprocessor.
        allowed = 0 if op in offline.OF_THE_PAPER and dtype == "bf16" else 32
        assert stack <= allowed, (kernel, dtype, stack)


@every_op
def test_shared_memory_suffices_and_compiling_takes_seconds(reports, selection, op):
    for row in [row for row in reports(selection) if row.get("op") == op and "seconds" in row]:
        assert row["shared"] <= offline.SHARED_MEMORY[row["target"]], row
        assert row["seconds"] < 20, row


@every_op
def test_no_addition_is_a_loop_of_compare_and_swap(reports, selection, op):
    assert not any(row["compare_and_swap"] for row in on_sm_90(reports(selection), op))


@every_op
def test_no_kernel_tests_by_exact_cancellation(reports, selection, op):
    # `x - x` is not zero where x is a product that the compiler contracts: fma(a, b, -(a * b)).
    assert not any(row["differences"] for row in on_sm_90(reports(selection), op))


@pytest.mark.parametrize(
    ("selection", "op"),
    [
        ("paper", "sparse_sampling"),
        *(
            pytest.param("everything", op, marks=pytest.mark.exhaustive)
            for op in offline.OPS
            if op.startswith(("sparse", "ms"))
        ),
    ],
)
def test_every_lane_of_a_sum_over_lanes_has_the_same_bits(reports, selection, op):
    # A sum over points is a butterfly of lanes, and each lane stores its copy of the sum: products that the compiler
    # fuses into it make the copies differ. A sum over channels of padded maps is of several in each lane.
    rows = [row for row in on_sm_90(reports(selection), op) if row["kernel"].endswith("points_backward_kernel")]
    assert rows
    for row in rows:
        assert not set(row["summed_products"]) - ({2} if "masked" not in op else set()), row


@pytest.mark.parametrize(
    ("selection", "op"),
    [
        ("paper", "sparse_sampling"),
        *(
            pytest.param("everything", op, marks=pytest.mark.exhaustive)
            for op in ("sparse_sampling", "sparse_sampling, masked", "ms_deform")
        ),
    ],
)
def test_attention_gathers_16_bytes_at_a_time(reports, selection, op):
    report = on_sm_90(reports(selection), op)
    gathering = [row for row in report if "forward_kernel" in row["kernel"] or "points_" in row["kernel"]]
    assert gathering
    for row in gathering:
        config, bytes_a_row = row["config"], 32 * {"bf16": 2, "fp32": 4}[row["dtype"]]
        rows_a_warp = 4 * config["BLOCK_Q"] * config["BLOCK_N"] / config["num_warps"]
        assert row["opcodes"]["LDG.E.128"] == rows_a_warp * bytes_a_row / 16 / 32, row


@pytest.mark.exhaustive
def test_attention_adds_16_bytes_at_a_time(reports):
    adding = [row for row in on_sm_90(reports("everything"), "sparse_sampling, masked") if "scatter" in row["kernel"]]
    assert adding
    for row in adding:
        (opcode,) = [name for name in row["opcodes"] if name.startswith("RED")]
        assert "F32x4" in opcode, row


@every_op
def test_a_thread_reads_after_a_barrier_what_it_wrote_itself(reports, selection, op):
    # On AMD's GPUs a barrier is no fence for memory: what another thread wrote may not be there yet.
    rows = [row for row in reports(selection) if row.get("op") == op and row.get("layouts_across_barrier")]
    assert bool(rows) == (op.startswith("sparse_sampling"))
    for row in rows:
        assert len(row["layouts_across_barrier"]) == 1, row


@every_op
def test_instruction_counts_are_those_recorded(reports, selection, op):
    """At most 10 % more than in instructions.json; `python -m tests.helpers.offline --all --record` writes it anew."""
    recorded = json.loads(offline.RECORD.read_text())
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    known = [name for name in recorded if tuple(map(int, name.split("."))) <= version]
    if not known:
        pytest.skip(f"no counts are recorded for Triton {triton.__version__} or an earlier version")
    limits = recorded[max(known, key=lambda name: tuple(map(int, name.split("."))))]
    now = {offline.record_key(row): row["instructions"] for row in on_sm_90(reports(selection), op)}
    assert set(now) <= set(limits), "new configurations: record them"
    worse = {key: (count, limits[key]) for key, count in now.items() if count > 1.1 * limits[key]}
    assert not worse


def test_no_kernel_is_left_out(reports):
    """All kernels are launched by some op; `pytest -m exhaustive` compiles all that is launched."""
    report = reports("paper")
    assert {row["kernel"] for row in report[:-1]} == set(report[-1]["kernels"])


@pytest.mark.exhaustive
def test_every_launch_is_compiled(reports):
    report = reports("everything")
    launches = {(row["op"], row["kernel"], row["dtype"]) for row in report if "key" in row}
    assert launches == {(row["op"], row["kernel"], row["dtype"]) for row in report if row.get("target") == "sm_90"}


def test_autotuning_starts_from_zero_and_tells_sizes_apart(reports):
    launches = [row for row in reports("paper") if "key" in row]
    assert {row["op"] for row in launches} == set(offline.OPS)
    adding = {row["kernel"].split(".")[-1] for row in launches if row["added_into"]}
    assert adding == {"scatter_backward_kernel", "gather_backward_kernel", "losses_backward_kernel"}
    for row in launches:
        assert row["reset_to_zero"] == row["added_into"], row
        assert row["says_fusion"], row
        assert "size_bucket" in row["key"] or not row["key"], row
        # Triton writes choices to disk as JSON, only where there is a GPU to choose for.
        assert all(isinstance(value, bool | int | str) for value in row["key_values"]), row
