"""The ops of UN-EPT, each on two backends: Triton on GPUs, PyTorch anywhere. See `use_backend`."""

from .backend import BACKENDS, requested_backend, use_backend
from .sparse_attention import MSDeformAttnFunction, ms_deform_attn, sparse_sampling_attention

__all__ = [
    "BACKENDS",
    "MSDeformAttnFunction",
    "ms_deform_attn",
    "requested_backend",
    "sparse_sampling_attention",
    "use_backend",
]
