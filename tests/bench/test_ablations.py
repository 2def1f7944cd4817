"""The ablations in miniature: the command trains, continues where it stopped, and checks the targets."""

import json
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from bench import ablation_plan, ablation_report, ablation_speed, ablations, pictures, smp
from tests.helpers import layouts
from tests.helpers.models import missing_members
from unept.config import ModelConfig, TrainConfig
from unept.evaluation.comparison import load_evaluation as read_evaluation
from unept.inference import InferenceConfig, predict_ids
from unept.model.network import UNEPT
from unept.model.output import TrainableModel

TINY = {"backbone": "resnet10t", "pretrained_backbone": False, "d_model": 32, "num_heads": 4, "ffn_dim": 64}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options: a CamVid of four images, and the backbone's weights."""
    folder = tmp_path_factory.mktemp("ablations")
    layouts.write_noisy_camvid(folder / "camvid")
    torch.manual_seed(0)
    backbone = timm.create_model(smp.BACKBONE)
    save_file(backbone.state_dict(), folder / "weights.safetensors")
    return ["--data", str(folder / "camvid"), "--weights", str(folder / "weights.safetensors"), "--out"]


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.ablations", *map(str, arguments)])
    return ablations.main()


def test_jobs_run_once_and_end_in_a_table(inputs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("segmentation_models_pytorch")
    small = [*inputs, tmp_path, "--iterations", 1, "--batch-size", 2, "--crop-size", 48, 64]
    for name in ("FPN", "PointRend"):  # as the command does for each job, in its process
        assert run(monkeypatch, *small, "--job", name) == 0
    lines = (tmp_path / "runs" / "PointRend" / "metrics.jsonl").read_text().splitlines()
    assert any({"loss", "segmentation", "points"} < set(json.loads(line)) for line in lines)
    for record in (read_evaluation(tmp_path / "runs" / name) for name in ("FPN", "PointRend")):
        assert (len(record["iou"]), record["split"]) == (len(record["classes"]), "val")
    both = [*small, "--only", "baseline", "FPN"]
    assert run(monkeypatch, *both) == 0
    printed = capsys.readouterr().out
    assert "== baseline" in printed
    assert "== FPN" not in printed, "it has a result"
    found = ablations.read_results(tmp_path)
    assert set(found) == {"baseline", "FPN", "PointRend"}
    for result in found.values():
        assert 0 <= result["mIoU"] <= 1
        assert result["iterations"] == 1
        assert result["parameters"] > 1e6
        assert result["gmacs"] > 0.5
        assert 0 <= result["boundary_f1"] <= result["boundary_f"] <= 1
    text = (tmp_path / "README.md").read_text()
    assert "| baseline | " in text
    assert "- not measured: mIoU above that of every network of segmentation-models-pytorch" in text
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert run(monkeypatch, *both) == 0
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert "== " not in capsys.readouterr().out


def test_trained_networks_are_drawn_side_by_side(inputs, tmp_path, monkeypatch, capsys):
    """A compared network is loaded again as it was saved, and predicts what it did."""
    pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    small = [*inputs, tmp_path, "--iterations", 1, "--batch-size", 2, "--crop-size", 48, 64]
    assert run(monkeypatch, *small, "--job", "CCNet") == 0
    job = next(job for job in ablation_plan.plan({}) if job.name == "CCNet")
    saved = torch.load(tmp_path / "runs" / "CCNet" / "model" / "model.pt", weights_only=True)
    loaded = pictures.load(job, tmp_path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    arguments = [inputs[1], "--out", tmp_path, "--pictures", tmp_path, "--samples", 1, "--names"]
    monkeypatch.setattr(sys, "argv", ["bench.pictures", "--data", *map(str, [*arguments, "CCNet"])])
    assert pictures.main() == 0
    assert (tmp_path / "0_comparison.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["bench.pictures", "--data", *map(str, [*arguments, "OCRNet"])])
    assert pictures.main() == 2
    assert "train it first by python -m bench.ablations --only OCRNet ..." in "".join(capsys.readouterr())


def test_trainings_of_both_sizes_are_known_by_name(tmp_path):
    """A training of one size only is asked to be made, quoted for the shell; a name of no size is refused."""
    for name in ("bilinear heads", "subpixel heads", "L=1 N=8 seed 2"):
        with pytest.raises(ValueError, match=rf"train it first by .* --only '{name}' "):
            pictures.load_trained([name], tmp_path)
    with pytest.raises(ValueError, match=r"there is no training 'L=2 N=8'; there are .*subpixel heads, .*bilinear hea"):
        pictures.load_trained(["L=2 N=8"], tmp_path)


def test_a_network_of_the_size_tiny_is_loaded_with_its_own_options(tmp_path):
    """The run says what the network is, whichever size has its name."""
    config = TrainConfig(model=ModelConfig(**TINY, num_points=8, num_levels=1), out=tmp_path)
    run = tmp_path / "runs" / "L=1 N=8"
    run.mkdir(parents=True)
    (run / "config.json").write_text(config.to_json())
    UNEPT(5, **config.model.options()).save_pretrained(run / "model")
    (loaded,) = pictures.load_trained(["L=1 N=8"], tmp_path).values()
    assert (loaded.options["num_points"], loaded.options["num_levels"]) == (8, 1)


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_others(inputs, tmp_path, monkeypatch, capfd):
    arguments = [*inputs, tmp_path, "--only", "memory resnet50 B=2 torch bf16 eager"]
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert run(monkeypatch, *arguments) == 1
    err = capfd.readouterr().err
    assert "the peak of a training step is measured on a GPU, and PyTorch finds none here" in err
    assert "failed: memory resnet50 B=2 torch bf16 eager" in err


def test_no_time_left_runs_nothing(inputs, tmp_path, monkeypatch):
    assert run(monkeypatch, *inputs, tmp_path, "--minutes", 0) == 0
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("name", ablation_plan.SMP)
def test_a_baseline_predicts_every_pixel(name):
    pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    baseline = smp.Baseline(ablation_plan.SMP[name], "abcde", [(0, 0, 0)] * 5, None).eval()
    images = torch.randint(0, 256, (1, 3, 72, 100), dtype=torch.uint8)
    output = baseline(images)
    stride = 8 if name in ("PSPNet", "DeepLabV3") else 4
    assert output.logits.shape == (1, 5, 72 // stride, 104 // stride)
    assert (output.boundary, output.logits_stride) == (None, stride)
    assert predict_ids(baseline, images, InferenceConfig()).shape == (1, 72, 100)
    assert not missing_members(baseline, TrainableModel)


def test_backbone_weights_are_taken_whole(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    weights = {name: torch.ones_like(t) for name, t in timm.create_model(smp.BACKBONE).state_dict().items()}
    save_file(weights, tmp_path / "ones.safetensors")
    baseline = smp.Baseline("FPN", "ab", [(0, 0, 0)] * 2, tmp_path / "ones.safetensors")
    assert all((t == 1).all() for t in baseline.backbone.model.state_dict().values())
    del weights["conv_stem.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of the backbone's tensors, such as conv_stem\.weight"):
        smp.Baseline("FPN", "ab", [(0, 0, 0)] * 2, tmp_path / "part.safetensors")


def scores(value: float) -> dict[str, float]:
    named = {"mIoU": value, "pixAcc": 0.9, "boundary_f": 0.615, "mIoU_unrefined": value, "boundary_f_unrefined": 0.6}
    named |= dict.fromkeys(("boundary_f1", "boundary_iou", "boundary_f1_unrefined", "boundary_iou_unrefined"), 0.5)
    rest = {
        "images_per_s": 9.0,
        "parameters": 5e6,
        "gmacs": 7.0,
        "training_images_per_s": 50.0,
        "peak_gib": 3.0,
        "minutes": 4.0,
    }
    return {**named, **rest}


def test_seeds_follow_the_better_rate_and_the_best_baseline():
    results = {job.name: scores(0.5) for job in ablation_plan.plan({}) if job.part in ("parts", "baselines", "rates")}
    results["UPerNet x3"] = scores(0.6)
    results["unept x3"] = scores(0.4)
    seeds = {job.name: job for job in ablation_plan.plan(results) if job.part == "seeds"}
    assert set(seeds) == {"unept seed 1", "unept seed 2", "UPerNet x3 seed 1", "UPerNet x3 seed 2"}
    assert seeds["UPerNet x3 seed 1"].rate == 3
    assert seeds["UPerNet x3 seed 1"].baseline == "UPerNet"
    del results["FPN x3"]
    assert not [job for job in ablation_plan.plan(results) if job.part == "seeds"], "a baseline is not tuned yet"


def test_the_size_tiny_has_a_plan_around_its_own_network():
    paper, tiny = ({job.name: job for job in ablation_plan.plan({}, size=size)} for size in ("paper", "tiny"))
    of = lambda jobs, part: {name for name, job in jobs.items() if job.part == part}
    assert of(paper, "points") == {"L=1 N=4", "L=1 N=16", "L=3 N=4"}  # L=3 N=16 is the final network
    assert of(tiny, "points") == {"L=1 N=4", "L=1 N=8", "L=1 N=16", "L=3 N=4", "L=3 N=16"}
    assert of(paper, "boundaries") == {"subpixel heads", "direction 0.7", "predicted pixels"}
    assert of(tiny, "boundaries") == {"bilinear heads", "direction 0.7", "predicted pixels"}
    assert of(paper, "queries") == {
        "spatial+encoder queries", "zero residuals", "spatial+encoder queries, zero residuals"
    }  # fmt: skip
    assert of(tiny, "queries") == {"spatial queries", "random residuals", "spatial queries, random residuals"}
    for job in tiny.values():
        if job.baseline is None and job.part != "memory":
            changed = {name: getattr(ablation_plan.network("tiny"), name) for name in job.model}
            assert not job.model or changed != job.model, "it would train the final network again"


def test_every_training_can_have_several_seeds():
    once, thrice = ablation_plan.plan({}), ablation_plan.plan({}, seeds=3)
    trainings = [job.name for job in once if job.part != "memory"]
    assert {job.name for job in thrice} == {
        *(job.name for job in once),
        *(f"{name} seed {seed}" for name in trainings for seed in (1, 2)),
    }
    assert {job.row for job in thrice if job.part != "memory"} == set(trainings)
    assert {job.seed for job in thrice if job.row == "CCNet"} == {0, 1, 2}


def test_seeds_that_are_asked_for_stay_in_the_part_of_their_training():
    plan = ablation_plan.plan({}, seeds=3)
    names = lambda part: {job.name for job in plan if job.part == part}
    rows = {"subpixel heads", "direction 0.7", "predicted pixels"}
    assert names("boundaries") == rows | {f"{row} seed {seed}" for row in rows for seed in (1, 2)}
    results = {job.name: scores(0.5) for job in ablation_plan.plan({}) if job.part in ("parts", "baselines", "rates")}
    plan = ablation_plan.plan(results, seeds=2)
    assert {job.name for job in plan if job.part == "parts" and job.row == "unept"} == {"unept", "unept seed 1"}
    assert {job.name for job in plan if job.part == "seeds"} == {"unept seed 2", "DeepLabV3+ seed 2"}
    results["unept seed 1"] = scores(0.9)
    assert ablation_plan.best_rate("unept", plan, results).name == "unept", "a rate is chosen by seed 0"


def test_seeds_share_a_row_with_mean_and_deviation():
    results = {"unept": scores(0.5), "unept seed 1": scores(0.6) | {"seed": 1}, "CCNet": scores(0.4)}
    lines = ablation_report.report(results).splitlines()
    assert lines[2].startswith("| unept (2 seeds) | 55.00 ± 7.07 | 90.00 ± 0.00 |")
    assert lines[3].startswith("| CCNet | 40.00 | 90.00 |")


def test_targets():
    results = {job.name: scores(0.7) for job in ablation_plan.plan({}) if job.part in ("parts", "baselines", "rates")}
    results["baseline"], results["unept x3"] = scores(0.65), scores(0.73)
    results["memory resnet50 B=2 triton bf16 compiled"] = {"peak_gb": 2.9, "parameters": 3e7, "gmacs": 134.1}
    assert ablation_report.check_targets(results) == [
        "- pass: mIoU of the final network at least 0.72",
        "- pass: mIoU above that of every network of segmentation-models-pytorch",
        "- pass: refinement: at least one point of boundary F",
        "- pass: pyramid above baseline",
        "- MISS: unept above pyramid",
        "- MISS: resnet50: at most 40 % of 7.0 GB at batch 2",
        "- not measured: deit_base_distilled_patch16_384.fb_in1k: at most 40 % of 8.5 GB at batch 2",
    ]
    assert json.dumps(results)
    assert "| memory resnet50 B=2 triton bf16 compiled | 2.90 | 30.0 | 134.1 |" in ablation_report.report(results)


def test_the_speed_of_networks_is_timed_side_by_side(inputs, monkeypatch, capsys):
    arguments = [*inputs[:2], "--names", "unept", "OCRNet", "--crop-size", "48", "64", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.ablation_speed", *arguments])
    ablation_speed.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["unept", "OCRNet"]
    assert all(float(rate) > 0 for row in rows for rate in row[1:])
