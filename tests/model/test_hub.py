"""Models on disk and on the hub: what is saved with them, how they are found again, and models by name."""

import copy
import inspect
import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from safetensors.torch import load_file, save_file

import unept
from unept import predict, train
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.data import Shapes
from unept.evaluation.evaluator import evaluate_model
from unept.inference import InferenceConfig, InferenceOptions, predict_ids, resolve
from unept.model import registry
from unept.model.network import UNEPT
from unept.presets import PRESETS
from unept.pretrained import DEMO, load, load_run
from unept.training.checkpoint import save_model

TINY = {"backbone": "resnet10t", "d_model": 32, "num_heads": 2, "num_points": 2, "ffn_dim": 32, "dropout": 0.0}
CLASSES, PALETTE = ["sky", "sea | lake", "sand"], [[90, 160, 230], [10, 40, 120], [220, 200, 120]]
SCORES = {
    "mIoU": 0.61234,
    "pixAcc": 0.9,
    "boundary_f": 0.5,
    "boundary_iou": 0.25,
    "iou": [0.7, float("nan"), 0.5],
    "images_per_s": 3.0,
}
SCORES |= {"boundary_tolerance": 3, "images": 101}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> UNEPT:
    torch.manual_seed(0)
    return UNEPT(3, classes=CLASSES, palette=PALETTE, **TINY).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The model of a run, as `unept.train` saves it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    data = DataConfig(dataset="camvid", short_side=24)
    config = TrainConfig(model=ModelConfig(pretrained_backbone=False, **TINY), data=data, refine_scale=2)
    save_model(model, folder, config, 4000, SCORES)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder: repositories can be pushed to and loaded from it; gives the folder."""

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)
            return f"commit: {commit_message}"

    def download(repo_id, filename, **options):
        if not (tmp_path / "hub" / repo_id / filename).exists():
            raise OfflineModeIsEnabled("no connection\nto anywhere")
        return str(tmp_path / "hub" / repo_id / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    return tmp_path / "hub"


def edit_config(folder, change) -> None:
    stored = json.loads((folder / "config.json").read_text())
    change(stored)
    (folder / "config.json").write_text(json.dumps(stored))


def test_what_a_model_says_about_itself_comes_back(saved):
    model = UNEPT.from_pretrained(saved)
    mean, std = list(model.backbone.mean), list(model.backbone.std)
    assert model.preprocessing == {
        "input": "uint8 RGB", "mean": mean, "std": std, "short_side": 24, "refine": True, "refine_scale": 2,
        "refine_steps": 1,
    }  # fmt: skip
    assert model.evaluation == {
        "dataset": "camvid", "dataset_title": "CamVid", "split": "val", "step": 4000,
        "mIoU": 0.61234, "pixAcc": 0.9, "boundary_f": 0.5, "boundary_iou": 0.25, "boundary_tolerance": 3,
        "images": 101, "iou": [0.7, None, 0.5],
    }  # fmt: skip


def test_one_changed_bit_in_the_weights_is_noticed(saved, tmp_path, hub):
    """safetensors has no checksum: config.json holds that of the file."""
    folder = shutil.copytree(saved, tmp_path / "model")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    shutil.copytree(folder, hub / "org" / "damaged")
    for source, where in ((str(folder), folder), ("org/damaged", hub / "org" / "damaged")):
        with pytest.raises(
            ValueError, match=f"{where}/model.safetensors is damaged: its SHA-256 .* remove weights_sha256"
        ):
            load(source, torch.device("cpu"))
    edit_config(folder, lambda stored: stored.pop("weights_sha256"))  # as of a model of an older version
    assert load(folder, torch.device("cpu")).num_classes == 3


def test_stored_mean_and_deviation_count(saved, tmp_path):
    """Another version of timm may have others for the backbone's name."""
    folder = shutil.copytree(saved, tmp_path / "model")
    edit_config(folder, lambda stored: stored["preprocessing"].update(mean=[0.2, 0.4, 0.6], std=[0.5, 0.25, 0.125]))
    model = UNEPT.from_pretrained(folder)
    assert model.backbone.mean == (0.2, 0.4, 0.6)
    black = model.normalized(torch.zeros(3, 1, 1, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(black, torch.tensor([-0.4, -1.6, -4.8]))
    model.save_pretrained(tmp_path / "again")
    assert UNEPT.from_pretrained(tmp_path / "again").backbone.std == (0.5, 0.25, 0.125)


def test_model_card(saved):
    card = ModelCard.load(saved / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("unept", "image-segmentation")
    assert "semantic-segmentation" in card.data.tags
    assert "license" not in card.data.to_dict()
    results = {r.metric_type: r for r in card.data.eval_results}
    assert {kind: r.metric_value for kind, r in results.items()} == {
        "mean_iou": 0.6123, "pixel_accuracy": 0.9, "boundary_f": 0.5, "boundary_iou": 0.25,
    }  # fmt: skip
    first = results["mean_iou"]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("camvid", "CamVid", "val")
    assert "On 101 images of CamVid (split `val`): mIoU 61.23 %" in card.text
    assert "boundary F 50.00 % (within 3 px), Boundary IoU 25.00 %." in card.text
    assert "after 4000 steps" in card.text
    assert "| 0 | sky | 70.00 % |\n| 1 | sea \\| lake | - |" in card.text
    assert "- `short_side`: 24" in card.text


def test_card_of_a_model_without_a_past(tmp_path):
    model = UNEPT(3, **TINY)
    model.save_pretrained(tmp_path / "model", model_card_kwargs={"license": "cc-by-4.0", "datasets": ["org/beach"]})
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.license, card.data.datasets) == ("cc-by-4.0", ["org/beach"])
    assert not card.data.eval_results
    assert not any(word in card.text for word in ("Evaluation", "mIoU", "IoU", "short_side", "None"))
    assert "license" not in model.generate_model_card().data.to_dict()  # the next card starts afresh


def test_card_of_scores_without_a_data_set(tmp_path):
    model = UNEPT(3, **TINY)
    model.evaluation = {"mIoU": 0.5}
    card = model.generate_model_card()
    assert not card.data.eval_results
    assert "## Evaluation\n\nmIoU 50.00 %.\n" in card.text


def test_example_of_the_card_runs(saved, hub, tmp_path, monkeypatch):
    UNEPT.from_pretrained(saved).push_to_hub("org/beach")
    text = ModelCard.load(hub / "org" / "beach" / "README.md").text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 24)).save("image.jpg")
    exec(code, {})
    assert Image.open("overlay.png").size == (32, 24)


def test_push_and_load(model, saved, hub):
    url = UNEPT.from_pretrained(saved).push_to_hub("org/beach", commit_message="first")
    assert url == "commit: first"
    again = UNEPT.from_pretrained("org/beach")
    images = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    assert torch.equal(again(images).logits, model(images).logits)
    assert again.evaluation["step"] == 4000
    assert 'Segmenter("org/beach")' in (hub / "org" / "beach" / "README.md").read_text()
    # save_pretrained can push as well
    model.save_pretrained(hub.parent / "local", push_to_hub=True, repo_id="org/other")
    assert load("org/other", CPU).classes == CLASSES


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """`unept.predict` of one image in an empty folder; gives the ids, or what it wrote on stderr."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (36, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("beach.png")

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["predict", "beach.png", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            predict.main()
        return capsys.readouterr().err if end.value.code else np.array(Image.open("predictions/beach_ids.png"))

    return torch.from_numpy(pixels).permute(2, 0, 1), call


def test_a_saved_folder_is_all_that_prediction_needs(saved, hub, command):
    image, call = command
    model = UNEPT.from_pretrained(saved)
    model.push_to_hub("org/beach")
    expected = predict_ids(model, image, InferenceConfig(short_side=24, refine_scale=2))[0].numpy()
    assert not np.array_equal(expected, predict_ids(model, image, InferenceConfig())[0].numpy())
    assert np.array_equal(call("--run", saved), expected)
    assert np.array_equal(call("--run", "org/beach"), expected)
    expected = predict_ids(model, image, InferenceConfig(short_side=32, refine=False))[0].numpy()
    assert np.array_equal(call("--run", saved, "--short-side", 32, "--no-refine"), expected)


def test_folders_of_older_versions(saved, tmp_path):
    """Without `preprocessing` a run's options say how images are seen; a model alone sees them as they are."""
    run = tmp_path / "run"
    shutil.copytree(saved, run / "model")
    edit_config(run / "model", lambda stored: [stored.pop(key) for key in ("preprocessing", "evaluation")])
    config = TrainConfig(model=ModelConfig(**TINY), data=DataConfig(short_side=40), amp="off", refine_scale=3)
    (run / "config.json").write_text(config.to_json())
    edit_config(run, lambda stored: stored.update(loss_weights=list(stored["loss_weights"].values())))
    alone, of_run = (resolve(InferenceOptions(), load(path, CPU)) for path in (run / "model", run))
    assert alone == InferenceConfig()
    assert (of_run.short_side, of_run.amp, of_run.refine_scale) == (40, "off", 3)
    assert load_run(run, CPU)[0] == config


def test_what_the_caller_chooses_comes_before_what_the_model_says(model):
    described = {"short_side": 64, "window": 32, "window_stride": 16, "refine": False, "amp": "off"}
    other = UNEPT(3, **TINY)
    other.preprocessing.update(described)
    assert resolve(InferenceOptions(flip=True), other) == InferenceConfig(flip=True, **described)
    chosen = resolve(InferenceOptions(window=64, amp="bf16"), other)
    assert chosen == InferenceConfig(window=64, short_side=64, refine=False, amp="bf16")
    other.preprocessing["window"] = 30
    with pytest.raises(ValueError, match="window is 30"):
        resolve(InferenceOptions(), other)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "org/none",
            "there is no folder org/none, and no model of that name could be loaded from the Hugging Face hub",
        ),
        ("org/bare", "org/bare has no config.json of a model"),
        ("nowhere", "nowhere does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("empty", "empty is not a run folder"),
    ],
)
def test_what_is_no_model(source, message, hub, command):
    (hub.parent / "empty").mkdir()
    (hub / "org" / "bare").mkdir(parents=True)
    (hub / "org" / "bare" / "config.json").write_text("{}")
    error = command[1]("--run", source)
    assert message in error
    assert error.count("\n") == 1


def test_a_file_is_no_model(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    for source in (saved / "model.safetensors", f"{saved.name}/model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a file: give a folder"):
            UNEPT.from_pretrained(source)


def test_damaged_and_foreign_folders(saved, tmp_path):
    broken, foreign = (shutil.copytree(saved, tmp_path / name) for name in ("broken", "foreign"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken/model\.safetensors is damaged"):
        load(broken, CPU)
    with pytest.raises(ValueError, match=r"broken/model\.safetensors is damaged"):
        UNEPT.from_pretrained(broken)
    edit_config(foreign, lambda stored: stored.update(d_model=64))
    with pytest.raises(ValueError, match=r"do not fit the network that its config.json describes"):
        load(foreign, CPU)
    for options in ({"num_classes": 5}, {"in_chans": 4}):
        (name,) = options
        with pytest.raises(RuntimeError, match=rf"with {name}={options[name]}.*: ignore_mismatched_sizes=True takes"):
            UNEPT.from_pretrained(saved, **options)
        with pytest.warns(UserWarning, match="of another shape"):
            assert UNEPT.from_pretrained(saved, **options, ignore_mismatched_sizes=True).options[name] == options[name]
    with pytest.raises(FileNotFoundError, match=rf"is a file: give the folder of a run or of a model, here {saved}$"):
        load(saved / "model.safetensors", CPU)
    (foreign / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"foreign has no config\.json of a model"):
        load(foreign, CPU)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(TrainConfig().to_json())
    with pytest.raises(FileNotFoundError, match=r"model/ in a folder of unept\.train"):
        UNEPT.from_pretrained(tmp_path / "run")


def test_training_writes_the_card(tmp_path):
    data = tmp_path / "data"
    for kind, split in ((kind, split) for kind in ("images", "labels") for split in ("train", "val")):
        (data / kind / split).mkdir(parents=True)
        pixels = np.zeros((32, 32), dtype=np.uint8)
        pixels[16:] = 1
        Image.fromarray(pixels if kind == "labels" else 200 * pixels).save(data / kind / split / "0.png")
    (data / "classes.txt").write_text("sky\nsea\n")
    config = TrainConfig(
        model=ModelConfig(pretrained_backbone=False, output_stride=32, **TINY),
        data=DataConfig(dataset="folder", root=data, crop_size=(32, 32), short_side=32, workers=0),
        iterations=1,
        batch_size=2,
        num_samples=0,
        device="cpu",
    )
    scores = train.Trainer(config, tmp_path / "run").train()
    model = load(tmp_path / "run", CPU)
    assert (model.evaluation["dataset"], model.evaluation["step"], model.evaluation["images"]) == ("folder", 1, 1)
    assert model.evaluation["mIoU"] == pytest.approx(scores["mIoU"])
    assert model.preprocessing["short_side"] == 32
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert card.data.eval_results[0].metric_value == round(scores["mIoU"], 4)


def test_names():
    assert unept.list_models() == [
        "unept_deit_base",
        "unept_dinov3_base",
        "unept_lite0",
        "unept_resnet50",
        "unept_small",
        "unept_tiny",
    ]
    assert unept.list_models("*_base") == ["unept_deit_base", "unept_dinov3_base"]
    assert "unept_convnext_tiny" in unept.list_models("unept_convnext*", all_backbones=True)
    assert all(timm.is_model(backbone) for backbone in registry.BACKBONES.values())


def test_weights_do_not_depend_on_the_choice_of_timm():
    """Where a backbone has several sets of weights, every default names one; the paper's ResNet-50 is torchvision's."""
    defaults = [ModelConfig().backbone, inspect.signature(UNEPT).parameters["backbone"].default]
    assert {*defaults, registry.BACKBONES["unept_resnet50"], PRESETS["folder"]().model.backbone} == {"resnet50.tv_in1k"}
    for backbone in (*registry.BACKBONES.values(), *(preset().model.backbone for preset in PRESETS.values())):
        known = timm.list_pretrained(backbone.split(".")[0])
        assert backbone in known or len(known) == 1, f"{backbone} is one of {known}"


def test_demo_model_is_the_smallest_named_size():
    """With finer logits; so is the network of the preset that it was trained by."""
    demo = unept.create_model("unept_tiny", num_classes=11, logits_stride=2, checkpoint_path=DEMO)
    preset = PRESETS["camvid"]().model.options()
    built = demo.options
    assert {name: preset[name] for name in registry.SIZES["unept_tiny"]} == registry.SIZES["unept_tiny"]
    assert {name for name, value in preset.items() if built.get(name, value) != value} <= {
        "dropout",
        "pretrained_backbone",
    }


def test_a_named_size_is_small_and_its_options_can_be_replaced():
    tiny = unept.create_model("unept_tiny", num_classes=11)
    assert sum(p.numel() for p in tiny.parameters()) < 8e6
    assert (tiny.boundary_stride, tiny.boundaries_see_decoder, tiny.logits_stride) == (1, True, 8)
    assert tiny.queries_see_encoder
    finer = unept.create_model("unept_tiny", num_classes=11, logits_stride=2, boundary_features="spatial")
    assert (finer.logits_stride, finer.boundaries_see_decoder) == (2, False)


def test_models_by_name():
    small = {name: value for name, value in TINY.items() if name != "backbone"}
    model = unept.create_model("unept_lite0", num_classes=4, **small)
    assert model._hub_mixin_config["backbone"] == "tf_efficientnet_lite0"
    assert (model.num_classes, model.pyramid.levels[0][0].out_channels) == (4, 32)
    assert model.backbone.mean == (0.5, 0.5, 0.5)
    tagged = unept.create_model("unept_resnet10t.c3_in1k", num_classes=2, **small)
    assert tagged._hub_mixin_config["backbone"] == "resnet10t.c3_in1k"


def test_backbone_weights_are_asked_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="ImageNet weights of resnet10t"):
        unept.create_model("unept_resnet10t", num_classes=2, pretrained_backbone=True)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_checkpoint_path(model, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"weights.{suffix}"
    state = model.state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    else:  # a run's checkpoints have more than the model
        torch.save(state if suffix == "pth" else {"step": 1, "model": state}, path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # then no backbone's weights are needed
    small = {name: value for name, value in TINY.items() if name != "backbone"}
    new = unept.create_model(
        "unept_resnet10t", num_classes=3, pretrained_backbone=True, checkpoint_path=path, **small
    ).eval()
    images = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    assert torch.equal(new(images).logits, model(images).logits)
    if suffix == "pth":
        with pytest.raises(ValueError, match=r"does not fit unept_resnet10t with 5 classes \(it holds 3 classes\)"):
            unept.create_model("unept_resnet10t", num_classes=5, checkpoint_path=path, **small)


def test_checkpoint_path_of_weights_that_fit_another_network(tmp_path):
    options = {name: value for name, value in TINY.items() if name != "backbone"}
    UNEPT(3, **TINY).save_pretrained(tmp_path)
    for change in ({"context_queries": "spatial+encoder"}, {"spatial_last_relu": False}, {"output_stride": 16}):
        UNEPT(3, **TINY | change).load_state_dict(load_file(tmp_path / "model.safetensors"))  # it fits
        name, value = next(iter(change.items()))
        message = f"this network has {name}={value!r}: give the former"
        with pytest.raises(ValueError, match=re.escape(message)):
            unept.create_model("unept_resnet10t", num_classes=3, checkpoint_path=tmp_path, **options | change)
    unept.create_model("unept_resnet10t", num_classes=3, checkpoint_path=tmp_path, **options | {"dropout": 0.5})
    for content in ("{", "null", '["num_classes"]'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is damaged.* restore it, or give the weights alone"):
            unept.create_model("unept_resnet10t", num_classes=3, checkpoint_path=tmp_path, **options)


class Evil:
    def __reduce__(self):
        return (print, ("code of the file was run",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"no model 'resnet50'; close names: unept_resnet50"),
        ("unept_resnet5", r"close names: unept_resnet5"),
        ("unept_lite", r"unept_lite0"),
        ("", r"unept\.list_models\(\) lists unept_resnet50"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        unept.create_model(name, num_classes=2)


def test_bad_checkpoints(tmp_path, capsys):
    torch.save({"classifier.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"no weights")
    for name in ("evil.pth", "torn.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            unept.create_model("unept_resnet10t", num_classes=2, checkpoint_path=tmp_path / name)
    assert not capsys.readouterr().out
    for path in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(FileNotFoundError, match=r"checkpoint_path names .*, which is not a file"):
            unept.create_model("unept_resnet10t", num_classes=2, checkpoint_path=path)


# --- damaged and hostile files ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the saved model, and a function that changes its config.json."""
    folder = shutil.copytree(saved, tmp_path / "copy")

    def change(**values):
        config = json.loads((saved / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return folder, change


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 10**9}, "num_classes is 1000000000; it must be from 1 to 65536"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": "3"}, "num_classes is '3'; it must be a whole number"),
        ({"num_encoder_layers": 10**9}, "num_encoder_layers is 1000000000"),
        ({"d_model": 4096, "ffn_dim": 16384}, "describes a network of at least .* parameters, but model.safetensors"),
        ({"d_model": None}, "d_model is None"),
        ({"num_heads": [2]}, r"num_heads is \[2\]"),
        ({"dropout": {"p": 1}}, "dropout is {'p': 1}"),
        ({"backbone": "hf_hub:someone/model"}, "has no model 'hf_hub:someone/model'"),
        ({"backbone": 5}, "backbone is 5; it must be text"),
        ({"classes": [1, 2, 3]}, r"classes is \[1, 2, 3\]"),
        ({"palette": [[0, 0, 300]] * 3}, "each from 0 to 255"),
        ({"preprocessing": [1]}, r"preprocessing is \[1\]"),
        ({"preprocessing": {"mean": "gray", "std": [1, 1, 1]}}, "mean is 'gray'"),
        ({"preprocessing": {"mean": [0, 0, 0], "std": [0, 0, 0]}}, "must be positive"),
    ],
    ids=str,
)
def test_config_of_a_saved_model_is_data(copied, values, message):
    folder, change = copied
    change(**values)
    with pytest.raises(ValueError, match=rf"config\.json of .*{message}"):
        load(folder, CPU)


@pytest.mark.parametrize("content", [b"null", b"[]", b'"x"', b"{", b"\xff", b"[" * 100_000], ids=lambda c: str(c[:8]))
def test_config_that_is_no_config(copied, content):
    folder, _ = copied
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json of .* is damaged"):
        load(folder, CPU)


def test_a_saved_model_fetches_and_opens_nothing(copied, model, monkeypatch):
    folder, change = copied
    change(pretrained_backbone=True, backbone_weights=str(folder / "secret.safetensors"))

    def refuse(*arguments, **options):
        raise AssertionError("the loader asked for other weights")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    monkeypatch.setattr("unept.model.backbone.read_weights", refuse)
    assert torch.equal(UNEPT.from_pretrained(folder).classifier.weight, model.classifier.weight)


def test_inference_options_of_a_saved_model_are_checked(copied):
    folder, change = copied
    change(preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3, "amp": "evil"})
    with pytest.raises(ValueError, match="amp is 'evil'"):
        resolve(InferenceOptions(), load(folder, CPU))


def test_weights_that_are_not_finite_are_refused(copied, model, tmp_path):
    folder, _ = copied
    config = json.loads((folder / "config.json").read_text())
    config.pop("weights_sha256", None)  # as of a model that an older version saved
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for value in (float("nan"), float("inf")):
        state["classifier.bias"][1] = value
        save_file(state, folder / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"model\.safetensors holds NaN or infinite .* first being classifier\.bias"
        ):
            load(folder, CPU)
        with pytest.raises(ValueError, match="holds NaN or infinite"):
            unept.create_model(
                "unept_resnet10t", num_classes=3, checkpoint_path=folder / "model.safetensors", **without_backbone()
            )


def without_backbone() -> dict:
    return {name: value for name, value in TINY.items() if name != "backbone"}


def test_nan_is_no_class(model):
    """Where ids are made for people; the network itself passes NaN on."""
    image = torch.zeros(1, 3, 32, 40)
    image[0, 1, 5, 5] = float("nan")
    config = resolve(InferenceOptions(), model)
    for ids in (model.predict, lambda images: predict_ids(model, images, config)):
        with pytest.raises(FloatingPointError, match="the prediction holds NaN"):
            ids(image)
        assert ids(torch.zeros(1, 3, 32, 40)).shape == (1, 32, 40)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.classifier.bias[0] = float("nan")
    pixels = torch.zeros(3, 32, 40, dtype=torch.uint8)
    with pytest.raises(FloatingPointError, match="the prediction holds NaN"):
        unept.Segmenter(broken)(pixels)
    shapes = Shapes(split="val", length=1, size=32)
    shapes.classes, shapes.palette = CLASSES, PALETTE
    with pytest.raises(FloatingPointError, match="the prediction holds NaN"):
        evaluate_model(broken, shapes, config, CPU, 3)


def test_out_of_memory_while_loading_is_told_so(saved, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNEPT, "to", fail)
    with pytest.raises(MemoryError, match="out of memory while the model was moved to cpu: free the device, or use"):
        load(saved, CPU)
