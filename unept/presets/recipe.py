"""The recipe of Sec. 4.2 that the presets of the paper share, and what the authors' released code does otherwise."""

import dataclasses
from typing import Literal

from ..config import DataConfig, ModelConfig, TrainConfig
from ..model.backbone import RESNET50
from ..model.loss import LossWeights

RESNET50C = "resnet50c.gluon_in1k"
DEIT = "deit_base_distilled_patch16_384.fb_in1k"
DINOV3 = "vit_base_patch16_dinov3.lvd1689m"


def paper_recipe(
    dataset: Literal["ade20k", "cityscapes", "pascal_context"],
    *,
    crop: int,
    short_side: int | None = None,
    long_side: int | None = None,
    iterations: int,
    refine: bool = True,
    backbone: str = RESNET50,
    **model,
) -> TrainConfig:
    """Return the recipe of Sec. 4.2; every option that is not set here has the paper's value by default."""
    if backbone == DEIT:
        model["position_resize"] = "bilinear"
    return TrainConfig(
        model=ModelConfig(backbone=backbone, **model),
        data=DataConfig(dataset=dataset, crop_size=(crop, crop), short_side=short_side, long_side=long_side),
        iterations=iterations,
        eval_every=iterations // 20,
        window=crop,
        refine=refine,
    )


def released_recipe(config: TrainConfig) -> TrainConfig:
    """Return the recipe with the options that the authors' released code chooses otherwise than the paper.

    Its text in `unept/presets/__init__.py` names what still differs.
    """
    model = dataclasses.replace(
        config.model,
        decoder_self_attention="full",
        context_queries="spatial+learned",
        spatial_widths=(64, 128),
        spatial_last_relu=False,
        level_norm=False,
        scale_encoding_std=1.0,
        position_resize="bicubic",
    )
    return dataclasses.replace(
        config,
        model=model,
        loss_weights=LossWeights(segmentation=0.8, refined=1.0, boundary=5.0, direction=0.6),
        direction_pixels="predicted",
        boundary_balance="classes",
        lr_drop=126 / 160,
        refine=False,  # the refined prediction is in the loss alone
    )
