"""Named training runs: `python -m unept.train NAME`. The docstring of each says where it comes from and what it costs.

Every row of the paper that is called "Ours" has a preset; rows of one network share a preset. Sizes are counted as in
Table 7 (`pytest tests/model/test_model.py -k size_of`): multiplications of convolutions and linear layers at the size
of the crop. No training times are given, since none of these runs has been made yet.

Where the paper leaves something open or contradicts itself, these presets read it as follows:
- Images of ADE20K are resized to a short side of 512 pixels, those of PASCAL-Context to a long side of 520, as in the
  released code; those of Cityscapes stay at 2048x1024.
- Validation slides windows of the size of the crop over the images, with a stride of 2/3 of it. The commands "Compare"
  have the released code's stride of 160 on ADE20K and PASCAL-Context, which takes four times as long.
- The dropout rate is 0.1.
- PASCAL-Context is trained for 160k iterations, as in the released code; the paper gives no number.
- Weights of the backbones are named with their tags in timm. `resnet50.tv_in1k` is the ResNet-50 of the paper's words;
  the released code has ResNet-50 v1c, to which `resnet50c.gluon_in1k` is nearest.
- The position embedding of DeiT is resized bilinearly, as the paper says.
- Table 6 does not apply the boundary refinement. This is read as: trained with all losses, predicted without
  refinement. Its row L = 3, N = 16 has the numbers of Table 1's ResNet-50 and is thus the same network; the two tables
  disagree on whether it is refined.
- Table 5's baseline and Table 6's L = 1, N = 16 differ by 0.2 mIoU. This is read as a learned table against the
  spatial branch as context queries.

The presets ending in `_released` do what the authors' released code does where it differs from the paper: docs/paper.md
lists the differences.
"""

import dataclasses
from functools import partial
from typing import Literal

from .config import DataConfig, ModelConfig, TrainConfig
from .model.loss import LossWeights

RESNET50 = "resnet50.tv_in1k"
RESNET50C = "resnet50c.gluon_in1k"
DEIT = "deit_base_distilled_patch16_384.fb_in1k"
DINOV3 = "vit_base_patch16_dinov3.lvd1689m"


def _paper(
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


_ade20k = partial(_paper, "ade20k", crop=480, short_side=512, iterations=160_000)
_cityscapes = partial(_paper, "cityscapes", crop=768, iterations=80_000)
_pascal_context = partial(_paper, "pascal_context", crop=480, long_side=520, iterations=160_000)


def _released(config: TrainConfig) -> TrainConfig:
    """Return the recipe as the authors' released code has it where it differs from the paper."""
    model = dataclasses.replace(
        config.model,
        decoder_self_attention="full",
        context_queries="spatial+learned",
        spatial_widths=(64, 128),
        spatial_last_relu=False,
        level_norm=False,
        scale_encoding_std=1.0,
    )
    return dataclasses.replace(
        config,
        model=model,
        loss_weights=LossWeights(segmentation=0.8, refined=1.0, boundary=5.0, direction=0.6),
        direction_pixels="predicted",
        boundary_balance="classes",
        lr_drop=126 / 160,
    )


def shapes() -> TrainConfig:
    """Textured shapes made in memory, a small network from scratch: a few minutes on 2 CPU cores, no download.

    This preset is for a first look, and to see that an installation works from end to end. The direction loss has a
    weight of 3, not 0.7: in so few steps the directions would otherwise learn more slowly than the classes that they
    refine.
    """
    return TrainConfig(
        model=ModelConfig(
            backbone="resnet10t",
            pretrained_backbone=False,
            output_stride=32,
            d_model=64,
            num_heads=4,
            num_points=4,
            ffn_dim=128,
            dropout=0.0,
        ),
        data=DataConfig(dataset="shapes", crop_size=(128, 128), scale=(0.75, 1.5), photometric=False),
        iterations=300,
        batch_size=8,
        lr=2e-3,
        backbone_lr=2e-3,
        warmup=50,
        schedule="cosine",
        loss_weights=LossWeights(direction=3.0),
        eval_every=150,
        checkpoint_every=60,
    )


def camvid() -> TrainConfig:
    """CamVid street scenes (Brostow et al. 2009), 11 classes, 480x360: a small network for a CPU.

    Give the folder with --root, and the backbone's weights with --backbone-weights where the hub cannot be reached. It
    computes in bfloat16; --amp off computes in float32. With 1800 steps it reached mIoU 72.3 on validation images, 71.2
    before refinement: the demo model (unept/assets/camvid_tiny). The score after 3000 steps has not been recorded.
    """
    return TrainConfig(
        model=ModelConfig(
            backbone="tf_efficientnet_lite0",
            d_model=128,
            num_heads=4,
            num_points=8,
            ffn_dim=512,
            dropout=0.0,
            boundary_upsampling="subpixel",
            boundary_features="spatial+decoder",
            logits_stride=2,
        ),
        data=DataConfig(dataset="camvid", crop_size=(256, 320), scale=(0.65, 1.75), workers=1),
        iterations=3000,
        batch_size=8,
        lr=1e-3,
        backbone_lr=3e-4,
        weight_decay=0.01,
        warmup=100,
        schedule="cosine",
        class_weights="auto",
        ema=0.998,
        amp="bf16",
        refine_scale=2,
        eval_every=500,
        checkpoint_every=100,
    )


def camvid_gpu() -> TrainConfig:
    """CamVid street scenes, as the preset camvid, but the paper's size on a light backbone, for one small GPU.

    Give the folder with --root, and the backbone's weights with --backbone-weights where the hub cannot be reached.
    """
    return TrainConfig(
        model=ModelConfig(backbone="tf_efficientnet_lite0"),
        data=DataConfig(dataset="camvid", crop_size=(360, 480), scale=(0.5, 2.0)),
        iterations=8000,
        backbone_lr=1e-4,
        eval_every=500,
        checkpoint_every=500,
    )


def folder() -> TrainConfig:
    """Your own images: folders of images and of labels with a class list (README); give their root with --root.

    The network is the paper's with ResNet-50 and ImageNet weights, its recipe shortened to 20k iterations.
    """
    return TrainConfig(data=DataConfig(dataset="folder", short_side=512), iterations=20_000, eval_every=2000)


def ade20k_resnet50() -> TrainConfig:
    """ADE20K, ResNet-50: Table 1; Table 5, + spatial path; Table 6, L = 3, N = 16; Table 8.

    Paper: mIoU 46.1, pixAcc 81.7.
    Size: 30.8 M parameters, 134.1 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_resnet50 --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_resnet50 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    Table 6 does not refine: compare its row with the column "unrefined", or evaluate with --no-refine.
    """
    return _ade20k()


def ade20k_deit() -> TrainConfig:
    """ADE20K, DeiT-B: Table 1; Table 5, + stronger backbone; Table 7; Table 8.

    Paper: mIoU 50.5, pixAcc 83.6; 94 M parameters, 99.1 GFLOPs.
    Size: 93.1 M parameters, 99.1 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_deit --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_deit --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    Table 5 shows a gain of 4.4 mIoU by this backbone, Sec. 4.4 states 4.5.
    """
    return _ade20k(backbone=DEIT)


def ade20k_baseline() -> TrainConfig:
    """ADE20K, ResNet-50 with one scale and learned context queries: Table 5, baseline.

    Paper: mIoU 42.3, pixAcc 80.3, the mean of five runs.
    Size: 30.5 M parameters, 109.2 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_baseline --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_baseline --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    Without a spatial branch there is no boundary to refine, and the loss is the first term of Eq. 7 alone.
    """
    return _ade20k(num_levels=1, context_queries="learned", refine=False)


def ade20k_pyramid() -> TrainConfig:
    """ADE20K, ResNet-50 with learned context queries: Table 5, + pyramid features.

    Paper: mIoU 45.0, pixAcc 81.1, the mean of five runs.
    Size: 31.0 M parameters, 130.4 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_pyramid --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_pyramid --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    Without a spatial branch there is no boundary to refine, and the loss is the first term of Eq. 7 alone.
    """
    return _ade20k(context_queries="learned", refine=False)


def ade20k_l1_n4() -> TrainConfig:
    """ADE20K, ResNet-50 with one scale and 4 points (L = 1, N = 4), not refined: Table 6.

    Paper: mIoU 37.5, pixAcc 77.5, the mean of five runs.
    Size: 30.3 M parameters, 112.8 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_l1_n4 --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_l1_n4 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160
    """
    return _ade20k(num_levels=1, num_points=4, refine=False)


def ade20k_l1_n16() -> TrainConfig:
    """ADE20K, ResNet-50 with one scale and 16 points (L = 1, N = 16), not refined: Table 6.

    Paper: mIoU 42.5, pixAcc 80.3, the mean of five runs.
    Size: 30.3 M parameters, 113.0 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_l1_n16 --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_l1_n16 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    Table 5's baseline, 0.2 mIoU below, has learned queries instead of the spatial branch: see unept/presets.py.
    """
    return _ade20k(num_levels=1, refine=False)


def ade20k_l1_n64() -> TrainConfig:
    """ADE20K, ResNet-50 with one scale and 64 points (L = 1, N = 64), not refined: Table 6.

    Paper: mIoU 42.9, pixAcc 80.5, the mean of five runs.
    Size: 30.6 M parameters, 113.7 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_l1_n64 --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_l1_n64 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    Sec. 4.4 calls 16 points consistently better, but on one scale Table 6 has 64 ahead, with 42.9 to 42.5.
    """
    return _ade20k(num_levels=1, num_points=64, refine=False)


def ade20k_l3_n4() -> TrainConfig:
    """ADE20K, ResNet-50 with three scales and 4 points (L = 3, N = 4), not refined: Table 6.

    Paper: mIoU 44.1, pixAcc 80.6, the mean of five runs.
    Size: 30.7 M parameters, 133.3 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_l3_n4 --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_l3_n4 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160
    """
    return _ade20k(num_points=4, refine=False)


def ade20k_l3_n64() -> TrainConfig:
    """ADE20K, ResNet-50 with three scales and 64 points (L = 3, N = 64), not refined: Table 6.

    Paper: mIoU 45.6, pixAcc 80.4, the mean of five runs.
    Size: 31.4 M parameters, 137.6 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_l3_n64 --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_l3_n64 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160
    """
    return _ade20k(num_points=64, refine=False)


def ade20k_resnet50_full() -> TrainConfig:
    """ADE20K, ResNet-50 with full attention over all tokens of all levels: Sec. 3.1.1; no row of Table 8.

    Paper: there is nothing to compare with; it shows the O(n^2) of Sec. 3.1.1.
    Size: 31.1 M parameters, 136.3 GMACs and 172.5 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_resnet50_full --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_resnet50_full --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    How it takes the place of sparse sampling: see unept/model/attention_variants.py. Its cost: python -m bench.table8.
    """
    return _ade20k(attention="full")


def ade20k_resnet50_sparse_transformer() -> TrainConfig:
    """ADE20K, ResNet-50 with the strided attention of Sparse Transformer: Table 8.

    Paper: mIoU 40.3, 18.6 GB of memory at batch 2, the mean of five runs.
    Size: 31.1 M parameters, 136.3 GMACs and 5.8 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_resnet50_sparse_transformer --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_resnet50_sparse_transformer --scales 0.5 0.75 1 1.25 1.5 1.75 --flip\\
        --window-stride 160

    How it takes the place of sparse sampling: see unept/model/attention_variants.py. Its cost: python -m bench.table8.
    """
    return _ade20k(attention="sparse_transformer")


def ade20k_resnet50_longformer() -> TrainConfig:
    """ADE20K, ResNet-50 with the windows and global tokens of Longformer: Table 8.

    Paper: mIoU 39.4, 11.3 GB of memory at batch 2, the mean of five runs.
    Size: 31.1 M parameters, 136.3 GMACs and 4.6 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_resnet50_longformer --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_resnet50_longformer --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    How it takes the place of sparse sampling: see unept/model/attention_variants.py. Its cost: python -m bench.table8.
    """
    return _ade20k(attention="longformer")


def ade20k_resnet50_reformer() -> TrainConfig:
    """ADE20K, ResNet-50 with the hashed attention of Reformer: Table 8.

    Paper: mIoU 38.2, 15.5 GB of memory at batch 2, the mean of five runs.
    Size: 30.7 M parameters, 134.4 GMACs and 25.9 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_resnet50_reformer --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_resnet50_reformer --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    How it takes the place of sparse sampling: see unept/model/attention_variants.py. Its cost: python -m bench.table8.
    """
    return _ade20k(attention="reformer")


def ade20k_resnet50_released() -> TrainConfig:
    """ADE20K, ResNet-50, as in the authors' released code: Table 1.

    Paper: mIoU 46.1, pixAcc 81.7.
    Size: 31.6 M parameters, 134.6 GMACs and 13.3 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_resnet50_released --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_resnet50_released --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    What differs from ade20k_resnet50: the three columns of docs/paper.md.
    """
    return _released(_ade20k(backbone=RESNET50C))


def ade20k_deit_released() -> TrainConfig:
    """ADE20K, DeiT-B, as in the authors' released code: Table 1.

    Paper: mIoU 50.5, pixAcc 83.6.
    Size: 93.8 M parameters, 98.4 GMACs and 28.3 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_deit_released --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_deit_released --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    What differs from ade20k_deit: the three columns of docs/paper.md.
    """
    return _released(_ade20k(backbone=DEIT))


def ade20k_dinov3() -> TrainConfig:
    """ADE20K, DINOv3 ViT-B: not in the paper; its recipe with a backbone of 2025.

    Paper: there is nothing to compare with, and it has not been measured yet; ade20k_deit has a backbone of this size.
    Size: 92.6 M parameters, 99.3 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_dinov3 --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_dinov3 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    The features are those of blocks 4, 8 and 12, as with DeiT. The weights come under the licence of DINOv3.
    """
    return _ade20k(backbone=DINOV3)


def cityscapes_resnet50() -> TrainConfig:
    """Cityscapes, ResNet-50: Table 2, and Table 3 on the test set.

    Paper: mIoU 79.8.
    Size: 30.8 M parameters, 343.1 GMACs at 768x768.
    Schedule: 80k iterations of 16 crops of 768x768; validation at full size, windows of 768 with stride 512.
    Train: python -m unept.train cityscapes_resnet50 --root CITYSCAPES
    Compare: python -m unept.evaluate runs/cityscapes_resnet50 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip

    Sec. 4.1 says that results are reported on the validation set and on the test set: Table 2 is on the former,
    Table 3 (80.6) on the latter, whose labels only the benchmark's server has.
    """
    return _cityscapes()


def cityscapes_deit() -> TrainConfig:
    """Cityscapes, DeiT-B: Table 2, and Table 3 on the test set.

    Paper: mIoU 82.9.
    Size: 93.1 M parameters, 253.0 GMACs at 768x768.
    Schedule: 80k iterations of 16 crops of 768x768; validation at full size, windows of 768 with stride 512.
    Train: python -m unept.train cityscapes_deit --root CITYSCAPES
    Compare: python -m unept.evaluate runs/cityscapes_deit --scales 0.5 0.75 1 1.25 1.5 1.75 --flip

    Sec. 4.1 says that results are reported on the validation set and on the test set: Table 2 is on the former,
    Table 3 (82.2) on the latter, whose labels only the benchmark's server has.
    """
    return _cityscapes(backbone=DEIT)


def pascal_context_resnet50() -> TrainConfig:
    """PASCAL-Context, ResNet-50: Table 4.

    Paper: mIoU 49.5.
    Size: 30.8 M parameters, 134.0 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at long side 520, windows of 480 with stride 320.
    Train: python -m unept.train pascal_context_resnet50 --root PASCAL_CONTEXT
    Compare: python -m unept.evaluate runs/pascal_context_resnet50 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    There are 60 classes with the background. Iterations and size of the images are those of the released code: see the
    top of unept/presets.py.
    """
    return _pascal_context()


def pascal_context_deit() -> TrainConfig:
    """PASCAL-Context, DeiT-B: Table 4.

    Paper: mIoU 55.2.
    Size: 93.1 M parameters, 99.0 GMACs at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at long side 520, windows of 480 with stride 320.
    Train: python -m unept.train pascal_context_deit --root PASCAL_CONTEXT
    Compare: python -m unept.evaluate runs/pascal_context_deit --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    There are 60 classes with the background. Iterations and size of the images are those of the released code: see the
    top of unept/presets.py.
    """
    return _pascal_context(backbone=DEIT)


def pascal_context_deit_released() -> TrainConfig:
    """PASCAL-Context, DeiT-B, as in the authors' released code: Table 4.

    Paper: mIoU 55.2.
    Size: 93.8 M parameters, 98.4 GMACs and 28.3 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at long side 520, windows of 480 with stride 320.
    Train: python -m unept.train pascal_context_deit_released --root PASCAL_CONTEXT
    Compare: python -m unept.evaluate runs/pascal_context_deit_released --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    What differs from pascal_context_deit: the three columns of docs/paper.md.
    """
    return _released(_pascal_context(backbone=DEIT))


PRESETS = {
    preset.__name__: preset
    for preset in (
        shapes,
        camvid,
        camvid_gpu,
        folder,
        ade20k_resnet50,
        ade20k_deit,
        ade20k_baseline,
        ade20k_pyramid,
        ade20k_l1_n4,
        ade20k_l1_n16,
        ade20k_l1_n64,
        ade20k_l3_n4,
        ade20k_l3_n64,
        ade20k_resnet50_full,
        ade20k_resnet50_sparse_transformer,
        ade20k_resnet50_longformer,
        ade20k_resnet50_reformer,
        ade20k_resnet50_released,
        ade20k_deit_released,
        ade20k_dinov3,
        cityscapes_resnet50,
        cityscapes_deit,
        pascal_context_resnet50,
        pascal_context_deit,
        pascal_context_deit_released,
    )
}
