"""Refuse weights and predictions that hold no numbers: NaN would otherwise be shown as class 0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def require_finite(tensors: Mapping[str, Tensor], source: Any) -> None:
    """Raise ValueError if a tensor of a file, called `source` in the message, holds NaN or infinite values."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(
            f"{source} holds NaN or infinite values in {len(bad)} of {len(tensors)} tensors, the first being {bad[0]}: "
            "the training had diverged, or the file is damaged; take the weights of an earlier step or train again"
        )


def require_numbers(scores: Tensor) -> None:
    """Raise FloatingPointError if class scores (B, K, h, w), of which ids are to be made for people, hold NaN."""
    if scores.isnan().any():
        raise_not_a_number()


def raise_not_a_number() -> None:
    """Raise the FloatingPointError of `require_numbers`."""
    raise FloatingPointError(
        "the prediction holds NaN, which is no class: the images hold NaN or infinite values, the weights do, or "
        "bfloat16 overflowed (--amp off)"
    )
