"""Dropout on a CPU: PyTorch's in distribution, from its generator, and its own operator where it is compiled."""

import pytest
import torch

from unept.model.dropout import Dropout

COUNT = 1 << 20


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_scale_and_independence(p, dtype):
    out = Dropout(p)(torch.ones(COUNT, dtype=dtype))
    kept = (out != 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / COUNT**0.5 + 2**-17  # p has 16 bits
    assert torch.equal(out[out != 0].unique(), torch.tensor([1 / (1 - round(p * 65536) / 65536)], dtype=dtype))
    for lag in (1, 2, 3, 4, 5):  # four elements share a word
        correlation = ((kept[lag:] - (1 - p)) * (kept[:-lag] - (1 - p))).mean() / deviation**2
        assert abs(correlation) < 5 / COUNT**0.5, lag


def test_gradient_and_generator():
    x = torch.randn(5, 7, 3, requires_grad=True)
    layer = Dropout(0.3)
    torch.manual_seed(3)
    out = layer(x.transpose(0, 1))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad.transpose(0, 1) * x.transpose(0, 1), out)
    torch.manual_seed(3)
    assert torch.equal(layer(x.transpose(0, 1)), out)
    assert not torch.equal(layer(x.transpose(0, 1)), out)


def test_nothing_is_dropped_in_evaluation_nor_of_nothing():
    x = torch.randn(5, 3)
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(5, 3))
    assert Dropout(0.3)(x[:0]).shape == (0, 3)


def test_compiled_it_is_the_operator_of_pytorch():
    from torch._dynamo.testing import EagerAndRecordGraphs

    backend = EagerAndRecordGraphs()
    torch.compile(Dropout(0.3), backend=backend, fullgraph=True)(torch.randn(5, 3))
    (graph,) = backend.graphs
    assert any("dropout" in str(node.target) for node in graph.graph.nodes)
