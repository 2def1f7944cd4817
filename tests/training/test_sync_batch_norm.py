"""Synchronised batch normalisation: equal to one process's, one collective per layer and direction, one graph."""

import collections
import copy

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, EagerAndRecordGraphs
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.runs import small_model
from unept.sync_batch_norm import SYNCHRONISED, synchronise


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_norms(dtype=torch.float64, momentum=0.1):
    """Three layers, and the same ones synchronised."""
    plain = nn.Sequential(nn.BatchNorm2d(6, momentum=momentum), nn.Conv2d(6, 6, 1), BatchNormAct2d(6)).to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    synchronised = copy.deepcopy(plain)
    synchronise(synchronised)
    return plain, synchronised


def results(model, images):
    """Output, gradients and buffers after a step."""
    images = images.clone().requires_grad_()
    output = model(images)
    (output**3).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output, "images": images.grad, **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_equals_torch_s_on_the_whole_batch(momentum):
    plain, synchronised = make_norms(momentum=momentum)
    for _ in range(2):
        images = torch.randn(3, 6, 5, 4, dtype=torch.float64) * 3 + 2
        torch.testing.assert_close(results(synchronised, images), results(plain, images), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(synchronised.eval()(images), plain.eval()(images))


def test_a_mean_far_from_zero_leaves_the_variance_its_digits():
    plain, synchronised = make_norms(torch.float32)
    images = torch.randn(3, 6, 16, 16) + 3000
    for model in (plain, synchronised):
        model[0].running_mean.fill_(2999.0)
    torch.testing.assert_close(synchronised[0](images), plain[0](images), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=["plain", "untracked"])
def test_layers_without_weights_or_running_statistics(options):
    plain = nn.BatchNorm2d(6, **options).double()
    synchronised = copy.deepcopy(plain)
    synchronise(synchronised)
    assert type(synchronised) is not type(plain)
    images = torch.randn(3, 6, 5, 4, dtype=torch.float64) + 3
    for _ in range(2):
        wanted, found = results(plain, images), results(synchronised, images)
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=name)


class Collectives(TorchDispatchMode):
    """Counts collectives, and whatever reads a number from the device."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "all_reduce" in name or "all_gather" in name or "_local_scalar_dense" in name or "nonzero" in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_one_collective_per_layer_and_direction_and_no_wait_of_the_host():
    model = make_norms(momentum=None)[1]
    images = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    with Collectives() as forward:
        output = model(images)
    with Collectives() as backward:
        output.sum().backward()
    for found in (forward.counts, backward.counts):
        assert found == {"_c10d_functional.all_reduce.default": 2}


def test_compiles_to_one_graph():
    eager = make_norms()[1]
    compiled = copy.deepcopy(eager)
    images = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    expected = results(eager, images)
    found = results(torch.compile(compiled, fullgraph=True, backend="aot_eager"), images)
    for (name, want), value in zip(expected.items(), found.values(), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-10, msg=name)


class Network(nn.Module):
    """Layers in a module whose forward Dynamo traces; that of `nn.Sequential` it skips, as what DDP calls."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, images):
        return self.layers(images)


def collectives_of(graphs) -> list[int]:
    """The number of all-reduces in each graph."""
    return [sum("all_reduce" in str(node.target) for node in graph.graph.nodes) for graph in graphs]


def train_compiled(model, images):
    """A step of the model as the trainer compiles it: the graphs of the forward and of the backward, and the output."""
    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    output = torch.compile(DistributedDataParallel(model, gradient_as_bucket_view=True), backend=backend)(images)
    output.pow(3).mean().backward()
    return backend, output


def test_what_the_trainer_compiles_is_one_graph_with_one_collective_per_layer_and_direction():
    eager = make_norms()[1]
    compiled, images = Network(copy.deepcopy(eager)), torch.randn(3, 6, 5, 4, dtype=torch.float64)
    expected = results(eager, images)
    backend, output = train_compiled(compiled, images)
    assert collectives_of(backend.fw_graphs) == [2]
    assert collectives_of(backend.bw_graphs) == [2]
    torch.testing.assert_close(output, expected["output"], rtol=1e-9, atol=1e-10)
    for name, parameter in compiled.layers.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_the_network_is_compiled_to_one_graph():
    model, backend = small_model().train(), EagerAndRecordGraphs()
    synchronise(model)
    layers = sum(isinstance(module, tuple(SYNCHRONISED.values())) for module in model.modules())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=False):  # which cuts the graph at the buckets of gradients
        network = torch.compile(DistributedDataParallel(model, gradient_as_bucket_view=True), backend=backend)
        network(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    (graph,) = backend.graphs
    assert layers > 10
    assert sum("autograd_function_apply" in str(node.target) for node in graph.graph.nodes) == layers
