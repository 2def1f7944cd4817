"""The learning rates of the paper's recipe, the fused optimiser of a GPU, and the average of the weights."""

import pytest
import torch

from unept.config import TrainConfig
from unept.training.optimizer import (
    AverageOfWeights,
    build_optimizer,
    build_scheduler,
    learning_rate_factor,
    restore_optimizer,
)


def test_learning_rates_follow_the_paper():
    """1e-4 and 1e-5 for the backbone, a tenth after two thirds."""
    config = TrainConfig(iterations=90)
    model = torch.nn.Module()
    model.backbone, model.rest = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, config)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-5]
    assert optimizer.param_groups[1]["params"] == list(model.backbone.parameters())
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4]
    factors = [learning_rate_factor(config, step) for step in range(90)]
    assert factors == [1.0] * 60 + [0.1] * 30
    warm = [learning_rate_factor(TrainConfig(iterations=90, warmup=10), step) for step in range(11)]
    assert warm == pytest.approx([i / 10 for i in range(1, 11)] + [1.0])
    cosine = TrainConfig(iterations=90, schedule="cosine")
    assert learning_rate_factor(cosine, 45) == pytest.approx(0.5)


def test_the_optimiser_is_fused_on_a_gpu(monkeypatch):
    """PyTorch has the fused AdamW for CPUs too, on which weights that say they are on a GPU are here."""
    config = TrainConfig(iterations=90)

    def train(on_gpu: list[bool]) -> tuple:
        torch.manual_seed(0)
        model = torch.nn.Module()
        model.backbone, model.rest = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        flags = dict(zip(map(id, model.parameters()), on_gpu, strict=True))
        monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda p: flags.get(id(p), False)), raising=False)
        optimizer = build_optimizer(model, config)
        monkeypatch.undo()
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return model, optimizer

    plain, unfused = train([False] * 4)
    assert {group["fused"] for group in unfused.param_groups} == {None}
    assert {group["fused"] for group in train([True] * 3 + [False])[1].param_groups} == {None}
    model, optimizer = train([True] * 4)
    assert {group["fused"] for group in optimizer.param_groups} == {True}
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    # A run that is continued on another device keeps its moments, and not how they were computed.
    restore_optimizer(optimizer, build_scheduler(optimizer, config), unfused.state_dict(), 3)
    assert {group["fused"] for group in optimizer.param_groups} == {True}
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_average_follows_the_weights():
    """The first updates forget the random start; later ones decay as asked for; counters are copied."""
    model = torch.nn.BatchNorm1d(2)
    averaged = AverageOfWeights(model, 0.5)
    history = []
    for n, value in enumerate([1.0, 2.0, 5.0, -3.0]):
        torch.nn.init.constant_(model.weight, value)
        model.num_batches_tracked.fill_(n)
        averaged.update_parameters(model)
        history.append(averaged.module.weight[0].item())
    expected = [1.0]
    for n, value in enumerate([2.0, 5.0, -3.0], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected.append(decay * expected[-1] + (1 - decay) * value)
    assert history == pytest.approx(expected)
    assert averaged.module.num_batches_tracked == 3


def test_the_average_does_not_wait_for_the_device():
    """Nothing can be read from the device meta; on a GPU it would be waited for, once for each weight."""
    model = torch.nn.BatchNorm2d(1).to("meta")
    averaged = AverageOfWeights(model, 0.5)
    for _ in range(3):
        averaged.update_parameters(model)
    assert averaged.n_averaged == 3
