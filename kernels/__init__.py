"""The ops of UN-EPT, each on two backends: Triton on GPUs, PyTorch anywhere. See `use_backend`."""

from .backend import BACKENDS, requested_backend, use_backend
from .bilinear_gather import bilinear_gather

__all__ = ["BACKENDS", "bilinear_gather", "requested_backend", "use_backend"]
