"""Named training runs: `python -m unept.train NAME`. The docstring of each says where it comes from and what it costs.

Every row of the paper that is called "Ours" has a preset; rows of one network share a preset. Sizes are counted as in
Table 7 (`pytest tests/model/test_model.py -k size_of`): multiplications of convolutions and linear layers at the size
of the crop. No training times are given for those of the paper, since none of these runs has been made yet.

Where the paper leaves something open or contradicts itself, these presets read it as follows:
- Images of ADE20K are resized to a short side of 512 pixels, those of PASCAL-Context to a long side of 520, as in the
  released code; those of Cityscapes stay at 2048x1024.
- Validation slides windows of the size of the crop over the images, with a stride of 2/3 of it. The commands "Compare"
  have the released code's stride of 160 on ADE20K and PASCAL-Context: 6 windows of an image of 512x683, not 4.
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

The presets ending in `_released` choose what the authors' released code chooses otherwise than the paper, as far as
there are options for it: weights of the losses, balanced boundary loss, directions on predicted pixels, widths and last
ReLU of the spatial branch, a learned table added to the context queries, dense self-attention in the decoder, no norm
of the levels, scale encoding, bicubic position embedding, where the learning rates drop, and no refinement of
predictions.
They still differ from it in these points, which the table in docs/paper.md describes:
- Positions: the decoder's queries have a sine encoding too, not the learned table alone; a pixel's place is
  (i + 0.5) / n, not (i + 1) / n; the learned table starts smaller, and is resized to the image.
- Attention: that of the context queries among themselves goes over the queries, not over the batch; offsets and weights
  come from Eq. 3's two factors, not from one linear layer; sampled points start half as far away, the first one at the
  query itself.
- Boundaries: targets are computed from augmented labels, with exact distances, and ignored pixels have none; the sum of
  the direction loss has no weights of directions, is divided by the number of true boundary pixels and reaches 32
  pixels; maps are up-sampled without aligned corners; a boundary is a probability above 0.5 in every place.
- Data: no limit of the long side of ADE20K's images, other ranges of brightness and hue, crops on the image's own
  pixels.
- Prediction: views are averaged at 1/8, and windows at validation have a stride of 320.
- `resnet50c.gluon_in1k` is the nearest to the ResNet-50 v1c of MMSegmentation that timm has.
"""

from . import ade20k, other_benchmarks, small

PRESETS = {
    preset.__name__: preset
    for preset in (
        small.shapes,
        small.camvid,
        small.camvid_gpu,
        small.folder,
        ade20k.ade20k_resnet50,
        ade20k.ade20k_deit,
        ade20k.ade20k_baseline,
        ade20k.ade20k_pyramid,
        ade20k.ade20k_l1_n4,
        ade20k.ade20k_l1_n16,
        ade20k.ade20k_l1_n64,
        ade20k.ade20k_l3_n4,
        ade20k.ade20k_l3_n64,
        ade20k.ade20k_resnet50_full,
        ade20k.ade20k_resnet50_sparse_transformer,
        ade20k.ade20k_resnet50_longformer,
        ade20k.ade20k_resnet50_reformer,
        ade20k.ade20k_resnet50_released,
        ade20k.ade20k_deit_released,
        ade20k.ade20k_dinov3,
        other_benchmarks.cityscapes_resnet50,
        other_benchmarks.cityscapes_deit,
        other_benchmarks.pascal_context_resnet50,
        other_benchmarks.pascal_context_deit,
        other_benchmarks.pascal_context_deit_released,
    )
}
