"""Presets that are not in the paper: a first look, CamVid, and images of your own."""

from ..config import DataConfig, ModelConfig, TrainConfig
from ..model.loss import LossWeights
from ..recipe import RecipeConfig


def shapes() -> TrainConfig:
    """Textured shapes made in memory, a small network from scratch: a few minutes on 2 CPU cores, no download.

    This preset is for a first look, and to see that an installation works from end to end. Boundary and direction heads
    predict every pixel, as those of `unept_tiny` do: with the paper's form the refinement gains nothing here. The
    direction loss has a weight of 3, not 0.7: in so few steps the directions would otherwise learn more slowly than the
    classes that they refine.
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
            boundary_upsampling="subpixel",
            boundary_features="spatial+decoder",
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
    computes in bfloat16 where the CPU multiplies in it, and else in float32; 40 minutes of one core that does. The
    Lovász loss needs segmentation-models-pytorch: pip install -e ".[losses]".

    On the validation images three seeds reached mIoU 73.1, and 74.6 refined (bench/results/README.md). With
    --iterations 2800, in two hours, two reached 77.1 and 78.4; the demo model (unept/assets/camvid_tiny) is one of them
    after 2000 steps.
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
            context_queries="spatial+encoder",
            zero_init_residual=True,
            boundary_features="spatial+decoder",
            logits_stride=2,
        ),
        data=DataConfig(dataset="camvid", crop_size=(256, 320), scale=(0.65, 1.75), workers=1),
        iterations=1000,
        batch_size=8,
        lr=3e-3,
        backbone_lr=2.7e-3,
        weight_decay=0.01,
        warmup=100,
        schedule="cosine",
        class_weights="auto",
        loss_weights=LossWeights(direction=5.0),
        recipe=RecipeConfig(lovasz_weight=2.0),
        ema=0.998,
        refine_scale=2,
        refine_steps=4,
        refine_direction="mean",
        eval_every=500,
        checkpoint_every=50,
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
    """Your own images: folders of images and of labels with a class list; give their root with --root.

    docs/train_on_your_data.md describes the folders.
    The network is the paper's with ResNet-50 and ImageNet weights, its recipe shortened to 20k iterations.
    """
    return TrainConfig(data=DataConfig(dataset="folder", short_side=512), iterations=20_000, eval_every=2000)
