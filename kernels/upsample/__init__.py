"""Cross-entropy and class ids of up-sampled, optionally shifted logits (Eq. 5, 7)."""

from .argmax import upsample_argmax
from .cross_entropy import upsample_cross_entropy, upsample_cross_entropy_pair

__all__ = ["upsample_argmax", "upsample_cross_entropy", "upsample_cross_entropy_pair"]
