"""The compiled operators of mmcv and of Deformable DETR's kin, replaced: stand-ins with their interface, and mmcv."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from unept.integrations import deformable_detr, mmcv
from unept.kernels import reference

SHAPES = [(3, 4), (2, 3)]


def inputs():
    value = torch.randn(2, 18, 2, 4, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    return value, torch.tensor(SHAPES), torch.tensor([0, 12]), locations, weights


def not_compiled(*args, **kwargs):
    raise RuntimeError("the original was called")


def load(monkeypatch, name: str, source: str, **names) -> ModuleType:
    """A module made of source text, which later imports find."""
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)
    exec(source, vars(module))
    return module


def check(run):
    """Output and gradients of the op under Deformable DETR's arguments."""
    arguments = inputs()
    leaves = [arguments[i] for i in (0, 3, 4)]
    out, wanted = run(*arguments), reference.ms_deform_attn(leaves[0], SHAPES, None, *leaves[1:])
    grad_out = torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    for found, exact in zip(
        torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(wanted, leaves, grad_out), strict=True
    ):
        torch.testing.assert_close(found, exact)


# As those who use the compiled extension call it, from an autograd function of their own.
USER = """
import torch
import MultiScaleDeformableAttention as MSDA

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return MSDA.ms_deform_attn_forward(value, shapes, starts, locations, weights, ctx.im2col_step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        value, locations, weights = MSDA.ms_deform_attn_backward(*ctx.saved_tensors, grad, ctx.im2col_step)
        return value, None, None, locations, weights, None
"""


@pytest.mark.parametrize("compiled", [False, True])
def test_the_extension_of_deformable_detr(monkeypatch, compiled):
    monkeypatch.delitem(sys.modules, "MultiScaleDeformableAttention", raising=False)
    if compiled:  # and imported before
        original = load(monkeypatch, "MultiScaleDeformableAttention", "", ms_deform_attn_forward=not_compiled)
        user = load(monkeypatch, "user", USER)
    assert deformable_detr.patch() == deformable_detr.patch() == (3 if compiled else 2)
    try:
        if not compiled:
            user = load(monkeypatch, "user", USER)
        check(lambda *arguments: user.Function.apply(*arguments, 64))
        load(monkeypatch, "groundingdino", "")
        grounding = load(monkeypatch, "user2", "from groundingdino import _C")
        assert grounding._C.ms_deform_attn_forward is deformable_detr.ms_deform_attn_forward
    finally:
        assert deformable_detr.unpatch() == (3 if compiled else 2)
    assert deformable_detr.unpatch() == 0
    if compiled:
        assert user.MSDA is sys.modules["MultiScaleDeformableAttention"] is original
    else:
        assert "MultiScaleDeformableAttention" not in sys.modules


MMCV = """
class MultiScaleDeformableAttnFunction:
    apply = staticmethod(not_compiled)

multi_scale_deformable_attn_pytorch = not_compiled

def gpu(value, spatial_shapes, level_start_index, locations, weights):
    return MultiScaleDeformableAttnFunction.apply(value, spatial_shapes, level_start_index, locations, weights, 64)

def cpu(value, spatial_shapes, level_start_index, locations, weights):
    return multi_scale_deformable_attn_pytorch(
        value=value, value_spatial_shapes=spatial_shapes, sampling_locations=locations, attention_weights=weights
    )
"""

BEVFORMER = """
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch as in_pytorch

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights):
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return ext.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = [torch.zeros_like(inputs[i]) for i in (0, 3, 4)]
        ext.ms_deform_attn_backward(*inputs, grad.contiguous(), *grads, im2col_step=64)
        return grads[0], None, None, grads[1], grads[2]
"""


def test_mmcv_stand_in(monkeypatch):
    extension = ModuleType("mmcv._ext")
    extension.ms_deform_attn_forward = extension.ms_deform_attn_backward = not_compiled
    for name in ("mmcv", "mmcv.ops"):
        load(monkeypatch, name, "", __path__=[])
    module = load(monkeypatch, mmcv.MODULE, MMCV, not_compiled=not_compiled, ext_module=extension)
    sys.modules["mmcv.ops"].MultiScaleDeformableAttnFunction = original = module.MultiScaleDeformableAttnFunction
    user = load(monkeypatch, "user", BEVFORMER, ext=extension)
    assert mmcv.patch() == mmcv.patch() >= 6
    try:
        check(module.gpu)
        check(module.cpu)
        check(user.Function.apply)
        assert user.in_pytorch is module.multi_scale_deformable_attn_pytorch is mmcv.multi_scale_deformable_attn_pytorch
        assert sys.modules["mmcv.ops"].MultiScaleDeformableAttnFunction is not original
    finally:
        mmcv.unpatch()
    assert sys.modules["mmcv.ops"].MultiScaleDeformableAttnFunction is original
    assert user.in_pytorch is extension.ms_deform_attn_forward is not_compiled


def test_without_mmcv(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ImportError, match="install mmcv, not mmcv-lite"):
        mmcv.patch()


def test_mmcv_itself():
    ops = pytest.importorskip("mmcv.ops")
    torch.manual_seed(0)
    module = ops.MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=2, batch_first=True)
    nn.init.normal_(module.sampling_offsets.weight)
    query, value = torch.randn(2, 5, 16), torch.randn(2, 18, 16)
    options = {"reference_points": torch.rand(2, 5, 2, 2), "spatial_shapes": torch.tensor(SHAPES)}
    options["level_start_index"] = torch.tensor([0, 12])
    wanted = module(query, value=value, **options)
    mmcv.patch()
    try:
        torch.testing.assert_close(module(query, value=value, **options), wanted)
    finally:
        mmcv.unpatch()
