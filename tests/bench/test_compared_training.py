"""The compared networks in this project's trainer: a step of those that the test of `bench.ablations` leaves out."""

import json

import pytest
import torch

from bench import ablation_plan, smp
from bench.heads import ComparedTrainer, build_network
from tests.helpers import layouts
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.recipe import RecipeConfig

VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """A CamVid of four images of 48x64 per split."""
    return layouts.write_noisy_camvid(tmp_path_factory.mktemp("camvid"))


def train_one_step(build, backbone, camvid, out, **options):
    """Train a step as `bench.ablations` does: the network, its weights before, and the record of the step."""
    config = TrainConfig(
        model=ModelConfig(backbone=backbone, pretrained_backbone=False),
        data=DataConfig(dataset="camvid", root=camvid, crop_size=(48, 64), workers=0),
        out=out,
        iterations=1,
        batch_size=2,
        log_every=1,
        weight_decay=0.0,  # so that what changes has a gradient
        class_weights="auto",
        num_samples=0,
        device="cpu",
        amp="off",
        **options,
    )
    trainer = ComparedTrainer(build, config, out)
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    scores = trainer.train()
    assert 0 <= scores["mIoU"] <= 1
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (record,) = (record for record in records if "loss" in record)
    return trainer.model, before, record


def changed(model, before):
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


def test_a_step_learns_by_the_region_losses_of_the_recipe(camvid, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    build = lambda classes, palette, model: build_network("OCRNet", classes, palette, model.backbone)
    _, _, record = train_one_step(build, "resnet10t", camvid, tmp_path, recipe=RecipeConfig(lovasz_weight=2.0))
    parts = record["segmentation"] + 0.4 * record["auxiliary"] + 2 * record["lovasz"]
    assert record["loss"] == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize("name", ["SETR naive", pytest.param("SETR PUP", marks=pytest.mark.slow)])
def test_setr_is_trained_with_its_auxiliary_decoders(name, camvid, tmp_path):
    """A step changes all four decoders and every block of the ViT; the saved network predicts the same."""
    build = lambda classes, palette, model: build_network(name, classes, palette, model.backbone)
    model, before, record = train_one_step(build, VIT, camvid, tmp_path)
    assert record["loss"] == pytest.approx(record["segmentation"] + 0.4 * record["auxiliary"], rel=1e-4)
    moved = changed(model, before)
    for part in (
        *(f"head.decoders.{i}." for i in range(4)),
        *(f"backbone.features.model.blocks.{i}." for i in range(12)),
    ):
        assert any(key.startswith(part) for key in moved), part
    again = build(model.classes, model.palette, ModelConfig(backbone=VIT)).eval()
    again.load_state_dict(torch.load(tmp_path / "model" / "model.pt", weights_only=True))
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize(
    "name",
    [
        "SegFormer",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ablation_plan.SMP if n not in ("FPN", "SegFormer")),
    ],
)
def test_networks_of_smp_are_trained(name, camvid, tmp_path):
    """A step changes the encoder, the decoder and the classifier. FPN is trained in the test of the command."""
    pytest.importorskip("segmentation_models_pytorch")
    build = ablation_plan.Job(name, "", baseline=name).build
    model, before, record = train_one_step(build, smp.BACKBONE, camvid, tmp_path)
    assert record["loss"] == record["segmentation"] > 0
    moved = changed(model, before)
    for part in ("network.encoder.", "network.decoder.", "network.segmentation_head."):
        assert any(key.startswith(part) for key in moved), part
