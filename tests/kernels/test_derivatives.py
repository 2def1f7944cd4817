"""Beyond one backward: second derivatives, torch.func, vmap; and ops that have first derivatives only say so."""

import functools

import pytest
import torch
from torch import Tensor

from tests.helpers.attention import attention, deformable, make_case
from unept.kernels import (
    bilinear_gather,
    boundary_targets,
    ms_deform_attn,
    sparse_sampling_attention,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_cross_entropy_pair,
)

SMALL = {"queries": 3, "heads": 2, "channels": 2, "num_points": 2, "shapes": [(3, 4), (1, 2)]}


def function_of(op, case, spatial_shapes=None):
    """An op as a function of its differentiable inputs."""
    shapes = spatial_shapes if spatial_shapes is not None else case.spatial_shapes
    if op is attention:
        return lambda value, *others: sparse_sampling_attention(value, shapes, *others)
    return lambda value, *others: ms_deform_attn(value, shapes, None, *others)


@pytest.mark.parametrize("op", [attention, deformable])
@pytest.mark.parametrize("shared", [True, False])
def test_second_derivatives(op, shared):
    case = make_case(**SMALL, shared=shared, normalised=op is deformable).to("cpu", torch.float64)
    run, inputs = function_of(op, case), tuple(case.inputs.values())
    torch.autograd.gradcheck(run, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_a_gradient_penalty_counts():
    """The gradient is differentiable also where what comes in has no gradient itself."""
    case = make_case(**SMALL).to("cpu", torch.float64)
    (grad_value,) = torch.autograd.grad(attention(case).sum(), case.inputs["value"], create_graph=True)
    by_logits = torch.autograd.grad(grad_value.square().sum(), case.inputs["logits"])[0]
    assert by_logits.abs().max() > 0


def logits_and_labels(*batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*batch, 2, 4, 3, 3, dtype=torch.float64), torch.randint(0, 4, (*batch, 2, 6, 6))


def test_ops_with_first_derivatives_only_say_so():
    features, points = torch.randn(1, 2, 3, 4).requires_grad_(), torch.rand(1, 5, 2)
    logits, labels = logits_and_labels()
    for leaf, out in (
        (features, bilinear_gather(features, points).square().sum()),
        (logits.requires_grad_(), upsample_cross_entropy(logits, labels)),
        (logits, sum(upsample_cross_entropy_pair(logits, labels, torch.zeros(2, 2, 6, 6))).sum()),
    ):
        (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="has first derivatives only: leave it out"):
            grad.square().sum().backward()


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("op", [attention, deformable])
def test_torch_func(op, backend):
    case = make_case(**SMALL, shared=True, normalised=op is deformable)
    dtype = torch.float64 if backend[0] == "torch" else torch.float32
    case = case.to(backend[1], dtype)
    run, inputs = function_of(op, case), tuple(t.detach() for t in case.inputs.values())
    out, pullback = torch.func.vjp(run, *inputs)
    wanted = torch.autograd.grad(op(case), list(case.inputs.values()), case.grad_out)
    for found, grad in zip(pullback(case.grad_out), wanted, strict=True):
        torch.testing.assert_close(found, grad)
    value_grad = torch.func.grad(lambda value: (run(value, *inputs[1:]) * case.grad_out).sum())(inputs[0])
    torch.testing.assert_close(value_grad, wanted[0])

    tangents = tuple(torch.randn_like(t) for t in inputs)
    out_again, tangent = torch.func.jvp(run, inputs, tangents)
    torch.testing.assert_close(out_again, out)
    through = sum((grad * t).sum() for grad, t in zip(wanted, tangents, strict=True))
    torch.testing.assert_close((tangent * case.grad_out).sum(), through)


def stacked(cases):
    return tuple(torch.stack([case.inputs[name].detach() for case in cases]) for name in cases[0].inputs)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("op", [attention, deformable])
def test_vmap(op, backend):
    cases = [
        make_case(**SMALL, shared=True, normalised=op is deformable).to(backend[1], torch.float32) for _ in range(2)
    ]
    run = function_of(op, cases[0])

    def loss(*inputs):
        return (run(*inputs) * cases[0].grad_out).sum()

    inputs = stacked(cases)
    wanted = [torch.autograd.grad(loss(*case.inputs.values()), list(case.inputs.values())) for case in cases]
    torch.testing.assert_close(torch.vmap(run)(*inputs), torch.stack([op(case).detach() for case in cases]))
    gradients = torch.vmap(torch.func.grad(loss, argnums=tuple(range(len(inputs)))))(*inputs)
    for i, found in enumerate(gradients):
        torch.testing.assert_close(found, torch.stack([grads[i] for grads in wanted]))

    # Mapped over the points alone, along another dimension.
    others = [0 if i != 1 else 2 for i in range(len(inputs))]
    one_value = [t[0] if i != 1 else t.movedim(0, 2) for i, t in enumerate(inputs)]
    dims = tuple(None if i != 1 else dim for i, dim in enumerate(others))
    mapped = torch.vmap(run, in_dims=dims)(*one_value)
    loop = [run(*(t[0] if i != 1 else t[k] for i, t in enumerate(inputs))) for k in range(2)]
    torch.testing.assert_close(mapped, torch.stack(loop))


def test_the_argmax_has_no_gradient_and_none_is_asked_for():
    """As with `F.interpolate(...).argmax(1)`, what is computed beside it has its gradient."""
    logits, _ = logits_and_labels()
    offset = torch.rand(2, 2, 6, 6)
    for grad in torch.func.grad(lambda z, o: (upsample_argmax(z, (6, 6), o) * z.sum() * o.sum()).sum(), (0, 1))(
        logits, offset
    ):
        assert (grad != 0).all()


def test_vmap_of_the_other_operators():
    logits, labels = logits_and_labels(3)
    offset = torch.randint(-2, 3, (3, 2, 2, 6, 6))
    points = torch.rand(3, 2, 5, 2, dtype=torch.float64) * 3
    for op, inputs in (
        (bilinear_gather, (logits, points)),
        (functools.partial(upsample_cross_entropy, reduction="mean"), (logits, labels, offset)),
        (upsample_cross_entropy_pair, (logits, labels, offset)),
        (lambda logits, offset: upsample_argmax(logits, (6, 6), offset), (logits, offset)),
        (lambda labels: boundary_targets(labels)[0], (labels,)),
    ):
        loop = [op(*arguments) for arguments in zip(*inputs, strict=True)]
        stacked = tuple(map(torch.stack, zip(*loop, strict=True))) if isinstance(loop[0], tuple) else torch.stack(loop)
        torch.testing.assert_close(torch.vmap(op)(*inputs), stacked)
    per_image = torch.vmap(torch.func.grad(lambda z, t: upsample_cross_entropy(z, t)))(logits, labels)
    for found, z, target in zip(per_image, logits, labels, strict=True):
        torch.testing.assert_close(found, torch.func.grad(upsample_cross_entropy)(z, target))
    weights = torch.rand(3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"cannot map over argument 3 of .*: loop over it"):
        torch.vmap(lambda w: upsample_cross_entropy(logits[0], labels[0], class_weights=w))(weights)
