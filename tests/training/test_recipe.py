"""What the paper does not have: fine-tuning, freezing, other losses and rates, early stopping; resumed exactly."""

import dataclasses
import shutil

import pytest
import torch

from tests.helpers import layouts
from tests.helpers.training import arguments, configuration, loss_curve, read_records
from unept import UNEPT, train
from unept.config import TrainConfig
from unept.recipe import RecipeConfig
from unept.training import checkpoint
from unept.training.optimizer import build_optimizer, learning_rate_factor, without_decay
from unept.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return layouts.shapes(tmp_path_factory.mktemp("data"), train=4, val=2)


def config_of(data, *options: str, **changes) -> TrainConfig:
    short = {"iterations": 4, "log_every": 1, "eval_every": 2, "checkpoint_every": 2, "num_samples": 0}
    return configuration(arguments(data, "--batch-size", "2", "--workers", "0", *options), **{**short, **changes})


def continued(config: TrainConfig, whole, part) -> Trainer:
    """A trainer that repeats the second half of a run from its checkpoint at step 2."""
    shutil.copytree(whole, part)
    (part / "checkpoints" / "step_00000004.pt").unlink()
    again = Trainer(dataclasses.replace(config, resume="auto"), part)
    again.train()
    return again


def same_weights(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


RECIPES = {
    "rates": ["--clip-grad", "0.1", "--layer-decay", "0.8", "--no-decay-norms", "--schedule", "poly", "--ema", "0.9"],
    "losses": ["--segmentation-loss", "ohem", "--label-smoothing", "0.1", "--class-weights", "auto"],
    "frozen": ["--freeze-stages", "2", "--grad-checkpointing", "--segmentation-loss", "focal", "--dropout", "0.3"],
}


@pytest.mark.parametrize(
    "recipe", ["rates", *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name != "rates")]
)
def test_resume_is_exact(data, tmp_path, recipe):
    config = config_of(data, *RECIPES[recipe])
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    again = continued(config, tmp_path / "whole", tmp_path / "part")
    assert loss_curve(tmp_path / "part") == loss_curve(tmp_path / "whole")
    assert same_weights(whole.model.state_dict(), again.model.state_dict())
    assert same_weights(whole.evaluated_model.state_dict(), again.evaluated_model.state_dict())


@pytest.mark.slow
def test_region_losses_are_recorded_and_resume_exactly(data, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    config = config_of(data, "--dice-weight", "1", "--lovasz-weight", "0.5")
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    again = continued(config, tmp_path / "whole", tmp_path / "part")
    assert same_weights(whole.model.state_dict(), again.model.state_dict())
    line = next(line for line in read_records(tmp_path / "whole") if "loss" in line)
    weights = {"segmentation": 1, "refined": 1.5, "boundary": 3, "direction": 0.7, "dice": 1, "lovasz": 0.5}
    assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-5)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run to fine-tune from, on the 8 classes of the shapes."""
    out = tmp_path_factory.mktemp("trained") / "run"
    trainer = Trainer(config_of(data, "--d-model", "64", iterations=1), out)
    trainer.train()
    return out


def test_fine_tuning_on_other_classes(data, trained, tmp_path, capsys):
    """The network is built as the trained one; its weights are taken but for the classifier; what was left is said."""
    other = shutil.copytree(data, tmp_path / "data")
    (other / "classes.txt").write_text("\n".join(f"thing {k}" for k in range(9)))
    command = ["folder", "--root", str(other), "--init-from", str(trained), "--iterations", "1", "--batch-size", "2"]
    command += ["--crop-size", "64", "64", "--short-side", "None", "--workers", "0", "--num-samples", "0"]
    config = train.parse([*command, "--out", str(tmp_path / "run")])[1]
    assert (config.model.backbone, config.model.d_model) == ("resnet10t", 64)
    trainer = Trainer(config, tmp_path / "never")
    shown = capsys.readouterr().out
    assert f"Started from {trained}: " in shown
    assert "initialised anew: classifier.weight, classifier.bias" in shown
    source, start = UNEPT.from_pretrained(trained / "model").state_dict(), trainer.model.state_dict()
    taken = {name: value for name, value in source.items() if not name.startswith("classifier.")}
    assert same_weights(taken, start)
    train.train([*command, "--out", str(tmp_path / "run")])
    tuned = UNEPT.from_pretrained(tmp_path / "run" / "model")
    assert tuned.classes == [f"thing {k}" for k in range(9)]
    again = train.parse([*command, "--d-model", "32"])[1]
    assert again.model.d_model == 32, "an option comes before what the source says"
    for backbone, pretrained in (("resnet10t", False), ("resnet18", True)):
        assert train.parse([*command, "--backbone", backbone])[1].model.pretrained_backbone is pretrained
    assert not train.parse([*command, "--backbone=resnet18", "--no-pretrained-backbone"])[1].model.pretrained_backbone


def test_fine_tuning_on_the_same_classes_keeps_the_classifier(data, trained, tmp_path):
    trainer = Trainer(config_of(data, "--d-model", "64", "--init-from", str(trained)), tmp_path)
    assert same_weights(UNEPT.from_pretrained(trained / "model").state_dict(), trainer.model.state_dict())


def test_fine_tuning_keeps_the_normalisation(data, trained, tmp_path):
    """One that was set after the model was made stands beside its options."""
    model = UNEPT.from_pretrained(trained / "model")
    model.set_normalization([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])
    model.save_pretrained(tmp_path / "model")
    command = ["--d-model", "64", "--init-from", str(tmp_path / "model"), "--out", str(tmp_path / "run")]
    config = train.parse(arguments(data, *command))[1]
    tuned = Trainer(config, tmp_path / "run").model
    assert tuned.preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert torch.equal(tuned.mean, model.mean)
    assert torch.equal(tuned.std, model.std)
    other = train.parse(arguments(data, *command, "--backbone", "resnet18"))[1].model
    assert other.mean is None, "that of the other backbone"
    five = train.parse(arguments(data, *command, "--in-chans", "5", "--no-photometric"))[1].model
    assert five.mean is None, "the average of the backbone's"
    plain = ["--d-model", "64", "--init-from", str(trained / "model")]
    assert train.parse(arguments(data, *plain))[1].model.mean is None
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.warns(UserWarning, match="of another shape"):
        five = UNEPT.from_pretrained(tmp_path / "tuned", in_chans=5, ignore_mismatched_sizes=True)
    assert len(five.preprocessing["mean"]) == 5


def test_a_run_continues_without_the_model_that_it_started_from(data, trained, tmp_path, monkeypatch):
    """Its own config.json says how its network is built, and its checkpoint holds the weights."""
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(trained, tmp_path / "source")
    command = ["folder", "--root", str(data), "--init-from", "source", "--batch-size", "2", "--crop-size", "64", "64"]
    command += ["--short-side", "None", "--workers", "0", "--num-samples", "0", "--amp", "off"]
    train.train([*command, "--iterations", "1"])
    shutil.rmtree(source)
    for out in ([], ["--out", "runs/folder"]):
        config = train.parse([*command, "--iterations", "2", "--resume", "auto", *out])[1]
        assert (config.model.d_model, config.recipe.init_from) == (64, "source")
    train.train([*command, "--iterations", "2", "--resume=auto"])
    assert checkpoint.load_latest(tmp_path / "runs" / "folder" / "checkpoints", torch.device("cpu")).step == 2
    for options in ([], ["--out", "elsewhere", "--resume", "auto"]):
        with pytest.raises(FileNotFoundError, match="source does not exist"):
            train.train([*command, "--iterations", "2", *options])


def test_source_that_does_not_exist(data, capsys):
    with pytest.raises(FileNotFoundError, match="no-run does not exist"):
        train.parse(arguments(data, "--init-from", "no-run"))
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        train.parse(arguments(data, "--init-from="))
    assert train.parse(arguments(data, "--init-from", "None"))[1].recipe.init_from is None
    with pytest.raises(SystemExit):
        train.parse(arguments(data, "--init-from"))
    assert "--init-from" in capsys.readouterr().err


@pytest.mark.parametrize("frozen", ["--freeze-backbone", "--freeze-stages=2"])
def test_frozen_parts_stay(data, tmp_path, frozen):
    """Weights and statistics of the batch normalisation, also after an evaluation; the rest is trained."""
    trainer = Trainer(config_of(data, frozen), tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name.split(".")[2] for name in after if "backbone" in name and not torch.equal(after[name], before[name])}
    assert moved == (set() if frozen == "--freeze-backbone" else {"layer3", "layer4"})
    assert not torch.equal(after["queries.0.1.running_mean"], before["queries.0.1.running_mean"])
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_more_stages_than_there_are(data, tmp_path):
    with pytest.raises(ValueError, match="freeze_stages is 9, but the backbone has 4 stages after its stem"):
        Trainer(config_of(data, "--freeze-stages", "9"), tmp_path)


@pytest.mark.slow
def test_early_stopping(data, tmp_path, monkeypatch, capsys):
    """After two evaluations that are not better; the run is complete then, and goes on with more patience alone."""
    scores = iter([0.3, 0.4, 0.2, 0.4, 0.5, 0.1])
    evaluate, measured = Trainer.evaluate, []

    def pretend(trainer):
        measured[:] = measured or [evaluate(trainer)]
        return {**measured[0], "mIoU": next(scores)}

    monkeypatch.setattr(Trainer, "evaluate", pretend)
    options = arguments(data, "--batch-size", "2", "--workers", "0", "--num-samples", "0", "--out", str(tmp_path / "r"))
    options += ["--iterations", "6", "--eval-every", "1", "--checkpoint-every", "6"]
    train.train([*options, "--patience", "2"])
    assert "Stopped after step 4: 2 evaluations were not better than the best" in capsys.readouterr().out
    evaluations = [line["step"] for line in read_records(tmp_path / "r") if "mIoU" in line]
    assert evaluations == [1, 2, 3, 4]
    again = Trainer(train.parse([*options, "--patience", "2", "--resume", "auto"])[1], tmp_path / "r")
    again.setup_run_folder()
    assert again.ended
    more = Trainer(train.parse([*options, "--patience", "3", "--resume", "auto"])[1], tmp_path / "r")
    more.train()
    assert (more.step, more.best) == (6, 0.5)


def test_groups_of_parameters():
    """The stem of a backbone is slowest, norms and biases have no weight decay, and every parameter is in one group."""
    model = UNEPT(3, "vit_tiny_patch16_224", d_model=32, num_heads=2, num_points=2, ffn_dim=32)
    recipe = RecipeConfig(layer_decay=0.5, decay_norms=False)
    optimizer = build_optimizer(model, TrainConfig(lr=1e-3, backbone_lr=1e-4, weight_decay=0.1, recipe=recipe))
    groups = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == {id(p) for p in model.parameters()}
    rate = {name: groups[id(p)] for name, p in model.named_parameters()}
    assert rate["classifier.weight"] == (1e-3, 0.1)
    assert rate["classifier.bias"] == rate["encoder.layers.0.norm1.weight"] == (1e-3, 0.0)
    assert rate["encoder.layers.0.self_attention.sampling_bias"] == (1e-3, 0.0)
    vit = "backbone.features.model."
    last = rate[f"{vit}blocks.11.attn.qkv.weight"]
    assert last == (pytest.approx(1e-4), 0.1)
    assert rate[f"{vit}blocks.10.attn.qkv.weight"][0] == pytest.approx(last[0] / 2)
    assert rate[f"{vit}patch_embed.proj.weight"] == (pytest.approx(last[0] / 2**12), 0.1)
    assert rate[f"{vit}pos_embed"][1] == rate[f"{vit}blocks.3.norm1.weight"][1] == 0
    assert optimizer.param_groups[0]["lr"] == 1e-3, "the one that is shown"
    frozen = build_optimizer(model, TrainConfig(lr=1e-3, backbone_lr=0, weight_decay=0.1, recipe=recipe))
    sizes = [[len(group["params"]) for group in o.param_groups] for o in (optimizer, frozen)]
    assert sizes[0] == sizes[1], "a run may continue with another backbone_lr"


def test_what_timm_spares_of_weight_decay():
    """Swin names its tables by their paths, where timm's feature maps have other names for them."""
    spared = {"swin_tiny_patch4_window7_224": "relative_position_bias_table", "vit_tiny_patch16_224": "pos_embed"}
    for backbone, ending in spared.items():
        model = UNEPT(3, backbone, d_model=32, num_heads=2, num_points=2, ffn_dim=32)
        found = without_decay(model)
        tables = {name for name, _ in model.named_parameters() if name.endswith(ending)}
        assert tables
        assert tables <= found
        assert not any(name.endswith("qkv.weight") for name in found)


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0", "convnext_atto", "densenet121"])
def test_layers_are_known(backbone):
    """Stem, then one stage after the other, whatever timm calls the parts when it gives features."""
    network = UNEPT(3, backbone, d_model=32, num_heads=2, num_points=2, ffn_dim=32).backbone
    stages, layers = network.layers(coarse=True), network.layers()
    assert stages.keys() == layers.keys() == dict(network.features.named_parameters()).keys()
    assert max(stages.values()) in (4, 5, 7)
    assert max(layers.values()) >= max(stages.values())
    order = list(stages.values())
    assert order == sorted(order)


def test_poly_schedule():
    config = TrainConfig(iterations=100, schedule="poly", warmup=4)
    assert learning_rate_factor(config, 50) == pytest.approx(0.5**0.9)
    assert learning_rate_factor(config, 0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, r"layer_decay is 0\.0; it must be in \(0, 1\]"),
        ({"clip_grad": -1.0}, r"clip_grad is -1\.0; it must be 0 or more"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0; it must be in \[0, 1\)"),
        (
            {"segmentation_loss": "hinge"},
            "segmentation_loss is 'hinge'; it must be 'cross-entropy' or 'focal' or 'ohem'",
        ),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecipeConfig(**options)
