"""All that needs a GPU, by one command: `python -m bench.run [--part tests|sanitizer|waits|ops|model] [--again]`.

Runs the test suite on the CPU and the tests of the kernels on the GPU, compute-sanitizer over some of the latter (where
it is on PATH), training steps in which it is an error that the host waits (`bench.host_waits`), and the benchmarks, in
steps that end within 8 minutes each. What passed at this revision on this device is not run again, so that the command
can be repeated where time is limited. Leaves JSON and a table in bench/results and prints the targets and the table.
Needs the packages of `.[test]`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from unept import distributed
from unept.files import write_atomically, write_json

from .harness import DEVICE, device_name, revision
from .report import check_targets, read, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
STATE = RESULTS / "run.json"
SECONDS = 480
PYTEST = [sys.executable, "-m", "pytest", "-q"]
TESTS_ON_GPU = ["tests/kernels", "tests/evaluation/test_metrics.py", "tests/model/test_segmenter.py::test_on_a_gpu"]


@dataclass
class Step:
    """A command; `measures` if it writes bench/results/NAME.json."""

    name: str
    command: list[str]
    measures: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    needs_gpu: bool = False


def benchmark(name: str, file: str, *options: str) -> Step:
    """Benchmarks of one file."""
    command = [*PYTEST, f"bench/{file}", "--benchmark-only", "--benchmark-columns=median,iqr,rounds", *options]
    return Step(name, [*command, f"--benchmark-json={RESULTS / name}.json"], measures=True)


def steps() -> dict[str, list[Step]]:
    """The steps of each part."""
    workers = ["-n", str(distributed.default_workers()), "--dist", "loadfile"]
    kernel_tests = ["tests/kernels", "-k", "triton and matches"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    # An access past the end of a tensor shows only where each tensor is an allocation of its own.
    unpooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "UNEPT_AUTOTUNE": "0"}
    return {
        "tests": [
            # Most tests are of what a CPU does, such as runs that continue to the bit: they see no GPU.
            Step("tests", [*PYTEST, *workers], environment={"CUDA_VISIBLE_DEVICES": ""}),
            Step("tests_on_gpu", [*PYTEST, "-n", "4", "--dist", "loadfile", *TESTS_ON_GPU], needs_gpu=True),
        ],
        "sanitizer": [
            Step(tool, [*sanitizer, tool, *PYTEST, *kernel_tests], environment=unpooled)
            for tool in ("memcheck", "racecheck")
        ],
        "waits": [Step("host_waits", [sys.executable, "-m", "bench.host_waits"], needs_gpu=True)],
        "ops": [
            *(
                benchmark(f"attention_{name}", "test_attention.py", "-k", which)
                for name, which in (
                    ("forward", "encoder and B16 and not backward"),
                    ("backward", "encoder and B16 and backward"),
                    ("others", "not (encoder and B16)"),
                )
            ),
            benchmark("dense", "test_dense.py"),
            benchmark("boundary_targets", "test_boundary_targets.py"),
            benchmark("loader", "test_loader.py"),
        ],
        "model": [
            benchmark("train_resnet50", "test_model.py", "-k", "train and resnet50"),
            benchmark("train_deit", "test_model.py", "-k", "train and deit"),
            benchmark("inference", "test_model.py", "-k", "inference"),
            benchmark("context_branch", "test_context_branch.py"),
            benchmark("training_memory", "test_training_memory.py"),
        ],
    }


def run(step: Step) -> str:
    """`passed`, or what happened instead."""
    if step.command[0] == "compute-sanitizer" and not shutil.which("compute-sanitizer"):
        return "passed over: compute-sanitizer is not on PATH"
    if step.needs_gpu and DEVICE != "cuda":
        return "passed over: PyTorch finds no GPU"
    process = subprocess.Popen(step.command, cwd=ROOT, start_new_session=True, env={**os.environ, **step.environment})
    try:
        code = process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"stopped after {SECONDS} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which would keep the GPU
            process.wait()
    return "passed" if code == 0 else f"exit code {code}"


def main() -> int:
    """Run what has not passed yet; 1 if something failed."""
    parts = steps()
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=parts, action="append", help="only this part; may be given several times")
    parser.add_argument("--again", action="store_true", help="also run what has passed at this revision already")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    where = {"revision": revision(), "device": device_name()}
    chosen = [step for part in options.part or parts for step in parts[part]]
    for step in chosen:
        done = state.get(step.name, {})
        told_apart = where["revision"] != "unknown" and not where["revision"].endswith("-dirty")
        if done == {**done, **where, "outcome": "passed"} and told_apart and not options.again:
            continue
        (RESULTS / f"{step.name}.json").unlink(missing_ok=True)  # a step that fails leaves no older figures
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        outcome = run(step)
        state[step.name] = {**where, "outcome": outcome, "seconds": round(time.monotonic() - start)}
        write_json(STATE, state)
        print(f"== {step.name}: {outcome}", flush=True)
    measured = [RESULTS / f"{step.name}.json" for part in parts.values() for step in part if step.measures]
    rows = read(path for path in measured if path.exists())
    outcomes = "\n".join(f"- {name}: {done['outcome']} ({done['seconds']} s)" for name, done in state.items())
    text = f"{outcomes}\n\n{check_targets(rows)}\n\n{table(rows)}\n"
    write_atomically(RESULTS / "table.md", text.encode())
    print(text)
    return int(not all(state[step.name]["outcome"].startswith("passed") for step in chosen))


if __name__ == "__main__":
    sys.exit(main())
