"""Every preset is the network and the recipe of its row in the paper, and can be trained."""

import dataclasses
import inspect
import re

import pytest
import torch

from unept import train
from unept.model.attention_variants import VARIANTS
from unept.model.loss import LossWeights, UNEPTLoss
from unept.model.network import UNEPT
from unept.presets import PRESETS
from unept.training.optimizer import build_optimizer

RESNET, RESNET_C = "resnet50.tv_in1k", "resnet50c.gluon_in1k"
DEIT = "deit_base_distilled_patch16_384.fb_in1k"
DINO = "vit_base_patch16_dinov3.lvd1689m"
# data set, backbone, L, N, context queries, refined, mIoU: written from Tables 1 to 6 and 8.
PAPER = {
    "ade20k_resnet50": ("ade20k", RESNET, 3, 16, "spatial", True, "46.1"),
    "ade20k_deit": ("ade20k", DEIT, 3, 16, "spatial", True, "50.5"),
    "ade20k_baseline": ("ade20k", RESNET, 1, 16, "learned", False, "42.3"),
    "ade20k_pyramid": ("ade20k", RESNET, 3, 16, "learned", False, "45.0"),
    "ade20k_l1_n4": ("ade20k", RESNET, 1, 4, "spatial", False, "37.5"),
    "ade20k_l1_n16": ("ade20k", RESNET, 1, 16, "spatial", False, "42.5"),
    "ade20k_l1_n64": ("ade20k", RESNET, 1, 64, "spatial", False, "42.9"),
    "ade20k_l3_n4": ("ade20k", RESNET, 3, 4, "spatial", False, "44.1"),
    "ade20k_l3_n64": ("ade20k", RESNET, 3, 64, "spatial", False, "45.6"),
    "ade20k_resnet50_full": ("ade20k", RESNET, 3, 16, "spatial", True, None),
    "ade20k_resnet50_sparse_transformer": ("ade20k", RESNET, 3, 16, "spatial", True, "40.3"),
    "ade20k_resnet50_longformer": ("ade20k", RESNET, 3, 16, "spatial", True, "39.4"),
    "ade20k_resnet50_reformer": ("ade20k", RESNET, 3, 16, "spatial", True, "38.2"),
    "ade20k_resnet50_released": ("ade20k", RESNET_C, 3, 16, "spatial+learned", False, "46.1"),
    "ade20k_deit_released": ("ade20k", DEIT, 3, 16, "spatial+learned", False, "50.5"),
    "ade20k_dinov3": ("ade20k", DINO, 3, 16, "spatial", True, None),
    "cityscapes_resnet50": ("cityscapes", RESNET, 3, 16, "spatial", True, "79.8"),
    "cityscapes_deit": ("cityscapes", DEIT, 3, 16, "spatial", True, "82.9"),
    "pascal_context_resnet50": ("pascal_context", RESNET, 3, 16, "spatial", True, "49.5"),
    "pascal_context_deit": ("pascal_context", DEIT, 3, 16, "spatial", True, "55.2"),
    "pascal_context_deit_released": ("pascal_context", DEIT, 3, 16, "spatial+learned", False, "55.2"),
}
# crop, short side, long side, iterations, window, stride
PROTOCOL = {
    "ade20k": (480, 512, None, 160_000, 480, 320),
    "cityscapes": (768, None, None, 80_000, 768, 512),
    "pascal_context": (480, None, 520, 160_000, 480, 320),
}
CLASS_COUNTS = {"ade20k": 150, "cityscapes": 19, "pascal_context": 60}
OWN = {"shapes", "camvid", "camvid_gpu", "folder"}  # not the paper's
# One preset per kind of network; those of the others differ in their numbers of levels, points and classes.
NETWORKS = {
    "ade20k_resnet50_released",
    "shapes",
    "camvid",
    "ade20k_resnet50",
    "ade20k_deit",
    "ade20k_dinov3",
    "ade20k_baseline",
    "ade20k_l1_n4",
}


def test_every_row_of_the_paper_has_a_preset():
    assert set(PRESETS) == set(PAPER) | OWN


def test_no_preset_asks_for_a_precision_that_a_machine_may_emulate():
    assert {name: preset().amp for name, preset in PRESETS.items() if preset().amp != "auto"} == {}


@pytest.mark.parametrize("name", PAPER)
def test_options_are_those_of_the_paper(name):
    dataset, backbone, levels, points, queries, refine, miou = PAPER[name]
    config = PRESETS[name]()
    model, data = config.model, config.data
    assert (data.dataset, model.backbone, model.num_levels, model.num_points) == (dataset, backbone, levels, points)
    assert (model.context_queries, config.refine, config.inference().refine) == (queries, refine, refine)
    assert (model.d_model, model.num_heads, model.ffn_dim, model.pretrained_backbone) == (256, 8, 2048, True)
    assert (model.num_encoder_layers, model.num_decoder_layers, model.output_stride) == (2, 2, None)
    variant = name.removeprefix("ade20k_resnet50_")  # Table 8
    assert model.attention == (variant if variant in VARIANTS else "sparse_sampling")
    released = name.endswith("_released")
    assert model.position_resize == ("bilinear" if backbone == DEIT and not released else "bicubic")
    crop, short_side, long_side, iterations, window, stride = PROTOCOL[dataset]
    assert (data.crop_size, data.short_side, data.long_side) == ((crop, crop), short_side, long_side)
    assert data.background
    assert (data.scale, data.flip, data.photometric, data.cat_max_ratio) == ((0.5, 2.0), True, True, 0.75)
    assert (config.iterations, config.batch_size, config.schedule, config.warmup) == (iterations, 16, "step", 0)
    assert (config.lr, config.backbone_lr, config.weight_decay, config.betas) == (1e-4, 1e-5, 1e-4, (0.9, 0.999))
    assert config.loss_weights == (LossWeights(0.8, 1.0, 5.0, 0.6) if released else LossWeights(1.0, 1.5, 3.0, 0.7))
    assert config.lr_drop == (0.7875 if released else 2 / 3)
    assert (config.inference().window, config.inference().window_stride) == (window, stride)
    text = inspect.getdoc(PRESETS[name])
    assert f"python -m unept.train {name} --root" in text
    assert f"python -m unept.evaluate runs/{name} --scales 0.5 0.75 1 1.25 1.5 1.75 --flip" in text
    assert ("--window-stride 160" in text) == (dataset != "cityscapes")
    assert miou is None or f"Paper: mIoU {miou}" in text
    assert re.search(r"Size: [\d.]+ M parameters, [\d.]+ GMACs", text)


def test_no_two_presets_are_one_run():
    configs = [preset() for preset in PRESETS.values()]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


@pytest.mark.parametrize(
    "name", [name if name in NETWORKS else pytest.param(name, marks=pytest.mark.slow) for name in sorted(PRESETS)]
)
def test_one_training_step(name):
    """At 64x64 with the true number of classes; no parameter is left without a gradient, as several GPUs need it."""
    config = PRESETS[name]()
    classes = CLASS_COUNTS.get(config.data.dataset, 8)
    options = dataclasses.replace(config.model, pretrained_backbone=False).options()
    model = UNEPT(classes, **options)
    loss = UNEPTLoss(
        config.loss_weights, direction_pixels=config.direction_pixels, boundary_balance=config.boundary_balance
    )
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(0, classes, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    optimizer = build_optimizer(model, config)
    weight = next(model.classifier.parameters())
    before = weight.detach().clone()
    terms = loss(model.train()(images), labels)
    terms["loss"].backward()
    assert all(term.isfinite() for term in terms.values())
    unused = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    optimizer.step()
    assert not torch.equal(weight, before)


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)
