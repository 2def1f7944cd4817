"""Softmax attention of each query to a list of keys, without keeping the gathered keys or the weights.

Legend: B batch, M heads, Q queries, S keys, D channels per head, J neighbours per query.

    Attn_mq = sum over j of softmax_j(q_mq . k_m,index(q,j) / sqrt(D)) v_m,index(q,j)

This is Eq. 1 on J keys instead of S. The forward pass keeps q, k, v and the index; the backward pass gathers again, a
chunk of queries at a time. The cost is O(Q J) multiplications and O((Q + S) M D + Q J) memory, of which Q J is the
index, which all heads share.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # elements of one chunk's gathered keys: 128 MiB in float32


def neighbour_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Attend from each query to its valid neighbours.

    Args:
        q: (B, M, Q, D).
        k, v: (B, M, S, D).
        index: (Q, J) int64, positions of the neighbours in [0, S); the same for every image and head.
        valid: (Q, J) bool, which of them count; at least one per query.

    Returns:
        (B, M, Q, D).
    """
    return _NeighbourAttention.apply(q, k, v, index, valid)


def _chunks(q: Tensor, index: Tensor) -> list[slice]:
    """Ranges of queries whose gathered keys fill about `CHUNK_ELEMENTS`."""
    batch, heads, queries, dim = q.shape
    step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * dim * index.shape[1]))
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, M, q, J, D) of x (B, M, S, D) at index (q, J)."""
    return x.index_select(2, index.flatten()).unflatten(2, index.shape)


def _weights(q: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Attention weights (B, M, q, J), float32 at least, of q (B, M, q, D) and keys (B, M, q, J, D)."""
    scores = torch.einsum("bmqd,bmqjd->bmqj", q, keys) * q.shape[-1] ** -0.5
    scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    return scores.masked_fill(~valid, -torch.inf).softmax(dim=-1)


class _NeighbourAttention(torch.autograd.Function):
    """See `neighbour_attention`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        outputs = []
        for part in _chunks(q, index):
            weights = _weights(q[:, :, part], _gather(k, index[part]), valid[part])
            outputs.append(torch.einsum("bmqj,bmqjd->bmqd", weights.to(v.dtype), _gather(v, index[part])))
        return torch.cat(outputs, dim=2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Save the inputs and nothing else; apart from the forward, as `torch.func` asks for."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With P the weights: dV = P^T dO, dP = dO V^T, dS = P * (dP - sum_j P dP), dQ = dS K, dK = dS^T Q."""
        q, k, v, index, valid = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        accumulate = torch.promote_types(q.dtype, torch.float32)  # sums over many queries
        grad_q = []
        grad_k, grad_v = torch.zeros_like(k, dtype=accumulate), torch.zeros_like(v, dtype=accumulate)
        for part in _chunks(q, index):
            keys, values, flat = _gather(k, index[part]), _gather(v, index[part]), index[part].flatten()
            weights = _weights(q[:, :, part], keys, valid[part])
            upstream = grad[:, :, part]
            outer = weights.to(grad.dtype)[..., None] * upstream[:, :, :, None]
            grad_v.index_add_(2, flat, outer.flatten(2, 3).to(accumulate))
            grad_weights = torch.einsum("bmqd,bmqjd->bmqj", upstream, values).to(weights.dtype)
            grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
            grad_scores = (grad_scores * scale).to(q.dtype)
            grad_q.append(torch.einsum("bmqj,bmqjd->bmqd", grad_scores, keys))
            outer = grad_scores[..., None] * q[:, :, part, None]
            grad_k.index_add_(2, flat, outer.flatten(2, 3).to(accumulate))
        return torch.cat(grad_q, dim=2), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None
