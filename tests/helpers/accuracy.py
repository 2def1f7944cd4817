"""The accuracy gate that every op passes, for values and for every gradient."""

import torch
from torch import Tensor

# Relative limits against the float64 reference, of the largest element in max-abs and of the RMS in RMS.
RELATIVE_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


def _errors(actual: Tensor, reference: Tensor) -> tuple[float, float]:
    difference = actual.detach().cpu().double() - reference.detach().cpu().double()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def assert_accurate(actual: Tensor, reference: Tensor, same_dtype: Tensor | None = None, name: str = "output") -> None:
    """Fail unless `actual` is as close to the float64 `reference` as its dtype allows.

    float64 and float32 have fixed relative limits. float16 and bfloat16 may be at most twice as far from the reference
    as `same_dtype`, the same computation by plain torch in that dtype, in max-abs and in RMS.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)} is not {tuple(reference.shape)}"
    assert torch.isfinite(actual).all(), f"{name} holds NaN or infinity"
    if reference.numel() == 0:
        return
    errors = _errors(actual, reference)
    reference = reference.detach().cpu().double()
    size = (reference.abs().max().item(), reference.square().mean().sqrt().item())
    if actual.dtype in RELATIVE_LIMIT:
        limits = tuple(RELATIVE_LIMIT[actual.dtype] * s for s in size)
    else:
        assert same_dtype is not None, f"{name}: {actual.dtype} is judged against the same computation by torch"
        # Half an ulp of the largest value: what rounding the exact result to the dtype costs at the least.
        floor = torch.finfo(actual.dtype).eps / 2
        limits = tuple(max(2 * e, floor * s) for e, s in zip(_errors(same_dtype, reference), size, strict=True))
    for kind, error, limit in zip(("max-abs", "RMS"), errors, limits, strict=True):
        assert error <= limit, f"{name}: {kind} error {error:.3g} is over {limit:.3g}"
