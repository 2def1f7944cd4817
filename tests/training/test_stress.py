"""Faults at random, again and again: whatever happens to a run, it ends like one to which nothing has happened.

`pytest -m slow tests/training/test_stress.py` takes a few minutes; STRESS_SECONDS=600 gives each kind of fault ten.
STRESS_SEED=1 draws other ones.
"""

import os
import random
import re
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import faults, layouts
from tests.helpers.faults import Training
from tests.helpers.training import arguments, loss_curve, read_records
from unept import pretrained
from unept.training import checkpoint

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("STRESS_SECONDS", "8"))
SEED = os.environ.get("STRESS_SEED", "0")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """A run of 12 steps, with a checkpoint after every second step and evaluations after 6 and 12."""
    data = layouts.shapes(tmp_path_factory.mktemp("data"), train=6, val=2)
    more = ["--batch-size", "2", "--workers", "1", "--num-samples", "1", "--device", "cpu", "--checkpoint-every", "2"]
    return arguments(data, *more)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """The folder of a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    training = Training([*options, "--out", "run"], folder)
    assert training.wait() == 0, training.output()
    return folder / "run"


@pytest.fixture
def chosen(request) -> random.Random:
    return random.Random(f"{SEED} {request.node.name}")


def rounds(least: int = 1) -> Iterator[int]:
    """Numbers from 0, for SECONDS seconds."""
    start, done = time.monotonic(), 0
    while done < least or time.monotonic() - start < SECONDS:
        yield done
        done += 1
    print(f"{done} rounds in {time.monotonic() - start:.0f} s")


def assert_same(out: Path, whole: Path) -> None:
    """Assert that a run has the records and the weights of the whole one, each record once, and a model that loads."""
    assert loss_curve(out) == loss_curve(whole)
    scores, expected = ([line["mIoU"] for line in read_records(run) if "mIoU" in line] for run in (out, whole))
    assert scores == expected
    last, expected_last = (checkpoint.load_latest(run / "checkpoints", CPU) for run in (out, whole))
    assert last.step == expected_last.step == 12
    assert all(torch.equal(last.model[name], value) for name, value in expected_last.model.items())
    model, expected_model = (pretrained.load(run, CPU).state_dict() for run in (out, whole))
    assert all(torch.equal(model[name], value) for name, value in expected_model.items())
    assert not list(out.glob("checkpoints/.tmp-*"))


def finish(options: list[str], out: Path, whole: Path) -> None:
    """Continue a run to its end, and compare it with the whole one."""
    training = Training([*options, "--out", str(out), "--resume", "auto"], out.parent)
    assert training.wait() == 0, training.output()
    assert_same(out, whole)


def test_kills(options, whole, tmp_path, chosen):
    for _ in rounds():
        out = tmp_path / f"run{chosen.random()}"
        for _ in range(3):
            training = Training([*options, "--out", str(out), "--resume", "auto"], tmp_path)
            training.wait_for(out / "config.json")
            time.sleep(chosen.uniform(0, 4))
            training.send(signal.SIGKILL)
            assert training.wait() in (0, -signal.SIGKILL), training.output()
        finish(options, out, whole)


def test_signals(options, whole, tmp_path, chosen):
    for _ in rounds():
        out = tmp_path / f"run{chosen.random()}"
        for _ in range(3):
            training = Training([*options, "--out", str(out), "--resume", "auto"], tmp_path)
            training.wait_for(out / "lock")
            time.sleep(chosen.uniform(0, 4))
            number = chosen.choice(faults.SIGNALS)
            training.send(number)
            status, output = training.wait(), training.output()
            assert "Traceback" not in output
            if status == 0:
                break
            if status == -number or output.endswith("interrupted\n"):
                continue  # before the run had begun
            assert status == 128 + number, output
            (step,) = re.findall(r"stopped at step (\d+); continue with --resume auto", output)
            assert checkpoint.load_latest(out / "checkpoints", CPU).step == int(step)
        finish(options, out, whole)


def test_full_disk(options, whole, tmp_path, chosen):
    """The disk is full at any of the writes; or large files alone do not fit any more, which are the checkpoints."""
    failed = 0
    for _ in rounds():
        out = tmp_path / f"run{chosen.random()}"
        for _ in range(3):
            largest_file, full_after = chosen.choice(
                [(None, chosen.randrange(40)), (1 << chosen.randrange(15, 18), None)]
            )
            training = Training([*options, "--out", str(out), "--resume", "auto"], tmp_path, largest_file, full_after)
            status, output = training.wait(), training.output()
            assert "Traceback" not in output
            if status == 0:
                break
            assert status == 2, output
            (line,) = re.findall(r"error: .*", output)
            assert re.search(r"(File too large|No space left on device) while writing \S+", line), output
            failed += 1
        finish(options, out, whole)
    assert failed


def test_damage(options, whole, tmp_path, chosen):
    damaged = 0
    for _ in rounds():
        out = faults.copy_run(whole, tmp_path / "run")
        damaged += faults.damage_newest(out, chosen)
        finish(options, out, whole)
        weights = out / "model" / "model.safetensors"
        chosen.choice([faults.flip_bit, faults.zero_page, faults.cut])(weights, chosen)
        content = weights.read_bytes()
        if content != (whole / "model" / "model.safetensors").read_bytes():
            with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
                pretrained.load(out, CPU)
    assert damaged


def test_damaged_checkpoints_are_noticed_or_harmless(whole, tmp_path, chosen):
    """Without a training after each, so that many are tried."""
    expected = {checkpoint.step_of(path): path for path in checkpoint.checkpoints(whole / "checkpoints")}
    states = {step: checkpoint.read_checkpoint(path, CPU).model for step, path in expected.items()}
    noticed = count = 0
    for _ in rounds(least=20):
        out = faults.copy_run(whole, tmp_path / "run")
        faults.damage_newest(out, chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = checkpoint.load_latest(out / "checkpoints", CPU)
        assert all(torch.equal(state.model[name], value) for name, value in states[state.step].items())
        noticed, count = noticed + (state.step != 12), count + 1
    print(f"{noticed} of {count} fell back to the checkpoint before")
    assert noticed > 0.8 * count


def test_races(options, whole, tmp_path, chosen):
    for number in rounds():
        folder = tmp_path / str(number)
        folder.mkdir()
        trainings = [Training(options, folder) for _ in range(2)]
        assert [training.wait() for training in trainings] == [0, 0], trainings[0].output() + trainings[1].output()
        assert sorted(path.name for path in (folder / "runs").iterdir()) == ["folder", "folder-2"]
        for out in (folder / "runs").iterdir():
            assert_same(out, whole)
        trainings = []
        for _ in range(3):
            trainings.append(Training([*options, "--out", "run", "--resume", "auto"], folder))
            time.sleep(chosen.uniform(0, 1))
        statuses = [training.wait() for training in trainings]
        outputs = [training.output() for training in trainings]
        assert set(statuses) <= {0, 2}, outputs
        assert statuses.count(0) >= 1, outputs
        for status, output in zip(statuses, outputs, strict=True):
            assert status == 0 or re.search(r"error: a run is training in .*--out", output), output
        finish(options, folder / "run", whole)
