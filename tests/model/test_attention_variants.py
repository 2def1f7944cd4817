"""The attentions of Table 8: each against a dense softmax over the keys that its paper allows, and in our network."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.runs import small_model
from unept.model import neighbour_attention as neighbours
from unept.model.attention_variants import (
    ATTENTIONS,
    VARIANTS,
    WindowedAttention,
    build_attention,
    cross_neighbours,
    evenly_spaced,
    window_neighbours,
)
from unept.model.encoding import reference_grid
from unept.model.loss import UNEPTLoss
from unept.model.lsh_attention import hash_buckets, lsh_attention, sorted_order
from unept.model.network import UNEPT

MAPS = [(5, 7), (3, 4)]  # primes, and a second map of another size
TOKENS = sum(height * width for height, width in MAPS)
CPU = torch.device("cpu")


def dense_attention(q, k, v, mask):
    """Softmax over the keys (Q, S) that `mask` allows, written out."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def mask_of(index, valid, keys):
    """(Q, S) bool, and that no key is valid twice."""
    count = torch.zeros(len(index), keys, dtype=torch.long).scatter_add_(1, index, valid.long())
    assert count.max() == 1
    return count == 1


def pixels(shapes):
    """(map, row, column) of each token."""
    return [(m, r, c) for m, (height, width) in enumerate(shapes) for r in range(height) for c in range(width)]


def nearest(point, shape):
    return int(point[1] * shape[0]), int(point[0] * shape[1])  # row, column


def heads(*size):
    return torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("chunk", [1, 700, 1 << 25], ids=["one query", "some queries", "all queries"])
def test_neighbour_attention_and_its_gradients_match_a_dense_softmax(chunk, monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK_ELEMENTS", chunk)
    q, k, v = heads(11, 4), heads(13, 4), heads(13, 4)
    index = torch.stack([torch.randperm(13)[:6] for _ in range(11)])
    valid = torch.rand(11, 6) < 0.7
    valid[:, 0] = True
    upstream = torch.randn(2, 3, 11, 4, dtype=torch.float64)
    out = neighbours.neighbour_attention(q, k, v, index, valid)
    expected = dense_attention(q, k, v, mask_of(index, valid, 13))
    torch.testing.assert_close(out, expected)
    got, want = (torch.autograd.grad(o, (q, k, v), upstream) for o in (out, expected))
    torch.testing.assert_close(got, want)


def test_neighbour_attention_in_bfloat16_is_as_exact_as_the_dense_one():
    q, k, v = (heads(n, 8).detach() for n in (30, 40, 40))
    index, valid = torch.arange(40).expand(30, 40), torch.ones(30, 40, dtype=torch.bool)
    exact = [dense_attention(q, k, v, valid)]
    upstream = torch.randn_like(exact[0])

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    exact = run(lambda *x: dense_attention(*x, valid), torch.float64)
    dense = run(lambda *x: dense_attention(*x, valid), torch.bfloat16)
    ours = run(lambda *x: neighbours.neighbour_attention(*x, index, valid), torch.bfloat16)
    for a, b, c in zip(ours, dense, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()
        assert (a - c).square().mean() <= 4 * (b - c).square().mean()


@pytest.mark.parametrize("queries", [MAPS, [(4, 6)]], ids=["self", "cross"])
def test_sparse_transformer_sees_row_and_column_of_each_map(queries):
    points = reference_grid(queries, CPU)[0]
    mask = mask_of(*cross_neighbours(MAPS, points), TOKENS)
    for allowed, point in zip(mask.tolist(), points.tolist(), strict=True):
        for ok, (m, row, column) in zip(allowed, pixels(MAPS), strict=True):
            r, c = nearest(point, MAPS[m])
            assert ok == (row == r or column == c)


@pytest.mark.parametrize("queries", [MAPS, [(4, 6)]], ids=["self", "cross"])
def test_longformer_sees_a_window_of_each_map(queries):
    points = reference_grid(queries, CPU)[0]
    mask = mask_of(*window_neighbours(MAPS, points, 3), TOKENS)
    for allowed, point in zip(mask.tolist(), points.tolist(), strict=True):
        for ok, (m, row, column) in zip(allowed, pixels(MAPS), strict=True):
            r, c = nearest(point, MAPS[m])
            assert ok == (abs(row - r) <= 1 and abs(column - c) <= 1)


def test_longformer_global_tokens_are_seen_and_see_everything():
    layer = WindowedAttention(d_model=12, num_heads=3, num_levels=2, window=3, num_global=4)
    q, k, v = heads(TOKENS, 4), heads(TOKENS, 4), heads(TOKENS, 4)
    points = reference_grid(MAPS, CPU)
    mask = mask_of(*window_neighbours(MAPS, points[0], 3), TOKENS)
    shared = [TOKENS * (2 * i + 1) // 8 for i in range(4)]
    mask[:, shared] = True
    mask[shared] = True
    out, expected = layer.attend(q, k, v, MAPS, points), dense_attention(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    got, want = (torch.autograd.grad(o, (q, k, v), upstream) for o in (out, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("length", "count"), [(47, 16), (5, 16), (16, 16)])
def test_global_tokens_are_different_and_in_range(length, count):
    positions = evenly_spaced(length, count, CPU).tolist()
    assert len(set(positions)) == len(positions) == min(length, count)
    assert min(positions) >= 0
    assert max(positions) < length


def test_a_window_without_a_centre_is_refused():
    with pytest.raises(ValueError, match="window is 4: it must be odd"):
        WindowedAttention(window=4)


def lsh_by_hand(q, v, rotations, chunk, num_queries):
    """Every token and every round in loops: (B, M, n, D)."""
    buckets = hash_buckets(q, rotations, chunk)
    order = sorted_order(buckets, num_queries)
    length, size = q.shape[2], min(chunk, q.shape[2])
    chunks = -(-length // size)
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for m in range(q.shape[1]):
            keys = F.normalize(q[b, m], dim=-1)
            for i in range(length):
                rounds = []
                for r in range(len(rotations)):
                    line = order[r, b, m].tolist()
                    mine = line.index(i) // size
                    seen = [j for at, j in enumerate(line) if at // size in (mine, (mine - 1) % chunks)]
                    seen = [j for j in seen if j >= num_queries and j != i] or [j for j in [i] if j >= num_queries]
                    if seen:
                        scores = keys[seen] @ q[b, m, i] / math.sqrt(q.shape[-1])
                        rounds.append((scores.logsumexp(0), scores.softmax(0) @ v[b, m, seen]))
                if rounds:
                    weights = torch.stack([z for z, _ in rounds]).softmax(0)
                    out[b, m, i] = sum(w * o for w, (_, o) in zip(weights, rounds, strict=True))
    return out


@pytest.mark.parametrize(
    ("chunk", "num_queries"), [(4, 0), (5, 0), (64, 0), (4, 6), (64, 6)], ids=lambda value: str(value)
)
def test_reformer_matches_loops(chunk, num_queries):
    q, v = torch.randn(2, 2, 18, 4).double(), torch.randn(2, 2, 18, 4).double()
    rotations = torch.randn(2, 4, 16)
    out = lsh_attention(q, v, rotations, chunk, num_queries)
    torch.testing.assert_close(out, lsh_by_hand(q, v, rotations, chunk, num_queries))


def test_reformer_finds_tokens_of_the_same_direction():
    """Eight directions far from each other: nearly all weight stays among tokens of the own one, wherever they lie."""
    kind = torch.randperm(256) % 8
    q = 40 * F.one_hot(kind, 8).float()[None, None] + 0.01 * torch.randn(1, 1, 256, 8)
    v = F.one_hot(kind, 8).float()[None, None]
    out = lsh_attention(q, v, torch.randn(4, 8, 256), chunk=32)[0, 0]
    assert out[torch.arange(256), kind].mean() > 0.95


def test_reformer_sorts_by_bucket_and_then_by_place():
    buckets = torch.tensor([1, 0, 1, 0, 1, 0, 1])
    assert sorted_order(buckets, 0).tolist() == [1, 3, 5, 0, 2, 4, 6]
    assert sorted_order(torch.zeros(6), 2).tolist() == [0, 2, 3, 1, 4, 5]  # two queries among four keys


def layer_and_inputs(name, cross, dtype=torch.float32):
    layer = build_attention(name, 16, 2, len(MAPS), 3, cross=cross).to(dtype)
    shapes = [(4, 6)] if cross else MAPS
    value = torch.randn(2, TOKENS, 16, dtype=dtype)
    query = torch.randn(2, 24, 16, dtype=dtype) if cross else value + torch.randn(1, TOKENS, 16, dtype=dtype)
    return layer, (query, value, MAPS, reference_grid(shapes, CPU))


def test_full_attention_is_equation_1():
    layer, (query, value, shapes, points) = layer_and_inputs("full", False, torch.float64)
    outs = []
    for m in range(2):
        part = slice(8 * m, 8 * m + 8)
        q, k, v = (
            x @ p.weight[part].T + p.bias[part]
            for x, p in (
                (query, layer.query_projection),
                (query, layer.key_projection),
                (value, layer.value_projection),
            )
        )
        outs.append((q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v)
    expected = torch.cat(outs, -1) @ layer.output_projection.weight.T + layer.output_projection.bias
    torch.testing.assert_close(layer(query, value, shapes, points), expected)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_same_signature_and_every_parameter_learns(name, cross):
    layer, inputs = layer_and_inputs(name, cross)
    out = layer(*inputs)
    assert out.shape == inputs[0].shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(*inputs)
    assert low.dtype == torch.bfloat16
    if name != "reformer":  # whose tokens may fall into other buckets
        assert (low - out).abs().max() < 0.1 * out.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_of_cross_attention_know_where_they_are(name):
    """X_enc the same everywhere: only the encoding of its keys tells its pixels apart."""
    layer, (query, _, shapes, points) = layer_and_inputs(name, True)
    seen = []
    layer.attend = lambda q, k, *_: seen.append(k) or q
    layer(query, torch.ones(2, TOKENS, 16), shapes, points)
    assert len(seen[0][0, 0].unique(dim=0)) == TOKENS


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def test_compiles_in_one_graph(name):
    layer, inputs = layer_and_inputs(name, cross=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    upstream = torch.randn_like(inputs[0])
    got, want = (torch.autograd.grad(f(*inputs), list(layer.parameters()), upstream) for f in (compiled, layer))
    torch.testing.assert_close(got, want)


def network(name):
    return small_model(4, output_stride=32, attention=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_network_learns_with_it(name):
    model, loss = network(name).train(), UNEPTLoss()
    images = torch.randn(2, 3, 32, 40)
    labels = torch.randint(0, 4, (2, 4, 5)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(3):
        value = loss(model(images), labels)["loss"]
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]


def test_predictions_are_the_same_after_saving(tmp_path):
    """Reformer's hashes are drawn at random, and kept with the weights."""
    model = network("reformer")
    model.save_pretrained(tmp_path)
    loaded = UNEPT.from_pretrained(str(tmp_path)).eval()
    images = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_gradient_of_each_image_by_torch_func(name):
    """As `tests/model/test_capture.py` has it for the network with sparse sampling."""
    attention = build_attention(name, 12, 3, 2, 4)
    tokens, points = torch.randn(2, TOKENS, 12), reference_grid(MAPS, CPU)

    def loss(parameters, tokens):
        out = torch.func.functional_call(attention, parameters, (tokens[None], tokens[None], MAPS, points))
        return out.square().sum()

    parameters = dict(attention.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for i, image in enumerate(tokens):
        wanted = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for name, grad in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[name][i], grad, rtol=1e-4, atol=1e-4)


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention is 'linear'; it must be 'sparse_sampling', 'full', "):
        UNEPT(4, "resnet10t", attention="linear")
    with pytest.raises(ValueError, match="attention is 'linear'; it must be one of sparse_sampling, full, "):
        build_attention("linear", 16, 2, 3, 4)
