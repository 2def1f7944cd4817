"""Training end to end on a tiny folder data set: the run folder, resuming to the bit after SIGKILL, and every fault."""

import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import layouts
from tests.helpers.training import arguments, configuration, loss_curve, read_records
from unept import pretrained, train
from unept.config import TrainConfig
from unept.data import DatasetError, check_splits
from unept.files import read_json_lines
from unept.model.network import UNEPT
from unept.signals import SIGNALS
from unept.training import checkpoint
from unept.training.class_weights import balanced_class_weights
from unept.training.interruption import Stopped
from unept.training.trainer import Trainer

# One process of pytest-xdist trains the run that most of these tests read.

OPTIONS = ["--batch-size", "2", "--workers", "0", "--num-samples", "2"]
IN_A_PROCESS = ["--workers", "1"]  # its start takes seconds; it loads what this process would


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six training and three validation images of the shapes data set, as files."""
    return layouts.shapes(tmp_path_factory.mktemp("data"), train=6, val=3)


def config_of(data, **changes) -> TrainConfig:
    return configuration(arguments(data, *OPTIONS), **changes)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that was never interrupted: its folder, its trainer and its scores. Tests that write into it copy it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    trainer = Trainer(configuration(arguments(data, *OPTIONS, *IN_A_PROCESS)), out)
    scores = trainer.train()
    return out, trainer, scores


def test_run_folder(finished):
    out, trainer, scores = finished
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "history.jsonl",
        "checkpoints",
        "samples",
        "curves.png",
        "model",
    }
    assert list(out.glob("events.out.tfevents.*"))
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step_00000008.pt", "step_00000012.pt"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step_00000006.png", "step_00000012.png"]
    assert [line[0] for line in loss_curve(out)] == [3, 6, 9, 12]
    assert all(math.isfinite(value) for line in loss_curve(out) for value in line)
    evaluations = [line for line in read_records(out) if "mIoU" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert max(line["mIoU"] for line in evaluations) == pytest.approx(trainer.best)
    assert scores["mIoU"] == pytest.approx(evaluations[-1]["mIoU"])
    assert UNEPT.from_pretrained(out / "model").classes == trainer.model.classes
    assert TrainConfig.from_json(out / "config.json") == trainer.config


@pytest.mark.slow
def test_resume_after_sigkill_is_exact(finished, data, tmp_path, capsys):
    """The command is killed after its first checkpoint; continued, it ends with the same losses and weights."""
    out = tmp_path / "killed"
    options = [*arguments(data, *OPTIONS), "--out", str(out), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "unept.train", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (out / "checkpoints" / "step_00000004.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint after four minutes"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "checkpoints" / "step_00000012.pt").exists(), "the run had ended before it was killed"
    train.train(options)
    assert loss_curve(out) == loss_curve(finished[0])
    final, expected = (torch.load(p / "checkpoints" / "step_00000012.pt") for p in (out, finished[0]))
    assert all(torch.equal(final["model"][k], v) for k, v in expected["model"].items())
    stdout = capsys.readouterr().out
    assert "mIoU" in stdout
    assert str(out / "samples") in stdout


@pytest.fixture
def signals_heard():
    """Signals that a shell has this process ignore, as that of a job in the background, are heard as in a terminal."""
    defaults = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(monkeypatch, method: str, when, number: int) -> None:
    """Send this process a signal in a method of the trainer, once `when(trainer)` is true."""
    called = getattr(Trainer, method)

    def wrapped(trainer, *arguments):
        if when(trainer):
            os.kill(os.getpid(), number)
        return called(trainer, *arguments)

    monkeypatch.setattr(Trainer, method, wrapped)


@pytest.mark.usefixtures("signals_heard")
def test_signals_finish_the_step_and_lose_nothing(finished, data, tmp_path, capsys):
    """The command is stopped by one signal after another, in steps and in an evaluation; continued, it ends as ever."""
    out = tmp_path / "stopped"
    options = [*arguments(data, *OPTIONS), "--out", str(out), "--resume", "auto"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stops = [
        ("train_step", 1, signal.SIGTERM, 2),  # in the second step
        ("evaluate", 6, signal.SIGINT, 6),
    ]
    for method, at, number, step in stops:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, method, lambda trainer, at=at: trainer.step == at, number)
            assert train.train(options) == 128 + number
        assert checkpoint.step_of(checkpoint.checkpoints(out / "checkpoints")[-1]) == step
        assert capsys.readouterr().err.splitlines()[-1] == f"stopped at step {step}; continue with --resume auto"
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train.train(options) == 0
    events = [(line["event"], line["step"]) for line in read_json_lines(out / "history.jsonl")]
    begins, ends = [("start", 0), ("continue", 2), ("continue", 6)], [2, 6]
    assert events[::2] == begins
    assert events[1::2] == [("stop", step) for step in ends]
    assert loss_curve(out) == loss_curve(finished[0])
    scores, expected = ([line["mIoU"] for line in read_records(run) if "mIoU" in line] for run in (out, finished[0]))
    assert scores == expected
    final, expected = (torch.load(p / "checkpoints" / "step_00000012.pt") for p in (out, finished[0]))
    assert all(torch.equal(final["model"][k], v) for k, v in expected["model"].items())
    assert final["best"] == expected["best"]


@pytest.mark.usefixtures("signals_heard")
def test_second_interrupt_ends_at_once(data, tmp_path, monkeypatch):
    trainer = Trainer(config_of(data), tmp_path / "run")

    def twice(images, labels):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "train_step", twice)
    with pytest.raises(KeyboardInterrupt) as raised:
        trainer.train()
    assert not isinstance(raised.value, Stopped)


@pytest.mark.parametrize(("precision", "asked_for"), [("highest", []), ("high", ["high"])])
def test_precision_of_products_is_what_is_asked_for(data, tmp_path, monkeypatch, precision, asked_for):
    seen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    Trainer(config_of(data, matmul_precision=precision), tmp_path / "run")
    assert seen == asked_for


def test_averaged_weights_resume_exactly_and_are_the_model_that_is_kept(data, tmp_path):
    """In bfloat16 on the CPU, with class weights, as a recipe for small data sets has them."""
    recipe = {"ema": 0.9, "class_weights": "auto", "amp": "bf16", "device": "cpu", "iterations": 6, "eval_every": 6}
    config = config_of(data, checkpoint_every=3, num_samples=0, **recipe)
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "checkpoints" / "step_00000006.pt").unlink()
    again = Trainer(dataclasses.replace(config, resume="auto"), tmp_path / "part")
    again.train()
    expected, found = whole.averaged.state_dict(), again.averaged.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    kept = UNEPT.from_pretrained(tmp_path / "whole" / "model").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in whole.evaluated_model.state_dict().items())
    weight = whole.model.classifier.weight
    assert not torch.equal(whole.evaluated_model.classifier.weight, weight)
    assert (whole.evaluated_model.classifier.weight - weight).abs().max() < 0.1


def test_class_weights(data):
    dataset = config_of(data).data.build("train")
    weights = balanced_class_weights(dataset)
    labels = torch.cat([dataset[i][1].flatten() for i in range(len(dataset))])
    share = labels[labels != 255].bincount(minlength=8) / (labels != 255).sum()
    assert (weights * share).sum() == pytest.approx(1, abs=1e-5)
    present = share > 0
    assert (weights[present] * share[present].sqrt()).std() < 1e-5
    assert (weights[~present] == weights.max()).all()


def test_class_weights_of_another_number_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"class_weights has 2 numbers, but the data set has 8 classes"):
        Trainer(config_of(data, class_weights=(1.0, 2.0)), tmp_path / "run")


def test_class_weights_may_be_whole_numbers(data, tmp_path):
    trainer = Trainer(config_of(data, class_weights=(1, 2, 3, 4, 5, 6, 7, 8)), tmp_path / "run")
    assert trainer.loss.class_weights.dtype == torch.float32


def test_checkpoint_of_an_older_version_is_continued_exactly(finished, data, tmp_path):
    """It holds the losses since the last record without their names, under "pending"."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "checkpoints" / "step_00000012.pt").unlink()
    path = out / "checkpoints" / "step_00000008.pt"
    state = torch.load(path)
    assert len(state["loss_history"]) == 2
    del state["averaged"], state["evaluated"]
    state["pending"] = [torch.stack(list(losses.values())) for losses in state.pop("loss_history")]
    torch.save(state, path)
    Trainer(config_of(data, resume="auto", num_samples=0), out).train()
    assert loss_curve(out) == loss_curve(finished[0])


def test_finished_run_resumes_to_nothing(finished, data, capsys):
    """The command on a finished run trains no further, loses nothing, and ends with the table as ever."""
    before = loss_curve(finished[0])
    train.train([*arguments(data, *OPTIONS), "--out", str(finished[0]), "--resume", "auto"])
    assert loss_curve(finished[0]) == before
    assert "mIoU" in capsys.readouterr().out


def test_resume_needs_no_pretrained_weights(finished, data):
    """The checkpoint has them all: the file that the run started from may be gone."""
    config = config_of(data, resume="auto")
    config.model.backbone_weights = finished[0] / "gone.safetensors"
    with pytest.raises(FileNotFoundError, match="gone"):
        Trainer(dataclasses.replace(config, resume="never"), finished[0])
    again = Trainer(config, finished[0])
    again.train()
    assert again.step == 12


def test_run_that_starts_anew_has_pretrained_weights(finished, data, tmp_path):
    """A folder with checkpoints but without config.json is no run: it starts at the first step, as any other."""
    shutil.copytree(finished[0], tmp_path / "run")
    config = config_of(data, resume="auto", iterations=12)
    trainer = Trainer(config, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match="gone since this process started"):
        trainer.train()
    shutil.copytree(finished[0], tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    config.model.backbone_weights = tmp_path / "gone.safetensors"
    with pytest.raises(FileNotFoundError, match="gone"):
        Trainer(config, tmp_path / "other")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_in_the_middle_of_a_run_loses_nothing(data, tmp_path, workers):
    """One clear error that names the file, and a checkpoint of every step before it; mended, the run goes on."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    config = config_of(root, iterations=6, checkpoint_every=100, num_samples=0)
    config.data.workers = workers
    trainer = Trainer(config, tmp_path / "run")
    victim = root / "images" / "train" / "3.png"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])  # after the check at the start
    with pytest.raises(DatasetError) as raised:
        trainer.train()
    assert str(raised.value).startswith(f"{victim} can't be read")
    assert "Traceback" not in str(raised.value)
    assert torch.load(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[-1])["step"] == trainer.step < 6
    victim.write_bytes(content)
    again = Trainer(dataclasses.replace(config, resume="auto"), tmp_path / "run")
    again.train()
    assert again.step == 6
    assert not list((tmp_path / "run" / "samples").iterdir()), "num_samples is 0"


def test_bad_images_are_skipped_where_asked_for(data, tmp_path, capsys):
    """Training and validation go on without them; their number is kept over a resumed run."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    config = config_of(root, iterations=6, checkpoint_every=3, eval_every=100)
    config.data.on_bad_sample, config.data.workers = "skip", 0
    trainer = Trainer(config, tmp_path / "run")
    for victim in ("train/3.png", "val/1.png"):  # after the check at the start
        (root / "images" / victim).write_bytes(b"torn")
    scores = trainer.train()
    assert (scores["images"], scores["skipped"]) == (2, 1)
    records = [line for line in read_records(tmp_path / "run") if "loss" in line]
    counts = [line["skipped"] for line in records]
    assert counts[-1] == 2, "one in each of the two epochs"
    assert f"{counts[-1]} times another image has replaced" in capsys.readouterr().out
    assert all(line[key] > 0 for line in records for key in ("step_images_per_s", "loader_images_per_s"))
    (tmp_path / "run" / "checkpoints" / "step_00000006.pt").unlink()
    for victim in ("train/3.png", "val/1.png"):
        shutil.copy(data / "images" / victim, root / "images" / victim)
    again = Trainer(dataclasses.replace(config, resume="auto"), tmp_path / "run")
    again.train()
    assert again.skipped_before == counts[0]


def test_bad_images_are_skipped_from_the_start(data, tmp_path):
    """The check before a run leaves them out, and so do automatic class weights; without any image it is an error."""
    root = shutil.copytree(data, tmp_path / "data")
    (root / "images" / "train" / "0.png").write_bytes(b"torn")
    config = config_of(root, iterations=1, class_weights="auto", num_samples=0)
    with pytest.raises(DatasetError, match=r"0\.png can't be read"):
        Trainer(config, tmp_path / "run")
    config.data.on_bad_sample = "skip"
    Trainer(config, tmp_path / "run").train()
    for image in (root / "images" / "train").iterdir():
        image.write_bytes(b"torn")
    with pytest.raises(DatasetError, match=r"can't be read"):
        Trainer(config, tmp_path / "other")


def test_state_saved_without_memory_is_that_after_the_step_before(data, tmp_path, monkeypatch):
    """A step that fails in its second part has gone through batch normalisation already."""
    config = config_of(data, iterations=4, batch_size=4, accumulate=2, checkpoint_every=1, num_samples=0)
    config.model.backbone = "resnet10t"
    trainer, parts, forward_backward = Trainer(config, tmp_path / "run"), [], Trainer.forward_backward
    after: dict[str, torch.Tensor] = {}

    def full(self, *args, **options):
        parts.append(None)
        if len(parts) == 3:
            after.update({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        if len(parts) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward_backward(self, *args, **options)

    monkeypatch.setattr(Trainer, "forward_backward", full)
    with pytest.raises(MemoryError, match=r"The checkpoint of step 1 is in"):
        trainer.train()
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints", torch.device("cpu"))
    assert saved.step == 1
    assert any("running_mean" in name for name in after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in saved.model.items())


@pytest.mark.parametrize("parts", [{"batch_size": 1}, {"batch_size": 2, "accumulate": 2}])
def test_a_single_value_of_a_channel_has_advice(data, tmp_path, parts):
    config = config_of(data, num_samples=0, **parts)
    config.data.crop_size = (32, 32)
    message = "sees 1 image of 32x32 pixels at once.*a larger --batch-size, a larger --crop-size, or fewer parts"
    with pytest.raises(ValueError, match=message):
        Trainer(config, tmp_path / "run").train()


def test_other_batches_go_on_with_the_images_that_were_not_drawn(data, tmp_path, monkeypatch):
    """Also from a checkpoint of an older version, which does not say how many images its steps have drawn."""
    out, drawn = tmp_path / "run", []
    prepare = Trainer.prepare_batch
    monkeypatch.setattr(Trainer, "prepare_batch", lambda self, b: (drawn.extend(b.images), prepare(self, b))[1])
    config = config_of(data, iterations=2, batch_size=4, checkpoint_every=1, num_samples=0)
    Trainer(config, out).train()
    shutil.copytree(out, tmp_path / "older")
    for path in checkpoint.checkpoints(tmp_path / "older" / "checkpoints"):
        state = torch.load(path)
        assert state.pop("samples") == 4 * state["step"]
        torch.save(state, path)
    whole = [image.clone() for image in drawn]
    drawn.clear()
    Trainer(dataclasses.replace(config, iterations=4), tmp_path / "whole").train()
    assert all(torch.equal(a, b) for a, b in zip(drawn, whole, strict=False))
    following = torch.stack(drawn[8:])
    for run in (out, tmp_path / "older"):
        drawn.clear()
        Trainer(dataclasses.replace(config, iterations=6, batch_size=2, resume="auto"), run).train()
        assert torch.equal(torch.stack(drawn), following), run
        last = checkpoint.load_latest(run / "checkpoints", torch.device("cpu"))
        assert (last.step, last.samples) == (6, 16)


def test_what_labels_are_padded_with_is_the_id_that_is_ignored(data, tmp_path, monkeypatch):
    monkeypatch.setattr("unept.data.folder.ImageFolder.ignore_index", 7)
    with pytest.raises(DatasetError, match="is 7, but training pads labels with 255"):
        Trainer(config_of(data), tmp_path / "run")
    with pytest.raises(DatasetError, match="is 7, but training pads labels with 255"):
        check_splits(config_of(data).data.build)


def test_kill_while_the_model_is_saved_leaves_a_model(finished, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    checkpoint.save_model(finished[1].model, folder)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_model(finished[1].model, folder, step=77, scores={"mIoU": 0.5})
    monkeypatch.undo()
    assert UNEPT.from_pretrained(folder).num_classes == 8
    shutil.copy(finished[0] / "config.json", tmp_path)
    assert pretrained.load(tmp_path, torch.device("cpu")).evaluation["step"] == 77, "it was complete"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, r"seed \(was 0, now 5\)"),
        # It does not change the training, but which model is the best.
        ({"refine": False, "refine_steps": 2}, r"other options: refine \(was True, now False\)\. Give"),
    ],
    ids=["recipe", "protocol"],
)
def test_other_options_are_refused_on_resume(finished, data, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(config_of(data, resume="auto", **changes), finished[0]).train()


def test_validation_follows_the_protocol_of_the_run(data, tmp_path):
    config = config_of(data, window=32, window_stride=16, refine=False, refine_scale=2)
    assert Trainer(config, tmp_path).inference == config.inference()
    assert config.inference().describe().endswith("windows of 32 with stride 16; not refined")


def test_other_class_count_is_refused_on_resume(finished, data):
    classes = data / "classes.txt"
    text = classes.read_text()
    try:
        classes.write_text(text + "another\n")
        with pytest.raises(ValueError, match="has 8 classes, the data set has 9"):
            Trainer(config_of(data, resume="auto"), finished[0]).train()
    finally:
        classes.write_text(text)


def test_finished_run_is_extended(finished, data, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "run")
    again = Trainer(config_of(data, resume="auto", iterations=20, num_samples=0), out)
    rates: list[float] = []
    train_step = again.train_step

    def watched(images, labels):
        rates.append(again.optimizer.param_groups[0]["lr"])
        return train_step(images, labels)

    again.train_step = watched
    again.train()
    said = capsys.readouterr().out
    assert "continues at step 12 of 20, with iterations 12 -> 20\n" in said
    assert "the learning rate is 1.0e-04 at step 12 of 20 and falls to 1.0e-05 at step 14\n" in said
    assert rates == pytest.approx([1e-4, 1e-4, *[1e-5] * 6])
    assert [line[0] for line in loss_curve(out)] == [3, 6, 9, 12, 15, 18, 20]
    assert loss_curve(out)[:4] == loss_curve(finished[0])
    with pytest.raises(ValueError, match=r"iterations is 12, but the run in .* has taken 20 steps"):
        Trainer(config_of(data, resume="auto"), out).train()


def test_evaluation_out_of_memory_costs_no_step_and_its_advice_works(data, tmp_path, monkeypatch):
    out, config = tmp_path / "run", config_of(data, iterations=4, eval_every=3, checkpoint_every=100, num_samples=0)

    def full(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", full)
        with pytest.raises(MemoryError, match=r"--window .*\. The checkpoint of step 3 is in .*; --resume auto"):
            Trainer(config, out).train()
    assert not (out / "model").exists()
    advised = {"window": 48, "accumulate": 2, "amp": "bf16", "lr": 5e-4, "warmup": 5, "device": "cpu"}
    again = Trainer(dataclasses.replace(config, resume="auto", **advised), out)
    again.train()
    assert [line["step"] for line in read_records(out) if "mIoU" in line] == [3, 4]
    assert pretrained.load(out, torch.device("cpu")).preprocessing["window"] == 48
    changed = read_json_lines(out / "history.jsonl")[-1]["changed"]
    assert changed.keys() == advised.keys() | {"resume"}
    assert changed["lr"] == [1e-4, 5e-4]
    assert [line["lr"] for line in read_records(out) if "lr" in line][-1] == pytest.approx(5e-4 * 0.1)


def test_update_that_is_not_finite_is_not_saved(data, tmp_path):
    """The losses are those before the update: they do not show what it has done."""
    out = tmp_path / "run"
    trainer = Trainer(config_of(data, checkpoint_every=1, num_samples=0), out)
    train_step = trainer.train_step

    def diverging(images, labels):
        losses = train_step(images, labels)
        if trainer.step == 2:  # the third step
            with torch.no_grad():
                trainer.model.classifier.weight[0] = float("inf")
        return losses

    trainer.train_step = diverging
    message = (
        r"weights are not finite after step 3: 1 of \d+ tensors, such as classifier.weight\. The checkpoint of step 2 "
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(out / "checkpoints")] == [1, 2]
    again = Trainer(config_of(data, resume="auto", lr=1e-5, iterations=3, num_samples=0), out)
    again.train()
    assert again.step == 3


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    trainer = Trainer(config_of(data, lr=1e-3, log_every=4, checkpoint_every=2), out)
    train_step = trainer.train_step

    def poisoned(images, labels):
        if trainer.step == 4:  # the fifth step
            with torch.no_grad():
                trainer.model.boundary_head[-1].bias.fill_(float("nan"))
        return train_step(images, labels)

    trainer.train_step = poisoned
    with pytest.raises(FloatingPointError, match=r"not finite at step 5: boundary\. The checkpoint of step 4 .*--lr"):
        trainer.train()
    saved = checkpoint.checkpoints(out / "checkpoints")
    assert [p.name for p in saved] == ["step_00000002.pt", "step_00000004.pt"]
    state = torch.load(saved[-1])
    assert all(torch.isfinite(t).all() for t in state["model"].values())


@pytest.mark.parametrize("message", ["CUDA out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_says_what_to_change(data, tmp_path, monkeypatch, message):
    trainer = Trainer(config_of(data, batch_size=4), tmp_path / "run")
    kind = torch.OutOfMemoryError if "CUDA" in message else RuntimeError

    def full(images, labels):
        raise kind(message)

    monkeypatch.setattr(trainer, "train_step", full)
    said = (
        r"with 4 images of 64x64 at once \(batch_size 4\): --accumulate 2 .*crop-size.*\. The checkpoint of step 0 is "
    )
    with pytest.raises(MemoryError, match=said):
        trainer.train()
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints", trainer.device).step == 0
