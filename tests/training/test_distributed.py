"""Several processes: as one process with their whole batch, through a worker's death, and with one clear error."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from tests.helpers import layouts
from tests.helpers.known_scores import Shifted, Unlike
from tests.helpers.training import LOSSES, arguments, configuration, read_records
from unept import distributed
from unept.config import TrainConfig
from unept.evaluation.evaluator import evaluate_model
from unept.inference import InferenceConfig
from unept.training import checkpoint
from unept.training.interruption import StopSignals
from unept.training.trainer import Trainer

# One process of pytest-xdist starts the two processes that most of these tests read.

OPTIONS = [
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--dropout",
    "0",
    "--num-samples",
    "1",
    "--device",
    "cpu",
    "--lr",
    "1e-3",
]
CPU = torch.device("cpu")
TIMEOUT = 900  # seconds; of a machine that does much else at the same time


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five training and three validation images of the shapes data set, as files: no number that two divides."""
    return layouts.shapes(tmp_path_factory.mktemp("data"), train=5, val=3)


def config_of(data, **changes) -> TrainConfig:
    return configuration(arguments(data, *OPTIONS), **changes)


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    keys = ("step", *LOSSES, "mIoU", "pixAcc", "boundary_f")
    return [{key: line[key] for key in keys if key in line} for line in read_records(folder)]


def one_step(config, out: Path) -> tuple[dict, dict]:
    """Losses and gradients of the first optimiser step of a run, as this rank sees them."""
    torch.use_deterministic_algorithms(True)
    trainer = Trainer(config, out)
    trainer.model.train()
    gradients: dict = {}

    def keep(*_):
        gradients.update((name, p.grad.clone()) for name, p in trainer.model.named_parameters())

    trainer.optimizer.register_step_pre_hook(keep)
    losses = trainer.train_step(*trainer.prepare_batch(next(iter(trainer.build_loader()))))
    losses = {name: distributed.mean_over_ranks(loss) for name, loss in losses.items()}
    buffers = {name: b.clone() for name, b in trainer.model.named_buffers() if "running" in name}
    torch.use_deterministic_algorithms(False)
    return losses, {**gradients, **buffers}


class Norms(nn.Sequential):
    """A batch normalisation of torch's and one of timm's, which holds its activation."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), BatchNormAct2d(6), nn.Conv2d(6, 2, 1))


def norms_step(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradients and running statistics of `Norms` on this rank's images, in float64."""
    torch.manual_seed(0)
    model = Norms().double()
    network = distributed.parallel(model, torch.device("cpu"))
    output = network(images)
    (output**3).mean().backward()
    state = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return {"output": output.detach(), "eval": model.eval()(images).detach(), **state}


def evaluate_shifted() -> tuple[int, dict]:
    """How many images a process has seen, and the scores."""
    model = Shifted()
    scores = evaluate_model(model, Unlike(), InferenceConfig(), CPU, boundary_tolerance=4)
    return model.calls, scores


def steps_until_stopped(rank: int) -> tuple[int, int]:
    """Number of steps after which this rank stops, and the signal; rank 1 alone receives it, in the third step."""
    with StopSignals() as signals:
        for step in range(1, 10):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            if number := signals.after_step():
                assert signals.now() == number
                return step, number
    return 10, 0


def _run_rank(rank: int, port: int, folder: str, data: str) -> None:
    """Run one of two processes as torchrun would start it, and save what it found."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    with distributed.process_group(CPU):
        images = torch.load(f"{folder}/images.pt")
        results = {"norms": norms_step(images[2 * rank : 2 * rank + 2])}
        results["step"] = one_step(config_of(data), Path(folder) / "run")
        results["scores"] = evaluate_shifted()
        results["stopped"] = steps_until_stopped(rank)
        results["main"] = distributed.run_on_main(lambda: f"said by {distributed.rank()}")
        try:
            distributed.run_on_main(lambda: int("no number"))
        except BaseException as error:
            results["error"] = repr(error)
        try:
            Trainer(config_of(data, batch_size=3), Path(folder) / "odd")
        except BaseException as error:
            results["odd"] = repr(error)
    torch.save(results, f"{folder}/{rank}.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """What two processes found, and their images."""
    folder = tmp_path_factory.mktemp("two")
    images = torch.randn(4, 3, 5, 7, dtype=torch.float64)
    torch.save(images, folder / "images.pt")
    torch.multiprocessing.spawn(_run_rank, (free_port(), str(folder), str(data)), nprocs=2)
    return images, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_batch_normalisation_of_two_processes_is_that_of_the_whole_batch(two):
    images, ranks = two
    alone = norms_step(images)
    for i, result in enumerate(ranks):
        for name, value in result["norms"].items():
            expected = alone[name]
            if name in ("output", "eval"):
                expected = expected[2 * i : 2 * i + 2]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10, msg=name)


def test_two_processes_have_the_loss_and_gradients_of_one(two, data, tmp_path):
    """The images differ in ignored pixels and boundaries; gradients and statistics agree with one process's."""
    alone, expected = one_step(config_of(data), tmp_path / "run")
    for result in two[1]:
        losses, state = result["step"]
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)
        assert state.keys() == expected.keys()
        for name, value in state.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_two_processes_share_an_evaluation_and_agree(two):
    _, alone = evaluate_shifted()
    calls, scores = zip(*(result["scores"] for result in two[1]), strict=True)
    assert calls == (2, 1)
    for key in ("mIoU", "pixAcc", "boundary_f", "mIoU_unrefined", "boundary_f_unrefined", "images", "share"):
        assert scores[0][key] == scores[1][key] == alone[key]


def test_processes_stop_after_the_same_step(two):
    assert [result["stopped"] for result in two[1]] == [(4, signal.SIGUSR1)] * 2


def test_main_process_speaks_for_all(two):
    first, second = two[1]
    assert first["main"] == second["main"] == "said by 0"
    assert first["error"].startswith("ValueError")
    assert second["error"] == "SystemExit(2)"
    assert "batch_size 3 cannot be split over 2 processes in 1 parts each" in first["odd"]
    assert second["odd"] == "SystemExit(2)"


def test_accumulation_has_the_gradients_of_the_whole_batch(data, tmp_path):
    """With batch normalisation left out of it: its statistics are those of a part."""

    def gradients(accumulate: int) -> tuple[dict, dict]:
        trainer = Trainer(config_of(data, accumulate=accumulate), tmp_path / "run")
        trainer.model.eval()
        kept: dict = {}
        trainer.optimizer.register_step_pre_hook(
            lambda *_: kept.update((name, p.grad.clone()) for name, p in trainer.model.named_parameters())
        )
        return trainer.train_step(*trainer.prepare_batch(next(iter(trainer.build_loader())))), kept

    (whole, expected), (parts, actual) = gradients(1), gradients(4)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for name, value in actual.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5 * scale + 1e-8, msg=name)


@pytest.fixture
def launched(tmp_path):
    """Start torchrun with a command; at the end of the test, however it ends, it is ended with its processes."""
    started: list[subprocess.Popen] = []

    def launch(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield launch
    for process in started:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def wait_until(process: subprocess.Popen, condition: Callable[[], object], what: str) -> None:
    """Wait until something is there that a running process makes."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no {what} after {TIMEOUT} s"
        time.sleep(0.01)


def _workers(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the training processes that torchrun started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [pid for pid in map(int, children.read_text().split()) if "unept.train" in _command_line(pid)]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@pytest.mark.slow
def test_signal_to_torchrun_stops_all_and_loses_nothing(data, launched, tmp_path):
    """SIGTERM to the launcher, as a preemptible machine sends it; continued, the run ends with all its steps."""
    out = tmp_path / "run"
    options = ["--iterations", "400", "--checkpoint-every", "1000", "--eval-every", "1000", "--out", str(out)]
    process = launched("-m", "unept.train", *arguments(data, *OPTIONS), *options, "--resume", "auto")
    wait_until(process, lambda: (out / "metrics.jsonl").exists() and read_records(out), "step")
    process.terminate()
    _, stderr = process.communicate(timeout=TIMEOUT)
    stopped = re.findall(r"stopped at step (\d+); continue with --resume auto", stderr)
    assert len(stopped) == 1, stderr
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints", CPU)
    assert saved.step == int(stopped[0]) > 2
    again = Trainer(config_of(data, iterations=saved.step + 1, resume="auto"), tmp_path / "run")
    again.train()
    assert again.step == saved.step + 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")
def test_killed_worker_is_started_again_and_nothing_is_lost(data, launched, tmp_path):
    """Two processes, one killed after the first checkpoint: the run ends as that of one process without a break."""
    out = tmp_path / "runs" / "folder"
    process = launched("--max-restarts", "1", "-m", "unept.train", *arguments(data, *OPTIONS))
    wait_until(process, (out / "checkpoints" / "step_00000004.pt").exists, "checkpoint")
    workers = _workers(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert not (out / "checkpoints" / "step_00000012.pt").exists(), "the run had ended before the kill"
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, stderr
    assert stdout.count("Run folder") == 1, "rank 0 alone speaks"
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["folder"]
    alone = Trainer(config_of(data), tmp_path / "alone")
    alone.train()
    lines, expected = numbers(out), numbers(tmp_path / "alone")
    assert [line["step"] for line in lines] == [3, 6, 6, 9, 12, 12]
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(wanted, rel=2e-3, abs=2e-3)
    final = torch.load(out / "checkpoints" / "step_00000012.pt")
    assert final["step"] == 12


@pytest.mark.parametrize(("cores", "processes", "expected"), [
    (4, None, 4), (64, None, 8), (64, "4", 8), (16, "4", 4), (7, "2", 3), (2, "8", 1),
])  # fmt: skip
@pytest.mark.parametrize("affinity", [True, False], ids=["of this process", "of the machine"])
def test_workers_by_default_are_the_cores_of_a_process(monkeypatch, cores, processes, expected, affinity):
    if affinity:  # a container may have fewer cores than its machine
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 100)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert distributed.default_workers() == expected
    assert TrainConfig().data.workers == expected
