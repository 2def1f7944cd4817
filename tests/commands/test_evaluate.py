"""`python -m unept.evaluate`, from a saved run to its table, JSON and picture."""

import json
import sys

import pytest
import torch
from PIL import Image

from tests.helpers.known_scores import Shifted
from unept import evaluate
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.data.shapes import LENGTHS
from unept.inference import InferenceOptions, resolve
from unept.model.network import UNEPT

TINY = ModelConfig(
    backbone="resnet10t", pretrained_backbone=False, d_model=32, num_heads=2, num_points=2, ffn_dim=32, dropout=0.0
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of 8 classes on `shapes` with an untrained model."""
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    save_run(folder, num_classes=8)
    return folder


def save_run(folder, num_classes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(model=TINY, data=DataConfig(dataset="shapes"), boundary_tolerance=2, refine_scale=2)
    (folder / "config.json").write_text(config.to_json())
    UNEPT(num_classes, **TINY.options()).save_pretrained(folder / "model")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command; gives its exit status, standard output and standard error."""
    monkeypatch.setitem(LENGTHS, "val", 3)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), "--workers", "0", "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            evaluate.main()
        return end.value.code, *capsys.readouterr()

    return call


def test_command(run_folder, command):
    status, out, _ = command(run_folder, "--scales", "0.5", "1", "--flip", "--window", "96")
    assert status == 0
    # The tolerance is that of the run.
    assert "boundary F within 2 px, boundary IoU within 2 % of the diagonal; 3 images" in out
    record = json.loads((run_folder / "evaluation.json").read_text())
    assert record["dataset"] == "Shapes, 8 classes"
    assert len(record["iou"]) == len(record["classes"]) == 8
    assert 0 <= record["mIoU"] <= 1
    assert record["inference"]["scales"] == [0.5, 1.0]
    assert record["inference"]["flip"] is True
    assert record["inference"]["window"] == 96
    assert record["inference"]["window_stride"] == 64
    assert record["inference"]["refine_scale"] == 2  # of the run
    assert record["left_out"] == [n for n, iou in zip(record["classes"], record["iou"], strict=True) if iou is None]
    line = "scales 0.5 1 with flip; images at their own size; windows of 96 with stride 64; refined by 2 px."
    assert f"Protocol: {line}\n" in out
    assert f"{100 * record['mIoU']:.2f}" in out
    for name in ("evaluation.png", "confusion.png", "calibration.png", "worst.png"):
        assert (run_folder / name).stat().st_size > 5000
        assert str(run_folder / name) in out
    assert (run_folder / "evaluation.csv").read_text().count("\n") == 9
    confusion = torch.tensor(record["confusion"])
    assert confusion.diagonal().sum() / confusion.sum() == pytest.approx(record["pixAcc"])
    assert f"Expected calibration error {record['calibration']['ece']:.2%}" in out


def test_several_runs_end_in_their_mean(run_folder, command, tmp_path):
    torch.manual_seed(1)  # not the weights of the first run
    save_run(tmp_path / "other", num_classes=8)
    status, out, _ = command(run_folder, tmp_path / "other", "--window", "96")
    assert status == 0
    scores = [json.loads((run / "evaluation.json").read_text())["mIoU"] for run in (run_folder, tmp_path / "other")]
    assert scores[0] != scores[1]
    last = out[out.index("mean of 2 runs") :].splitlines()
    assert last[1].split()[1] == f"{50 * sum(scores):.2f}"
    assert len(last) == 5


def test_runs_on_different_data_have_no_mean(run_folder, command, tmp_path, monkeypatch):
    """Their results are there all the same."""
    save_run(tmp_path / "other", num_classes=8)
    descriptions = iter(["shapes, 8 classes", "others, 8 classes"])
    monkeypatch.setattr("unept.data.shapes.Shapes.description", property(lambda self: next(descriptions)))
    status, out, _ = command(run_folder, tmp_path / "other", "--window", "96")
    assert status == 0
    assert "\n\nThere is no mean of runs on different data: shapes, 8 classes, others, 8 classes\n" in out


def test_several_runs_have_a_folder_each_below_out(run_folder, command, tmp_path):
    other, out = tmp_path / "other", tmp_path / "out"
    save_run(other, num_classes=8)
    options = ("--window", "96", "--out", out)
    before = {path: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    status, printed, _ = command(run_folder, other, *options)
    assert status == 0
    for run in (run_folder, other):
        names = {path.name for path in (out / run.name).iterdir()}
        assert names == {*evaluate.FILES, "worst.png"}
        assert f"Written: {out / run.name / 'evaluation.json'}, " in printed
    assert "mean of 2 runs" in printed
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.iterdir()}, "the run folder is left alone"
    save_run(tmp_path / "more" / "other", num_classes=8)
    status, printed, err = command(other, tmp_path / "more" / "other", *options)
    assert (status, printed) == (2, "")
    assert "would share one folder below" in err


def test_saved_model_on_the_data_set_of_a_preset(run_folder, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, options = run_folder / "model", ("--window", "96", "--refine-scale", "2", "--boundary-tolerance", "2")
    before = sorted(model.iterdir())
    assert command(model, "--preset", "shapes", *options)[0] == 0
    of_preset = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert command(run_folder, *options)[0] == 0
    of_run = json.loads((run_folder / "evaluation.json").read_text())
    assert of_preset["iou"] == of_run["iou"]
    assert of_preset["inference"] == of_run["inference"]
    assert sorted(model.iterdir()) == before
    for name in (model, "camvid_tiny"):
        status, _, err = command(name)
        assert status == 2
        assert f"error: {name} is a model without the run that trained it: say with --preset and --root" in err
    assert "there is no preset 'shape'" in command(model, "--preset", "shape")[2]
    # The demo model has other classes.
    assert "but the data set has 8" in command("camvid_tiny", "--preset", "shapes")[2]


def test_command_line_wins_over_the_run(run_folder, command, tmp_path):
    options = (
        "--refine-scale",
        "1",
        "--boundary-tolerance",
        "1",
        "2",
        "--split",
        "val",
        "--out",
        tmp_path / "new" / "out",
    )
    before = {path: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    status, out, _ = command(run_folder, *options)
    assert status == 0
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.iterdir()}, "the run folder is left alone"
    assert f"Written: {tmp_path}/new/out/evaluation.json, {tmp_path}/new/out/evaluation.csv, " in out
    assert "within 1 px" in out
    record = json.loads((tmp_path / "new" / "out" / "evaluation.json").read_text())
    assert record["inference"]["refine_scale"] == 1
    assert record["boundary_tolerance"] == 1
    assert 0 <= record["boundary_f"] <= record["boundary_f_2px"] <= 1
    assert record["split"] == "val"


RUN = {"window": 480, "window_stride": 240, "refine": False, "refine_scale": 2}
RUN_LINE = "scale 1 without flip; short side 512; windows of 480 with stride 240; not refined"


@pytest.mark.parametrize(
    ("run", "chosen", "line"),
    [
        ({}, {}, "scale 1 without flip; short side 512; whole images; refined by 1 px"),
        (RUN, {}, RUN_LINE),
        (RUN, {"flip": True}, RUN_LINE.replace("without", "with")),
        (RUN, {"refine": True}, RUN_LINE.replace("not refined", "refined by 2 px")),
        (RUN, {"window": 96}, RUN_LINE.replace("480 with stride 240", "96 with stride 64")),
        (RUN, {"window": 480, "window_stride": 320}, RUN_LINE.replace("240", "320")),
        (RUN, {"window": 0}, RUN_LINE.replace("windows of 480 with stride 240", "whole images")),
        (RUN, {"short_side": 0}, RUN_LINE.replace("short side 512", "images at their own size")),
        ({"model": ModelConfig(context_queries="learned")}, {"refine": True}, "not refined"),
    ],
    ids=["all", "none", "flip", "refine", "window", "stride", "whole", "own-size", "no-boundaries"],
)
def test_the_protocol_of_the_run_fills_in_what_is_left_open(run, chosen, line):
    trained = TrainConfig(data=DataConfig(short_side=512), **run)
    model = Shifted()
    model.preprocessing = trained.inference().protocol()
    model.refines = trained.model.context_queries == "spatial"
    config = resolve(InferenceOptions(**chosen), model)
    assert config.describe().endswith(line)
    assert None not in vars(config).values()


def test_the_run_says_whether_to_refine(tmp_path, command):
    save_run(tmp_path, num_classes=8)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"refine": true', '"refine": false'))
    for flags, refined in ((), False), (("--refine",), True), (("--no-refine",), False):
        status, out, _ = command(tmp_path, *flags)
        assert status == 0
        assert ("refined by 2 px" if refined else "not refined") in out
        assert json.loads((tmp_path / "evaluation.json").read_text())["inference"]["refine"] is refined


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run on a folder of images, whose root is there without labels."""
    root = tmp_path / "data"
    (root / "images" / "val").mkdir(parents=True)
    (root / "classes.txt").write_text("left\nright\n")
    Image.new("RGB", (32, 24)).save(root / "images" / "val" / "a.png")
    save_run(tmp_path / "run", num_classes=2)
    config = TrainConfig(model=TINY, data=DataConfig(dataset="folder", root=root))
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    return tmp_path / "run", root / "labels" / "val"


def test_a_folder_without_labels_is_refused(folder, command):
    run, labels = folder
    status, _, err = command(run)
    assert status == 2
    assert err.startswith(f"error: there is no folder {labels}: check the dataset's root folder")
    assert err.endswith("without labels, segment images with `python -m unept.predict`\n")
    labels.mkdir(parents=True)
    Image.new("L", (32, 24), 255).save(labels / "a.png")
    status, _, err = command(run)
    assert status == 2
    assert "error: no pixel of the 1 images has a class: all of their labels are 255, which is ignored." in err
    assert not (run / "evaluation.json").exists()


def test_number_of_worst_images(run_folder, command):
    (run_folder / "worst.png").unlink(missing_ok=True)
    assert command(run_folder, "--worst", "0")[0] == 0
    assert not (run_folder / "worst.png").exists()
    assert "worst is -1" in command(run_folder, "--worst", "-1")[2]


def test_other_class_count(tmp_path, command):
    save_run(tmp_path / "run", num_classes=5)
    status, _, err = command(tmp_path / "run")
    assert status == 2
    assert err.startswith("error: the model predicts 5 classes, but the data set has 8:")
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_no_such_folder(tmp_path, command):
    assert command(tmp_path / "nothing")[2].startswith(f"error: {tmp_path}/nothing does not exist")
    status, _, err = command(tmp_path)
    assert status == 2
    assert err.startswith(
        f"error: {tmp_path} is not a run folder: give a folder that unept.train wrote, with config.json"
    )


def test_name_that_may_be_of_the_hub(command):
    status, _, err = command("runs/typo")
    assert status == 2
    assert err.startswith("error: runs/typo does not exist: give a folder that unept.train wrote; if it is a model on")


def test_run_of_the_name_of_the_demo_model(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "camvid_tiny").mkdir()
    assert "camvid_tiny is not a run folder" in command("camvid_tiny")[2]


def test_run_without_a_model_yet(tmp_path, command):
    (tmp_path / "config.json").write_text(TrainConfig(model=TINY, iterations=600, eval_every=300).to_json())
    status, _, err = command(tmp_path)
    assert status == 2
    assert "has no model/ yet: training writes it after its first evaluation, at step 300" in err


def test_damaged_weights(tmp_path, command):
    save_run(tmp_path, num_classes=8)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, err = command(tmp_path)
    assert status == 2
    assert f"{weights} is damaged" in err
