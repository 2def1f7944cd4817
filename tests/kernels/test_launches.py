"""The path to a launch, on a GPU that is not there: what binds, what is compiled, and what a training step launches."""

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

HAS_COMPILER = shutil.which("gcc") and (Path(triton.__file__).parent / "backends/nvidia/include/cuda.h").exists()

# Launches of a training step of the network in tests/helpers/launches.py: of 6 layers of attention, 3 losses and the
# boundaries of the labels. Fewer are better; more have to be meant.
STEP = {
    "pad_kernel": 8,
    "forward_kernel": 6,
    "points_backward_kernel": 6,
    "bin_backward_kernel": 12,
    "window_backward_kernel": 6,
    "losses_kernel": 3,
    "losses_backward_kernel": 3,
    "argmax_kernel": 1,
    "column_kernel": 1,
    "row_kernel": 1,
    "direction_kernel": 1,
}
# Compilations of the first step: the maps are read in two forms, pairs of samples counted and written.
COMPILED = {
    "pad_kernel": 1,
    "forward_kernel": 2,
    "points_backward_kernel": 2,
    "bin_backward_kernel": 2,
    "window_backward_kernel": 1,
    "losses_kernel": 2,
    "losses_backward_kernel": 2,
    "argmax_kernel": 1,
    "column_kernel": 1,
    "row_kernel": 1,
    "direction_kernel": 1,
}


def environment(cache: Path, tune: bool = True) -> dict[str, str]:
    """The environment of a process that interprets no kernels."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "UNEPT_AUTOTUNE": str(int(tune)), "TRITON_CACHE_DIR": str(cache)}


def launched(cache: Path, *options: str, tune: bool = False) -> tuple[list[dict[str, Any]], str]:
    """The rows of tests/helpers/launches.py, and what it wrote to stderr."""
    command = [sys.executable, "-m", "tests.helpers.launches", *options]
    done = subprocess.run(command, env=environment(cache, tune), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def untuned(tmp_path_factory):
    """The rows of all scenarios, nothing compiled or tuned."""
    rows, _ = launched(tmp_path_factory.mktemp("cache"))
    return lambda scenario: [row for row in rows if row["scenario"] == scenario]


@pytest.mark.parametrize("scenario", ["attention", "gather", "losses", "boundary"])
def test_every_call_launches_and_compiles_once(untuned, scenario):
    rows = untuned(scenario)
    assert len(rows) >= 8
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["launches"] == second["launches"], first
        assert first["launches"], first
        assert not second["compilations"], second


def test_another_size_of_image_or_number_of_classes_compiles_nothing(untuned):
    for scenario in ("sizes", "training"):
        first, *others = untuned(scenario)
        assert first["compilations"]
        compiled = collections.Counter()
        for row in others:
            compiled.update(row["compilations"])
        # Labels are read several at a time where each row begins at a multiple of 16: one more kernel each.
        assert set(compiled) <= {"column_kernel", "row_kernel", "direction_kernel"}
        assert set(compiled.values()) <= {1}


def test_launches_and_compilations_of_a_training_step(untuned):
    first, second, *_ = untuned("training")
    assert second["launches"] == STEP
    assert first["compilations"] == COMPILED


@pytest.mark.slow
def test_a_second_process_takes_its_choices_from_disk(tmp_path):
    rows, said = launched(tmp_path, "sizes", tune=True)
    assert said.count("Compiling and timing kernels for this GPU") == 1
    assert rows[0]["compilations"]["gather_kernel"] == 3, "each configuration is compiled once"
    again, said = launched(tmp_path, "sizes", tune=True)
    assert not said
    assert again[0]["compilations"]["gather_kernel"] == 1
    assert sum(again[0]["launches"].values()) < 40


# Compiles nothing, but waits in each compilation of the kernel until three are there.
AT_ONCE = """
import os, threading
os.sched_getaffinity = lambda process: set(range(8))
import triton
from tests.helpers import launches, stub_gpu
log = stub_gpu.install()
compile_kernel, three = triton.compiler.compile, threading.Barrier(3)
def compile_at_once(source, *args, **options):
    if source.name == "gather_kernel" and log.compilations["gather_kernel"] < 3:
        three.wait(timeout=60)
    return compile_kernel(source, *args, **options)
triton.compiler.compile = compile_at_once
launches.gather(6, 7, needs=(False, False))
print(log.compilations["gather_kernel"], three.broken)
"""


@pytest.mark.slow
def test_the_configurations_of_a_pool_are_compiled_at_the_same_time(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["3", "False"], done.stderr[-4000:]


@pytest.mark.skipif(not HAS_COMPILER, reason="the stub of libcuda needs gcc and the header that Triton brings")
@pytest.mark.exhaustive
def test_triton_s_own_launcher_takes_every_call(tmp_path):
    scenarios = ("boundary", "attention", "gather", "losses", "sizes", "training")
    rows, _ = launched(tmp_path, "--compile", *scenarios)
    assert {row["scenario"] for row in rows} == set(scenarios)
    assert not [row for row in rows if row["repeat"] and row["compilations"]]
