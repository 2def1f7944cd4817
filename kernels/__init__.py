"""The ops of UN-EPT, each on two backends: Triton on GPUs, PyTorch anywhere. See `use_backend`."""

from .backend import BACKENDS, requested_backend, use_backend
from .bilinear_gather import bilinear_gather
from .boundary_targets import boundary_targets
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "BACKENDS",
    "bilinear_gather",
    "boundary_targets",
    "requested_backend",
    "upsample_argmax",
    "upsample_cross_entropy",
    "use_backend",
]
