"""The comparison by machine instructions: its arithmetic here, its command among the exhaustive tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import static_counts
from bench.static_counts import Count, atomics_of

ROOT = Path(__file__).parents[2]


def test_atomics_per_sample():
    config = {"BLOCK_Q": 32, "BLOCK_N": 2, "num_warps": 4}  # 16 samples for each warp
    row = {"config": config, "opcodes": {"REDG.E.ADD": 3, "ATOMG.E.ADD": 1, "LDG.E": 9}}
    assert atomics_of("backward_kernel", row) == 4 / 16
    assert atomics_of("bin_backward_kernel", row) == 1 / 32
    assert atomics_of("forward_kernel", {"config": config, "opcodes": {"LDG.E": 9}}) == 0
    assert Count("a", "float32", "forward", 11.44, 0.5).row() == "| a | float32 | forward | 11.4 | 0.50 |"


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set: unset it"):
        static_counts.main()


@pytest.mark.exhaustive
def test_the_command():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "bench.static_counts"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    ours = {(dtype, direction): float(count) for name, dtype, direction, count, _ in rows if name.startswith("unept")}
    assert len(ours) == 4
    assert ours["bfloat16", "forward"] < 13
    assert ours["bfloat16", "backward"] < 33
    assert any(name.startswith("deformops") for name, *_ in rows) or "without deformops" in done.stderr
