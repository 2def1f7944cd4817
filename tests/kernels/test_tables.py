"""Tables for every size of image: made once, bounded, and kept where a CUDA graph reads them."""

import pytest
import torch

import unept.kernels  # noqa: F401  # registers the operators
from unept.kernels import _tables
from unept.kernels._tables import cached_table

CPU = torch.device("cpu")


@pytest.fixture
def table(monkeypatch):
    """A table of n int32, of which 1000 may be kept; and the sizes that were made."""
    monkeypatch.setattr(_tables, "MAX_BYTES", 4000)
    made = []

    @cached_table
    def make(n: int, device: torch.device) -> torch.Tensor:
        made.append(n)
        return torch.full((n,), n, dtype=torch.int32, device=device)

    return make, made


def test_many_sizes_stay_within_the_limit(table):
    make, made = table
    for n in range(1, 200):
        assert torch.equal(make(n, CPU), torch.full((n,), n, dtype=torch.int32))
        assert make.bytes(CPU) <= 4000
    assert made == list(range(1, 200))
    make(199, CPU)
    assert len(made) == 199
    huge = make(5000, CPU)  # more than the limit by itself: kept as long as it is the newest
    assert make(5000, CPU) is huge


def test_what_was_read_last_is_kept(table):
    make, made = table
    make(200, CPU)
    make(700, CPU)
    make(200, CPU)
    make(150, CPU)  # passes the limit
    made.clear()
    for n in (150, 200, 700):
        make(n, CPU)
    assert made == [700]


@pytest.mark.parametrize("op", ["sparse_sampling", "projected_sampling", "boundary_targets"])
def test_operators_with_tables_stay_out_of_cuda_graphs_of_torch_compile(op):
    """Their memory is that of the graph, which is written again by others; a table would outlive it."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.unept, op).default.tags


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_cuda_graph_reads_is_kept(table):
    make, _ = table
    device = torch.device("cuda", 0)
    make(400, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = make(400, device).sum()
    for n in range(300, 320):
        make(n, device)
    graph.replay()
    assert total.item() == 400 * 400
