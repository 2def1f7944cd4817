"""The ops of UN-EPT, each on two backends: Triton on GPUs, PyTorch anywhere. See `use_backend`."""

from .backend import BACKENDS, requested_backend, use_backend
from .bilinear_gather import bilinear_gather
from .boundary_targets import boundary_targets
from .sparse_attention import MSDeformAttnFunction, ms_deform_attn, sparse_sampling_attention
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "BACKENDS",
    "MSDeformAttnFunction",
    "bilinear_gather",
    "boundary_targets",
    "ms_deform_attn",
    "requested_backend",
    "sparse_sampling_attention",
    "upsample_argmax",
    "upsample_cross_entropy",
    "use_backend",
]
