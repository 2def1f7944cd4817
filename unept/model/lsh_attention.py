"""Attention within chunks of a sequence sorted by locality-sensitive hashes (Reformer, Kitaev et al. 2020, Sec. 2).

Legend: B batch, M heads, n tokens, D channels per head, R rounds, c chunks of m tokens (n padded to c m).

    h(x) = argmax([x R; -x R])                                              the bucket of a token, one per round
    k_j = q_j / |q_j|                                                       shared queries and keys
    o_i = sum over rounds r of exp(z_r(i) - z(i)) o_i^r                     z: the logarithm of softmax's denominator

A token attends to its chunk of the sorted sequence and to the one before it, whichever bucket their tokens are in; to
itself only where there is nothing else. A pair that meets in several rounds counts as often.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ITSELF = -1e5  # a token's score with itself, as in the paper
MASKED = -1e9  # finite, so that a token without any key gets zeros and no NaN


def hash_buckets(q: Tensor, rotations: Tensor, chunk: int) -> Tensor:
    """The bucket (R, B, M, n), int64, of each token of q (B, M, n, D): about 2 n / chunk buckets, the paper's choice.

    Args:
        q: (B, M, n, D).
        rotations: (R, D, at least half the number of buckets), random directions.
        chunk: m.
    """
    half = max(1, min(rotations.shape[-1], q.shape[2] // chunk))
    rotated = torch.einsum("bmnd,rdh->rbmnh", q.detach(), rotations[..., :half].to(q.dtype))
    return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)


def lsh_attention(q: Tensor, v: Tensor, rotations: Tensor, chunk: int, num_queries: int = 0) -> Tensor:
    """Attend to tokens with similar hashes.

    Args:
        q: (B, M, n, D), queries and keys at once.
        v: (B, M, n, D).
        rotations: (R, D, .), random directions.
        chunk: m.
        num_queries: the first so many tokens are queries only and never attended to (cross-attention).

    Returns:
        (B, M, n, D).
    """
    length = q.shape[2]
    size = min(chunk, length)
    pad = -length % size
    order = sorted_order(hash_buckets(q, rotations, chunk), num_queries)
    q, v = F.pad(q, (0, 0, 0, pad)), F.pad(v, (0, 0, 0, pad))
    end = torch.arange(length, length + pad, device=q.device).expand(*order.shape[:-1], pad)
    order = torch.cat([order, end], dim=-1)  # padding is sorted last
    is_key = torch.arange(length + pad, device=q.device)
    is_key = (is_key >= num_queries) & (is_key < length)
    output, denominator = _rounds(q, v, order, is_key, size)
    weights = denominator.softmax(dim=0)[..., None]  # (R, B, M, n, 1)
    return (weights * output).sum(dim=0)[:, :, :length].to(v.dtype)


def sorted_order(buckets: Tensor, num_queries: int) -> Tensor:
    """Positions of the tokens sorted by bucket, within one by their relative place among the queries or the keys."""
    length = buckets.shape[-1]
    counts = (num_queries, length - num_queries)
    place = torch.cat([torch.arange(n, device=buckets.device) / max(n, 1) for n in counts])
    return (buckets + place).argsort(dim=-1, stable=True)


def _rounds(q: Tensor, v: Tensor, order: Tensor, is_key: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every round's output (R, B, M, n, D) and log-denominator (R, B, M, n); n is a multiple of `size`."""
    queries, values = (_take(x.expand(len(order), *x.shape), order).unflatten(3, (-1, size)) for x in (q, v))
    positions = order.unflatten(3, (-1, size))  # (R, B, M, c, m)
    keys = _with_previous(F.normalize(queries, dim=-1))  # (R, B, M, c, 2 m, D)
    seen = _with_previous(positions)
    masked = ~is_key[seen][..., None, :]
    scores = torch.einsum("rbmcid,rbmcjd->rbmcij", queries, keys) * q.shape[-1] ** -0.5
    scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    scores = scores.masked_fill(positions[..., :, None] == seen[..., None, :], ITSELF).masked_fill(masked, MASKED)
    denominator = scores.logsumexp(dim=-1)
    weights = (scores - denominator[..., None]).exp().masked_fill(masked, 0.0)
    out = torch.einsum("rbmcij,rbmcjd->rbmcid", weights.to(v.dtype), _with_previous(values))
    back = order.argsort(dim=-1)
    return _take(out.flatten(3, 4), back), denominator.flatten(3, 4).gather(3, back)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of x (R, B, M, n, D) in this order (R, B, M, n)."""
    return x.gather(3, order[..., None].expand(*order.shape, x.shape[-1]))


def _with_previous(chunks: Tensor) -> Tensor:
    """(R, B, M, c, m, ...) to (R, B, M, c, 2 m, ...): each chunk after the one before it, the first after the last.

    A single chunk has no other before it, and stays (R, B, M, 1, m, ...).
    """
    return chunks if chunks.shape[3] == 1 else torch.cat([chunks.roll(1, dims=3), chunks], dim=4)
