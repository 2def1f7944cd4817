"""Named training runs: `python -m unept.train NAME`. Each says where it comes from and what it costs."""

from .config import DataConfig, ModelConfig, TrainConfig


def shapes() -> TrainConfig:
    """Textured shapes made in memory, a small network from scratch: a few minutes on 2 CPU cores, no download.

    For a first look, and to see that an installation works from end to end. The direction term weighs 3, not 0.7: in so
    few steps the directions would otherwise learn more slowly than the classes that they refine.
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
        loss_weights=(1.0, 1.5, 3.0, 3.0),
        eval_every=150,
        checkpoint_every=60,
    )


def camvid() -> TrainConfig:
    """CamVid street scenes (Brostow et al. 2009), 11 classes, 480x360: a light backbone for one small GPU.

    Give the folder with --root, and the backbone's weights with --backbone-weights where the hub can't be reached.
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
    """Your own images: folders of images and of labels with a class list (README); give it with --root.

    ResNet-50 with ImageNet weights and the paper's recipe, shortened to 20k iterations.
    """
    return TrainConfig(data=DataConfig(dataset="folder", short_side=512), iterations=20_000, eval_every=2000)


PRESETS = {preset.__name__: preset for preset in (shapes, camvid, folder)}
