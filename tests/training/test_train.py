"""Training end to end on a tiny folder data set: the run folder, resuming to the bit after SIGKILL, and every fault."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.helpers import layouts
from unept import train
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.data import DatasetError
from unept.model.network import UNEPT
from unept.presets import PRESETS
from unept.training import checkpoint
from unept.training.optimizer import build_optimizer, learning_rate_factor
from unept.training.run_folder import choose_run_folder

OPTIONS = [
    *("--backbone", "resnet10t", "--no-pretrained-backbone", "--output-stride", "32", "--d-model", "32"),
    *("--num-heads", "2", "--num-points", "2", "--ffn-dim", "32", "--crop-size", "64", "64", "--workers", "1"),
    *("--short-side", "None", "--batch-size", "2", "--iterations", "12", "--log-every", "3", "--eval-every", "6"),
    *("--checkpoint-every", "4", "--num-samples", "2"),
]
TERMS = ("loss", "segmentation", "refined", "boundary", "direction")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six training and three validation images of the shapes data set, as files."""
    return layouts.shapes(tmp_path_factory.mktemp("data"), train=6, val=3)


def configuration(data, **changes):
    _, config = train.parse(["folder", "--root", str(data), *OPTIONS])
    return dataclasses.replace(config, **changes)


def losses(folder):
    """The lines of the loss curve, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], *(line[t] for t in TERMS)] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "run"
    trainer = train.Trainer(configuration(data), out)
    scores = trainer.train()
    return out, trainer, scores


def test_run_folder(finished):
    out, trainer, scores = finished
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "curves.png",
        "model",
    }
    assert list(out.glob("events.out.tfevents.*"))
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step_00000008.pt", "step_00000012.pt"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
    assert [line[0] for line in losses(out)] == [3, 6, 9, 12]
    assert all(math.isfinite(value) for line in losses(out) for value in line)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "mIoU" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert max(line["mIoU"] for line in evaluations) == pytest.approx(trainer.best)
    assert scores["mIoU"] == pytest.approx(evaluations[-1]["mIoU"])
    assert UNEPT.from_pretrained(out / "model").classes == trainer.model.classes
    assert TrainConfig.from_json(out / "config.json") == trainer.config


def test_resume_after_sigkill_is_exact(finished, data, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "unept.train", "folder", "--root", str(data), *OPTIONS, "--out", str(out)]
    command += ["--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (out / "checkpoints" / "step_00000004.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint after four minutes"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "checkpoints" / "step_00000012.pt").exists(), "the run had ended before it was killed"
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert losses(out) == losses(finished[0])
    final, expected = (torch.load(p / "checkpoints" / "step_00000012.pt") for p in (out, finished[0]))
    assert all(torch.equal(final["model"][k], v) for k, v in expected["model"].items())
    assert "mIoU" in again.stdout
    assert str(out / "samples") in again.stdout


def test_finished_run_resumes_to_nothing(finished, data, capsys):
    """The command on a finished run trains no further, loses nothing, and ends with the table as ever."""
    before = losses(finished[0])
    train.train(["folder", "--root", str(data), *OPTIONS, "--out", str(finished[0]), "--resume", "auto"])
    assert losses(finished[0]) == before
    assert "mIoU" in capsys.readouterr().out


def test_resume_needs_no_pretrained_weights(data, tmp_path):
    """The checkpoint has them all: the file that the run started from may be gone."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), weights)
    config = configuration(data, iterations=1, checkpoint_every=1, num_samples=0)
    config.model.backbone_weights = weights
    train.Trainer(config, tmp_path / "run").train()
    assert not list((tmp_path / "run" / "samples").iterdir())
    weights.unlink()
    again = train.Trainer(dataclasses.replace(config, resume="auto"), tmp_path / "run")
    again.train()
    assert again.step == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_in_the_middle_of_a_run_loses_nothing(data, tmp_path, workers):
    """One clear error that names the file, and a checkpoint of every step before it; mended, the run goes on."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    config = configuration(root, iterations=6, checkpoint_every=100)
    config.data.workers = workers
    trainer = train.Trainer(config, tmp_path / "run")
    victim = root / "images" / "train" / "3.png"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])  # after the check at the start
    with pytest.raises(DatasetError) as raised:
        trainer.train()
    assert str(raised.value).startswith(f"{victim} can't be read")
    assert "Traceback" not in str(raised.value)
    assert torch.load(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1])["step"] == trainer.step < 6
    victim.write_bytes(content)
    again = train.Trainer(dataclasses.replace(config, resume="auto"), tmp_path / "run")
    again.train()
    assert again.step == 6


def test_bad_images_are_skipped_where_asked_for(data, tmp_path, capsys):
    """Training and validation go on without them; their number is kept over a resumed run."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    config = configuration(root, iterations=6, checkpoint_every=3, eval_every=3)
    config.data.on_bad_sample, config.data.workers = "skip", 0
    trainer = train.Trainer(config, tmp_path / "run")
    for victim in ("train/3.png", "val/1.png"):  # after the check at the start
        (root / "images" / victim).write_bytes(b"torn")
    scores = trainer.train()
    assert (scores["images"], scores["skipped"]) == (2, 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [line["skipped"] for line in lines if "loss" in line]
    assert counts[-1] == 2, "one in each of the two epochs"
    assert f"{counts[-1]} times another image has replaced" in capsys.readouterr().out
    assert all(
        line[key] > 0 for line in lines if "loss" in line for key in ("step_images_per_s", "loader_images_per_s")
    )
    (tmp_path / "run" / "checkpoints" / "step_00000006.pt").unlink()
    for victim in ("train/3.png", "val/1.png"):
        shutil.copy(data / "images" / victim, root / "images" / victim)
    again = train.Trainer(dataclasses.replace(config, resume="auto"), tmp_path / "run")
    again.train()
    assert again.skipped_before == counts[0]


def test_kill_while_the_model_is_saved_leaves_a_model(finished, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    checkpoint.save_model(finished[1].model, folder)

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_model(finished[1].model, folder)
    assert UNEPT.from_pretrained(folder).num_classes == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"lr \(was 0.0001, now 0.5\)"),
        # It does not change the training, but which model is the best.
        ({"window": 32, "refine": False}, r"window \(was None, now 32\), refine \(was True, now False\)"),
    ],
    ids=["recipe", "protocol"],
)
def test_other_options_are_refused_on_resume(finished, data, changes, message):
    with pytest.raises(ValueError, match=message):
        train.Trainer(configuration(data, resume="auto", **changes), finished[0]).train()


def test_validation_follows_the_protocol_of_the_run(data, tmp_path):
    config = configuration(data, window=32, window_stride=16, refine=False, refine_scale=2)
    assert train.Trainer(config, tmp_path).inference == config.inference()
    assert config.inference().describe().endswith("windows of 32 with stride 16; not refined")


def test_other_class_count_is_refused_on_resume(finished, data, tmp_path):
    out = tmp_path / "run"
    train.Trainer(configuration(data, iterations=1, checkpoint_every=1), out).train()
    classes = data / "classes.txt"
    text = classes.read_text()
    try:
        classes.write_text(text + "another\n")
        with pytest.raises(ValueError, match="has 8 classes, the data set has 9"):
            train.Trainer(configuration(data, iterations=1, checkpoint_every=1, resume="auto"), out).train()
    finally:
        classes.write_text(text)


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    trainer = train.Trainer(configuration(data, lr=1e-3, log_every=4, checkpoint_every=2), out)
    train_step = trainer.train_step

    def poisoned(images, labels):
        if trainer.step == 4:  # the fifth step
            with torch.no_grad():
                trainer.model.boundary_head[-1].bias.fill_(float("nan"))
        return train_step(images, labels)

    trainer.train_step = poisoned
    with pytest.raises(FloatingPointError, match=r"not finite at step 5: boundary\. .*--lr"):
        trainer.train()
    saved = checkpoint.checkpoints(out / "checkpoints")
    assert [p.name for p in saved] == ["step_00000002.pt", "step_00000004.pt"]
    state = torch.load(saved[-1])
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    checkpoint.save_checkpoint(folder, 1, {"step": 1, "weight": torch.ones(3)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*step_00000002\.pt.*intact"):
        checkpoint.save_checkpoint(folder, 2, {"step": 2, "weight": torch.zeros(3)})
    assert [p.name for p in folder.iterdir()] == ["step_00000001.pt"]
    assert checkpoint.load_latest(folder, torch.device("cpu"))["step"] == 1


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    for step in (1, 2):
        path = checkpoint.save_checkpoint(tmp_path, step, {"step": step, "weight": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.warns(UserWarning, match=r"step_00000002\.pt is damaged"):
        assert checkpoint.load_latest(tmp_path, torch.device("cpu"))["step"] == 1
    first = checkpoint.checkpoints(tmp_path)[0]
    first.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="none of the 2 checkpoints"):
        checkpoint.load_latest(tmp_path, torch.device("cpu"))


def test_checkpoint_with_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, ("touch " + str(tmp_path / "executed"),))

    torch.save({"step": Payload()}, tmp_path / "step_00000001.pt")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="can be read"):
        checkpoint.load_latest(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step})
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000003.pt", "step_00000010.pt"]


def test_existing_run_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"--resume auto.*--out"):
        choose_run_folder(TrainConfig(out=tmp_path / "run"), "shapes")
    assert choose_run_folder(TrainConfig(out=tmp_path / "run", resume="auto"), "shapes") == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert choose_run_folder(TrainConfig(), "shapes") == Path("runs/shapes")
    for name in ("shapes", "shapes-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert choose_run_folder(TrainConfig(), "shapes") == Path("runs/shapes-3")
    assert choose_run_folder(TrainConfig(resume="auto"), "shapes") == Path("runs/shapes-2")


def test_learning_rates_follow_the_paper():
    """1e-4 and 1e-5 for the backbone, a tenth after two thirds."""
    config = TrainConfig(iterations=90)
    model = torch.nn.Module()
    model.backbone, model.rest = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, config)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-5]
    assert optimizer.param_groups[1]["params"] == list(model.backbone.parameters())
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["weight_decay"] == 1e-4
    factors = [learning_rate_factor(config, step) for step in range(90)]
    assert factors == [1.0] * 60 + [0.1] * 30
    warm = [learning_rate_factor(TrainConfig(iterations=90, warmup=10), step) for step in range(11)]
    assert warm == pytest.approx([i / 10 for i in range(1, 11)] + [1.0])
    cosine = TrainConfig(iterations=90, schedule="cosine")
    assert learning_rate_factor(cosine, 45) == pytest.approx(0.5)


def test_no_argument_is_the_shapes_preset():
    assert train.parse([])[0] == "shapes"
    assert train.parse(["--lr", "0.5"]) == ("shapes", dataclasses.replace(PRESETS["shapes"](), lr=0.5))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_help_explains_every_option(preset, capsys):
    with pytest.raises(SystemExit):
        train.parse([preset, "--help"])
    text = capsys.readouterr().out
    for part in (ModelConfig, DataConfig, TrainConfig):
        for field in dataclasses.fields(part):
            if field.name not in ("model", "data"):
                assert f"--{field.name.replace('_', '-')}" in text or f"--no-{field.name.replace('_', '-')}" in text
    words = " ".join(text.replace("│", " ").split())
    for explanation in ("lambda_1..4 of Eq. 7", "Optimiser steps", "Mirror half of the training images"):
        assert explanation in words


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (TrainConfig, {"batch_size": 6, "accumulate": 4}, "is not a multiple of accumulate"),
        (TrainConfig, {"iterations": 0}, "must be positive"),
        (TrainConfig, {"batch_size": 0}, "must be positive"),
        (TrainConfig, {"num_samples": -1}, "0 or more"),
        (TrainConfig, {"window": 100}, "window is 100; it must be a positive multiple of 8"),
        (TrainConfig, {"refine_scale": 128}, "between 1 and 127"),
        (DataConfig, {"crop_size": (4, 64)}, "at least 8 pixels"),
        (DataConfig, {"dataset": "shapes", "root": Path("x")}, "omit --root"),
        (ModelConfig, {"dropout": 1.0}, r"must be in \[0, 1\)"),
        (ModelConfig, {"d_model": 100}, "is not a multiple of num_heads"),
    ],
)
def test_bad_options(part, options, message):
    with pytest.raises(ValueError, match=message):
        part(**options)


def test_config_of_another_version_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "data": {}, "momentum": 0.9}))
    with pytest.raises(ValueError, match="does not know: momentum"):
        TrainConfig.from_json(tmp_path / "config.json")


def test_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        TrainConfig.from_json(tmp_path / "config.json")


def test_missing_folder_is_one_line_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "unept.train", "camvid", "--root", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a run that could not start leaves nothing behind"
