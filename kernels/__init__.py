"""The ops of UN-EPT, each on two backends: Triton on GPUs, PyTorch anywhere. See `use_backend`."""

if __name__ == "unept.kernels":
    from ._autotune import compile_ahead
    from .backend import BACKENDS, requested_backend, set_default_backend, use_backend
    from .bilinear_gather import bilinear_gather
    from .boundary_targets import boundary_targets
    from .decompositions import DECOMPOSITIONS
    from .sparse_attention import MSDeformAttnFunction, ms_deform_attn, sparse_sampling_attention
    from .upsample import upsample_argmax, upsample_cross_entropy, upsample_cross_entropy_pair
else:
    # From a clone's root `import kernels` finds this folder; transformers tries it, looking for a package of PyPI. A
    # second copy would take over the first one's ops: it is the same package instead.
    import importlib
    import sys

    sys.modules[__name__] = importlib.import_module("unept.kernels")

__all__ = [
    "BACKENDS",
    "DECOMPOSITIONS",
    "MSDeformAttnFunction",
    "bilinear_gather",
    "boundary_targets",
    "compile_ahead",
    "ms_deform_attn",
    "requested_backend",
    "set_default_backend",
    "sparse_sampling_attention",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_cross_entropy_pair",
    "use_backend",
]
