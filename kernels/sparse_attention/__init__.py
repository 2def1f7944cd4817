"""Sparse sampling attention (Eq. 2-4, 6), also under Deformable DETR's signature."""

from .forms import force_form
from .op import MSDeformAttnFunction, ms_deform_attn, sparse_sampling_attention
from .projected import project, projected_sampling_attention

__all__ = [
    "MSDeformAttnFunction",
    "force_form",
    "ms_deform_attn",
    "project",
    "projected_sampling_attention",
    "sparse_sampling_attention",
]
