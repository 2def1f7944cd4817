"""Every op takes every layout: transposed, turned, mirrored and expanded inputs give what their copies give."""

import pytest
import torch

from tests.helpers.marks import slow
from unept.kernels import (
    bilinear_gather,
    boundary_targets,
    ms_deform_attn,
    sparse_sampling_attention,
    upsample_argmax,
    upsample_cross_entropy,
)


def layouts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of other layouts with the values of `tensor`."""
    last = tensor.dim() - 1
    turned = tensor.transpose(0, last).contiguous().transpose(0, last)
    spaced = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)[..., ::2]
    spaced.copy_(tensor)
    inner = tensor.transpose(last - 1, last).contiguous().mT
    return [turned, spaced, inner]


def labels(device: str) -> torch.Tensor:
    """(2, 5, 7)"""
    return (torch.arange(70, device=device).view(2, 5, 7) // 3 % 3).to(torch.uint8)


CALLS = {
    "bilinear_gather": lambda maps, points: bilinear_gather(maps, points),
    "upsample_cross_entropy": lambda maps, ids, offset: upsample_cross_entropy(maps, ids, offset, reduction="none"),
    "upsample_cross_entropy without offset": lambda maps, ids: upsample_cross_entropy(maps, ids, reduction="none"),
    "upsample_argmax": lambda maps, offset: upsample_argmax(maps, (5, 7), offset),
    "boundary_targets": lambda ids: torch.stack([m.double() for m in boundary_targets(ids)]),
    "sparse_sampling_attention": lambda value, points, scores, reference: sparse_sampling_attention(
        value, [(3, 4)], points, scores, reference
    ),
    "ms_deform_attn": lambda value, points, scores: ms_deform_attn(value, [(3, 4)], None, points, scores),
}


@pytest.mark.parametrize(
    "name", [slow(name) if "value" in CALLS[name].__code__.co_varnames else name for name in CALLS]
)
def test_every_layout(name, backend):
    device = backend[1]
    inputs = {
        "maps": torch.randn(2, 3, 3, 4, device=device),
        "points": torch.rand(2, 5, 2, device=device) * 3,
        "ids": labels(device),
        "offset": torch.randint(-2, 3, (2, 2, 5, 7), device=device).short(),
        "value": torch.randn(2, 12, 2, 4, device=device),
        "scores": torch.randn(2, 5, 2, 1, 3, device=device),
        "reference": torch.rand(2, 5, 2, device=device),
    }
    names = CALLS[name].__code__.co_varnames
    if "value" in names:
        inputs["points"] = torch.rand(2, 5, 2, 1, 3, 2, device=device)
    arguments = [inputs[n] for n in names]
    expected, gradients = values_and_gradients(CALLS[name], arguments)
    for i, argument in enumerate(arguments):
        for view in layouts(argument):
            result, others = values_and_gradients(CALLS[name], [*arguments[:i], view, *arguments[i + 1 :]])
            assert torch.allclose(result, expected, atol=1e-5)
            for a, b in zip(gradients, others, strict=True):
                assert torch.allclose(a, b, atol=1e-5)


def values_and_gradients(call, arguments):
    """The result and the gradients of the floating-point arguments, for a gradient of the result that is transposed."""
    leaves = [a.detach() if a.is_floating_point() else a for a in arguments]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    result = call(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not (wanted and result.requires_grad):
        return result, []
    grad = torch.linspace(-1, 1, result.numel(), device=result.device, dtype=result.dtype).view(result.shape)
    grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
    return result.detach(), list(torch.autograd.grad(result, wanted, grad))
