"""Synchronised batch normalisation: equal to one process's, one collective per layer and direction, one graph."""

import collections
import copy

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unept.sync_batch_norm import synchronise


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
