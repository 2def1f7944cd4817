"""The path to a launch, on a GPU that is not there: what binds, what is compiled, and what a training step launches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.helpers import layouts

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
# PyTorch's own operators that those of the package call in a step: fewer are better.
ATEN = 226


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


@pytest.mark.parametrize("scenario", ["attention", "gather", "losses", "boundary", "deterministic"])
def test_every_call_launches_and_compiles_once(untuned, scenario):
    rows = untuned(scenario)
    assert len(rows) >= 6
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["launches"] == second["launches"], first
        assert first["launches"], first
        assert not second["compilations"], second


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The same with tuning, by the clock of the stub, and in deterministic mode too."""
    rows, _ = launched(tmp_path_factory.mktemp("cache"), tune=True)
    return lambda scenario: [row for row in rows if row["scenario"] == scenario]


def assert_only_the_first_size_compiles(rows):
    first, *others = rows
    assert first["compilations"]
    assert not [row for row in others if row["compilations"]]


@pytest.mark.parametrize("scenario", ["sizes", "training"])
def test_another_size_of_image_or_number_of_classes_compiles_nothing(untuned, scenario):
    rows = untuned(scenario)
    assert len(rows) == 2 * {"sizes": 61, "training": 3}[scenario]
    assert_only_the_first_size_compiles(rows)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scenario", ["attention", "gather", "losses", "boundary", "deterministic"])
def test_every_tuned_call_launches_and_compiles_once(tuned, scenario):
    rows = tuned(scenario)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert second["launches"], first
        assert not second["compilations"], second
        # What was timed is launched once from then on.
        assert max(second["launches"].values()) <= 4, second


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["sizes", "training"])
def test_another_size_compiles_nothing_where_kernels_are_tuned(tuned, scenario):
    assert_only_the_first_size_compiles(tuned(scenario))


def test_launches_and_compilations_of_a_training_step(untuned):
    first, second, *_ = untuned("training")
    assert second["launches"] == STEP
    assert first["compilations"] == COMPILED
    assert 0 < second["aten"] <= ATEN
    assert second["host_us"] > 0


@pytest.mark.exhaustive
def test_a_second_process_takes_its_choices_from_disk(tmp_path):
    rows, said = launched(tmp_path, "sizes", tune=True)
    assert said.count("Compiling and timing kernels for this GPU") == 1
    assert rows[0]["compilations"]["gather_kernel"] == 3, "each configuration is compiled once"
    again, said = launched(tmp_path, "sizes", tune=True)
    assert not said
    assert again[0]["compilations"]["gather_kernel"] == 1
    assert sum(again[0]["launches"].values()) < 40


# Both losses of a pair add into one buffer: the first 1 and the second 2, in place of kernels that do nothing.
ADDED = """
import torch
from tests.helpers import launches, stub_gpu
from unept.kernels import upsample_cross_entropy_pair
from unept.kernels.upsample import cross_entropy_triton
stub_gpu.install()
tuner, result = cross_entropy_triton.losses_backward_kernel, cross_entropy_triton.ScatterBuffer.result
def add(*arguments, run=tuner.fn.run, warmup, **named):
    if not warmup:
        named["grad_table_ptr"] += 1 + named["HAS_OFFSET"]
    return run(*arguments, warmup=warmup, **named)
def printed(buffer, dtype):
    print(buffer.data.unique().tolist())
    return result(buffer, dtype)
tuner.fn.run, cross_entropy_triton.ScatterBuffer.result = add, printed
for step in range(2):
    logits, offset = launches.leaf(1, 5, 4, 4), torch.zeros(1, 2, 32, 32)
    plain, moved = upsample_cross_entropy_pair(logits, torch.zeros(1, 32, 32, dtype=torch.int64), offset)
    (plain + moved).sum().backward()
"""


def test_tuning_keeps_what_an_earlier_launch_has_added(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ADDED], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["[3.0]", "[3.0]"], done.stderr[-4000:]


# Each op runs once, and then in another dtype while a graph is captured: in one case from the binning on.
CAPTURED = """
import torch
from tests.helpers import launches, stub_gpu
from unept.kernels.sparse_attention import force_form, triton_value_binned
def capture(on):
    torch.cuda.is_available = torch.cuda.is_current_stream_capturing = lambda: on
def captured_bins(*arguments, bin_samples=triton_value_binned.bin_samples):
    capture(True)
    return bin_samples(*arguments)
def attention(dtype, padded):
    with force_form(padded=padded, value_gradient="binned"):
        launches.attention(6, 7, dtype=dtype)
stub_gpu.install()
calls = {
    "pad": lambda dtype: attention(dtype, True),
    "forward": lambda dtype: attention(dtype, False),
    "gather": lambda dtype: launches.gather(6, 7, dtype=dtype),
    "losses": lambda dtype: launches.losses(2, 3, dtype=dtype),
    "column": lambda dtype: launches.boundary(6, 7, labels={32: torch.uint8, 16: torch.int16}[8 * dtype.itemsize]),
    "bin_backward": lambda dtype: attention(dtype, False),
}
for kernel, call in calls.items():
    call(torch.float32)
    if kernel == "bin_backward":
        triton_value_binned.bin_samples = captured_bins
    else:
        capture(True)
    try:
        call(torch.bfloat16)
        print(kernel, "was compiled")
    except RuntimeError as error:
        print(kernel, kernel + "_kernel has not been" in str(error) and "run the same step once" in str(error))
    capture(False)
"""


@pytest.mark.parametrize("tune", [False, True])
def test_a_first_launch_while_a_graph_is_captured_is_refused(tmp_path, tune):
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED], env=environment(tmp_path, tune), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said == dict.fromkeys(["pad", "forward", "gather", "losses", "column", "bin_backward"], "True")


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


AHEAD = """
import json
from tests.helpers import launches, stub_gpu
from unept.kernels import compile_ahead
log = stub_gpu.install()
(_, step), *_ = launches.training_steps()
compile_ahead(step)
ahead, launched = dict(log.compilations), sum(log.launches.values())
log.clear()
step()
print(json.dumps([ahead, launched, dict(log.compilations), len(log.launches)]))
"""


@pytest.mark.parametrize("tune", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_compiles_nothing_after_it_was_compiled_ahead(tmp_path, tune):
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], env=environment(tmp_path, tune), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ahead, launched_ahead, later, launched_later = json.loads(done.stdout)
    assert not launched_ahead
    assert not later
    assert launched_later == len(STEP) + tune  # both ways to sum the value's gradient are timed
    if tune:
        assert ahead["forward_kernel"] == 8, "two forms of the maps, in four configurations each"
    else:
        assert ahead == COMPILED


# While a step is recorded, another thread launches. The step's own launch is in a backward that is 70 deep in others,
# which autograd runs in a thread of its own, as it does every backward on a GPU.
THREADS = """
import json, threading
import torch
from tests.helpers import launches, stub_gpu
from unept.kernels import compile_ahead, set_default_backend
log = stub_gpu.install()
set_default_backend("triton")  # of all threads
threads = []
class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        else:
            threads.append(threading.get_ident() != threading.main_thread().ident)
            launches.gather(6, 7, needs=(False, False))
        return grad, None
def step():
    other = threading.Thread(target=launches.boundary, args=(6, 7))
    other.start()
    other.join()
    Deep.apply(torch.ones(1, requires_grad=True), 70).sum().backward()
compile_ahead(step)
print(json.dumps([threads, dict(+log.launches), log.compilations["gather_kernel"]]))
"""


def test_other_threads_launch_while_a_step_is_recorded(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env=environment(tmp_path, False), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    in_another_thread, launched, compiled = json.loads(done.stdout)
    assert in_another_thread == [True]
    assert set(launched) == {"column_kernel", "row_kernel", "direction_kernel"}
    assert compiled == 1


# The first step of a trainer, with what it was given before any kernel was compiled and what it has found.
TRAINER = """
import json, sys
from pathlib import Path
import torch
from tests.helpers import stub_gpu
from tests.helpers.training import arguments, configuration
from unept.train import Trainer
log = stub_gpu.install()
class Watched(Trainer):
    before = None
    def build_loss(self):
        loss = super().build_loss()
        find = loss.targets
        def targets(*arguments, **options):
            found = find(*arguments, **options)
            found.direction.zero_()  # which no kernel has written
            return found
        loss.targets = targets
        return loss
    def state(self):
        return [torch.get_rng_state(), *(tensor.clone() for tensor in self.model.state_dict().values())]
    def prepare_batch(self, batch):
        self.before = self.before or self.state()
        return super().prepare_batch(batch)
    def train_step(self, images, labels):
        same = all(torch.equal(a, b) for a, b in zip(self.before, self.state(), strict=True))
        clean = all(m.training for m in self.model.modules()) and all(p.grad is None for p in self.model.parameters())
        ahead, launched = dict(log.compilations), sum(log.launches.values())
        log.clear()
        super().train_step(images, labels)
        print(json.dumps([same, clean, ahead, launched, dict(log.compilations), dict(log.launches)]))
        raise SystemExit
root, out, *options = sys.argv[1:]
command = arguments(Path(root), "--device", "cpu", "--workers", "0", "--num-samples", "0", *options)
Watched(configuration(command), Path(out)).train()
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A few images to train on."""
    return layouts.shapes(tmp_path_factory.mktemp("shapes"), train=8, val=2)


def test_a_trainer_compiles_the_kernels_of_its_steps_ahead(tmp_path, shapes):
    options = ("--amp", "bf16", "--accumulate", "2", "--dropout", "0.1")
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(shapes), str(tmp_path / "run"), *options],
        env=environment(tmp_path / "cache", False),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("Compiling and timing kernels for this GPU") == 1
    same, clean, ahead, launched_ahead, later, launched = json.loads(done.stdout.splitlines()[-1])
    assert same, "statistics, weights or the random state have changed"
    assert clean, "the network has gradients"
    assert not launched_ahead
    assert set(ahead) == set(launched)
    assert not later


COMPILE_ONE = """
import time, triton
from tests.helpers import launches, stub_gpu
stub_gpu.install(compiles=True)
compiled = []
def listen(*, src, cache_hit, **_):
    compiled.extend([src.name] * (not cache_hit))
triton.knobs.compilation.listener = listen
launches.gather(6, 7, needs=(False, False))
print(len(compiled))
"""


@pytest.mark.skipif(not HAS_COMPILER, reason="the stub of libcuda needs gcc and the header that Triton brings")
@pytest.mark.slow
def test_two_processes_with_one_cache_compile_each_kernel_once(tmp_path):
    start = [sys.executable, "-c", COMPILE_ONE]
    both = [
        subprocess.Popen(start, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert not any(process.returncode for process in both), said
    assert sorted(int(out) for out, _ in said) == [0, 3]


@pytest.mark.skipif(not HAS_COMPILER, reason="the stub of libcuda needs gcc and the header that Triton brings")
@pytest.mark.parametrize(
    "scenarios",
    [
        pytest.param(("boundary",), marks=pytest.mark.slow),
        pytest.param(
            ("boundary", "attention", "gather", "losses", "deterministic", "sizes", "training"),
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["one op", "all"],
)
def test_triton_s_own_launcher_takes_every_call(tmp_path, scenarios):
    rows, _ = launched(tmp_path, "--compile", *scenarios)
    assert {row["scenario"] for row in rows} == set(scenarios)
    assert not [row for row in rows if row["repeat"] and row["compilations"]]
