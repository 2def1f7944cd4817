"""Presets of Cityscapes (Tables 2 and 3) and PASCAL-Context (Table 4)."""

from functools import partial

from ..config import TrainConfig
from .recipe import DEIT, paper_recipe, released_recipe

_cityscapes = partial(paper_recipe, "cityscapes", crop=768, iterations=80_000)
_pascal_context = partial(paper_recipe, "pascal_context", crop=480, long_side=520, iterations=160_000)


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
    start of unept/presets/__init__.py.
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
    start of unept/presets/__init__.py.
    """
    return _pascal_context(backbone=DEIT)


def pascal_context_deit_released() -> TrainConfig:
    """PASCAL-Context, DeiT-B, with the options of the authors' released code, not refined: Table 4.

    Paper: mIoU 55.2.
    Size: 93.8 M parameters, 98.4 GMACs and 28.3 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at long side 520, windows of 480 with stride 320.
    Train: python -m unept.train pascal_context_deit_released --root PASCAL_CONTEXT
    Compare: python -m unept.evaluate runs/pascal_context_deit_released --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    What differs from pascal_context_deit, and what from that code: see the start of unept/presets/__init__.py.
    """
    return released_recipe(_pascal_context(backbone=DEIT))
