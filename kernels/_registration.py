"""What custom ops register besides their fakes: derivatives, vmap by their own batch, decompositions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""The ops in PyTorch's own, by overload; `decompositions` fills it.

They are not registered with PyTorch: Inductor refuses an op that it could decompose where the variable CI is set.
"""


def register_vmap(op: Any, unbatched: tuple[int, ...] = (), summed: Mapping[int, int] | None = None) -> None:
    """Let `torch.vmap` fold its dimension into the batch of an op, whose tensors begin with B, or with 1 for all.

    Args:
        op: a `torch.library.custom_op`; its first argument is a tensor.
        unbatched: positions of tensors without a batch; they cannot be mapped over.
        summed: position of an output to that of the input of which it is the gradient: if that input has one entry for
            all images, so has the gradient.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        dims = dict(enumerate(in_dims))
        mapped = [i for i in unbatched if i < len(args) and isinstance(args[i], Tensor) and dims.get(i) is not None]
        if mapped:
            raise NotImplementedError(f"torch.vmap cannot map over argument {mapped[0]} of {op._name}: loop over it")
        split = {
            i: _leading(arg, dims.get(i), info.batch_size)
            for i, arg in enumerate(args)
            if isinstance(arg, Tensor) and i not in unbatched
        }
        B = split[0].shape[1]
        folded = {i: t.expand(-1, B, *t.shape[2:]).flatten(0, 1) for i, t in split.items()}
        results = op(*(folded.get(i, arg) for i, arg in enumerate(args)))
        single = isinstance(results, Tensor)
        unfolded, out_dims = [], []
        for i, result in enumerate((results,) if single else results):
            empty = result.shape == (0,)  # a gradient that is not needed
            unfolded.append(result if empty else result.unflatten(0, (info.batch_size, B)))
            out_dims.append(None if empty else 0)
            if not empty and summed and i in summed and split[summed[i]].shape[1] != B:
                unfolded[-1] = unfolded[-1].sum(1, keepdim=True)
        return (unfolded[0], out_dims[0]) if single else (tuple(unfolded), tuple(out_dims))

    op.register_vmap(rule)


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with the mapped dimension in front; expanded to it if it is not mapped."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def register_autograd(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make an op differentiable, as an autograd Function, which the transforms of `torch.func` know too.

    What is compiled, exported or traced calls the op itself, whose gradient is registered.

    Args:
        op: a `torch.library.custom_op`.
        setup_context: of (ctx, inputs, output), as in an autograd Function.
        backward: of (ctx, *grads), which gives a gradient or None for each input.

    Returns:
        The op as a function of the same arguments, all by position. Call this one.
    """
    op.register_autograd(backward, setup_context=setup_context)
    forward = lambda *args: op(*args)
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # asked for at every call
    members = {"forward": forward, "setup_context": setup_context, "backward": backward}
    namespace: dict[str, Any] = {name: staticmethod(function) for name, function in members.items()}
    function: Any = type(op._name, (torch.autograd.Function,), {**namespace, "generate_vmap_rule": True})

    def run(*args: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            return in_pytorch(op, *args)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return op(*args)
        return function.apply(*args)

    return run


def refuse_second_derivatives(backward_op: Any, name: str) -> Callable[..., Any]:
    """Let the backward op of an op raise an error where it would have to be differentiated itself.

    Returns:
        See `register_autograd`.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{name} has first derivatives only: leave it out of what is differentiated twice (create_graph=True), or "
            f"compute that part with plain PyTorch, as unept.kernels.reference.{name} does"
        )

    return register_autograd(backward_op, setup_context, backward)


def in_pytorch(op: Any, *args: Any) -> Any:
    """An op in PyTorch's own, which the ONNX exporter understands.

    Args:
        op: a `torch.library.custom_op`.
        *args: all of its arguments by position.
    """
    return DECOMPOSITIONS[op._opoverload](*args)
