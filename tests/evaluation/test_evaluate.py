"""Scores of known predictions, and `python -m unept.evaluate` from a saved run to its table, JSON and picture."""

import json
import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision import tv_tensors

from tests.helpers.models import StandIn
from unept import cli, evaluate
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.data import SegmentationDataset
from unept.data.shapes import LENGTHS
from unept.inference import InferenceConfig, InferenceOptions, resolve
from unept.model.network import UNEPT
from unept.model.output import UNEPTOutput
from unept.pictures import drawing

TINY = ModelConfig(
    backbone="resnet10t", pretrained_backbone=False, d_model=32, num_heads=2, num_points=2, ffn_dim=32, dropout=0.0
)


class Halves(SegmentationDataset):
    """Left of x = 16 lies class 0, right of it class 1; the first column is ignored; class 2 never occurs."""

    classes = ("left", "right", "nowhere")
    palette = ((255, 0, 0), (0, 255, 0), (0, 0, 255))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        mask = torch.zeros(16, 32, dtype=torch.uint8)
        mask[:, 16:] = 1
        mask[:, 0] = 255
        return tv_tensors.Image(torch.full((3, 16, 32), i, dtype=torch.uint8)), tv_tensors.Mask(mask)

    def name(self, i: int) -> str:
        return f"half{i}"


class Unlike(Halves):
    """The edge lies at x = 17, 20 and 29: any two of the images score other than all three."""

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = super().__getitem__(i)
        mask[:, 16 : 17 + 3 * i * i] = 0
        return image, mask


class Shifted(StandIn):
    """Predicts the edge at x = 20 and that all is boundary, whose refinement reads 1 pixel to the left."""

    def __init__(self):
        super().__init__(Halves.classes)
        self.calls = 0

    def forward(self, images: Tensor) -> UNEPTOutput:
        self.calls += 1
        logits = torch.full((1, 3, 2, 4), -100.0)
        logits[:, 0] = torch.tensor([1.0, 1.0, 0.0, -1.0])  # 0 is passed at x = 20, the centre of the third column
        logits[:, 1] = -logits[:, 0]
        direction = torch.zeros(1, 8, 2, 4)
        direction[:, 0] = 1  # (-1, 0)
        return UNEPTOutput(logits, torch.full((1, 1, 2, 4), 5.0), direction)


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


def scores_of_shifted(**options) -> dict:
    config = InferenceConfig(**options)
    return evaluate.evaluate_model(Shifted(), Halves(), config, torch.device("cpu"), boundary_tolerance=3)


def test_scores_of_a_known_prediction():
    scores = scores_of_shifted()
    # In 31 counted columns the truth's edge is at 16; the prediction's at 20, read 1 pixel to the left at 21.
    assert scores["pixAcc_unrefined"] == pytest.approx(27 / 31)
    assert scores["pixAcc"] == pytest.approx(26 / 31)
    assert scores["mIoU_unrefined"] == pytest.approx((15 / 19 + 12 / 16) / 2)
    assert scores["mIoU"] == pytest.approx((15 / 20 + 11 / 16) / 2)
    assert scores["iou"][:2] == pytest.approx([15 / 20, 11 / 16])
    assert scores["accuracy"][:2] == pytest.approx([1, 11 / 16])
    assert math.isnan(scores["iou"][2])
    assert scores["share"] == pytest.approx([15 / 31, 16 / 31, 0])
    assert scores["left_out"] == ["nowhere"]
    assert (scores["images"], scores["boundary_tolerance"]) == (3, 3)
    # Boundary columns of the truth 15 | 16, of the prediction 19 | 20: 4 off; tolerance 4 finds them.
    assert scores["boundary_f_unrefined"] == 0
    near = evaluate.evaluate_model(Shifted(), Halves(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=4)
    assert (near["boundary_f_unrefined"], near["boundary_f"]) == (1, 0)


def test_options_reach_the_prediction():
    assert scores_of_shifted(refine_scale=4)["pixAcc"] == pytest.approx(23 / 31)
    without = scores_of_shifted(refine=False)
    assert without["pixAcc"] == without["pixAcc_unrefined"] == pytest.approx(27 / 31)


def test_one_forward_pass_an_image():
    model = Shifted()
    evaluate.evaluate_model(model, Halves(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=3)
    assert model.calls == 3


def _rank(rank: int, rendezvous: str, folder: str) -> None:
    """One of two processes that evaluate together."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model = Shifted()
    scores = evaluate.evaluate_model(model, Unlike(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=4)
    torch.save((model.calls, scores), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_agree(tmp_path):
    alone = evaluate.evaluate_model(Shifted(), Unlike(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=4)
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    calls, scores = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    assert calls == (2, 1)
    for key in ("mIoU", "pixAcc", "boundary_f", "mIoU_unrefined", "boundary_f_unrefined", "images", "share"):
        assert scores[0][key] == scores[1][key] == alone[key]


def test_table():
    scores = scores_of_shifted() | {"images_per_s": 12.34}
    table = evaluate.format_table(scores, Halves.classes).splitlines()
    assert table[2].split() == ["left", "75.00", "100.00", "0.00", "48.39"]
    assert table[4].split() == ["nowhere", "-", "-", "-", "0.00"]
    assert len({len(line) for line in table[:6]}) == 1
    assert table[7].split() == ["mIoU", "71.88", "76.97"]
    assert table[-2].startswith("Halves, 3 classes. All in percent; boundary F within 3 px; 3 images, 12.3 images/s")
    assert table[-1].startswith("mIoU leaves out 1 of 3 classes, found neither in the labels nor in the predictions")
    complete = evaluate.format_table(scores | {"left_out": []}, Halves.classes).splitlines()
    assert complete == table[:-1]


def test_samples_are_spread_over_the_data_set(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "sample_panel", lambda samples, *_: drawn.extend(samples))
    evaluate.draw_samples(Shifted(), Halves(), 2, InferenceConfig(), torch.device("cpu"), tmp_path / "x.png")
    assert [sample.name for sample in drawn] == ["half0", "half1"]
    assert (drawn[0].prediction[0] == 0).sum() == 20
    assert (drawn[0].refined[0] == 0).sum() == 21
    assert drawn[0].boundary.shape == (16, 32)
    torch.testing.assert_close(drawn[0].boundary, torch.full((16, 32), 5.0).sigmoid())


def test_command(run_folder, command):
    status, out, _ = command(run_folder, "--scales", "0.5", "1", "--flip", "--window", "96")
    assert status == 0
    assert "boundary F within 2 px; 3 images" in out  # the tolerance of the run
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
    assert (run_folder / "evaluation.png").stat().st_size > 5000


def test_command_line_wins_over_the_run(run_folder, command):
    status, out, _ = command(run_folder, "--refine-scale", "1", "--boundary-tolerance", "1", "--split", "val")
    assert status == 0
    assert "within 1 px" in out
    record = json.loads((run_folder / "evaluation.json").read_text())
    assert record["inference"]["refine_scale"] == 1
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


def test_a_class_that_does_not_occur_is_null_in_json(tmp_path):
    text = json.dumps(
        evaluate.json_ready({"iou": [0.5, float("nan")], "inference": {"scales": (1.0,)}}), allow_nan=False
    )
    assert json.loads(text) == {"iou": [0.5, None], "inference": {"scales": [1.0]}}


def test_other_class_count(tmp_path, command):
    save_run(tmp_path / "run", num_classes=5)
    status, _, err = command(tmp_path / "run")
    assert status == 2
    assert err.startswith("error: the model predicts 5 classes, but the data set has 8:")
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_classes_in_another_order():
    model = Shifted()
    model.classes = ["right", "left", "nowhere"]
    with pytest.raises(ValueError, match="its 'right' stands where the data set has 'left'"):
        evaluate.evaluate_model(model, Halves(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=3)


def test_no_such_folder(tmp_path, command):
    assert command(tmp_path / "nothing")[2].startswith(f"error: {tmp_path}/nothing does not exist")
    status, _, err = command(tmp_path)
    assert status == 2
    assert err.startswith(
        f"error: {tmp_path} is not a run folder: give a folder that unept.train wrote, with config.json"
    )


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


def test_bugs_keep_their_traceback():
    def bug() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.run(bug)


def test_absent_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="use --device cpu"):
        cli.choose_device("cuda")
