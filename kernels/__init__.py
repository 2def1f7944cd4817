"""The ops of UN-EPT, each on two backends: Triton on GPUs, PyTorch anywhere. See `use_backend`."""

from .backend import BACKENDS, requested_backend, use_backend

__all__ = ["BACKENDS", "requested_backend", "use_backend"]
