"""Presets of ADE20K: the rows called "Ours" of Tables 1, 5, 6 and 8, and four that are not in the paper."""

from functools import partial

from ..config import TrainConfig
from .recipe import DEIT, DINOV3, RESNET50C, paper_recipe, released_recipe

_ade20k = partial(paper_recipe, "ade20k", crop=480, short_side=512, iterations=160_000)


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

    Table 5's baseline, 0.2 mIoU below, has learned queries instead of the spatial branch: see unept/presets.
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
    """ADE20K, ResNet-50, with the options of the authors' released code, not refined: Table 1.

    Paper: mIoU 46.1, pixAcc 81.7.
    Size: 31.6 M parameters, 134.6 GMACs and 13.3 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_resnet50_released --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_resnet50_released --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    What differs from ade20k_resnet50, and what from that code: see the start of unept/presets/__init__.py.
    """
    return released_recipe(_ade20k(backbone=RESNET50C))


def ade20k_deit_released() -> TrainConfig:
    """ADE20K, DeiT-B, with the options of the authors' released code, not refined: Table 1.

    Paper: mIoU 50.5, pixAcc 83.6.
    Size: 93.8 M parameters, 98.4 GMACs and 28.3 of attention's products at 480x480.
    Schedule: 160k iterations of 16 crops of 480x480; validation at short side 512, windows of 480 with stride 320.
    Train: python -m unept.train ade20k_deit_released --root ADE20K
    Compare: python -m unept.evaluate runs/ade20k_deit_released --scales 0.5 0.75 1 1.25 1.5 1.75 --flip \\
        --window-stride 160

    What differs from ade20k_deit, and what from that code: see the start of unept/presets/__init__.py.
    """
    return released_recipe(_ade20k(backbone=DEIT))


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
