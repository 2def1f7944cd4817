"""The former place of `unept.model.attention`: names that documentation used stay importable."""

from .model.attention import SparseSamplingAttention

__all__ = ["SparseSamplingAttention"]
