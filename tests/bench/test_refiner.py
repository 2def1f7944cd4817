"""`bench.refiner` refines another network's predictions, and its table is made of the scores that it measured."""

import sys

import torch

from bench import refiner as bench_refiner
from tests.helpers.runs import small_model
from unept import Refiner
from unept.data.shapes import Shapes


def test_predictions_of_another_network_are_scored_with_and_without_refinement(monkeypatch):
    dataset = Shapes(split="val", size=32)
    monkeypatch.setattr(type(dataset), "__len__", lambda self: 2)
    refiner = Refiner(width=8, hidden=8).eval()
    torch.nn.init.constant_(refiner.boundary_head[-1][0].bias, 10)  # every pixel is at a boundary
    torch.nn.init.normal_(refiner.direction_head[-1][0].weight)
    model = small_model(num_classes=len(dataset.classes))
    results = bench_refiner.measure(model, refiner, dataset)
    assert list(results) == list(bench_refiner.STEPS)
    assert results["unrefined"] != results["best, 2 px"]
    for of in results.values():
        assert 0 <= of["boundary F, 1 px"] <= of["boundary F, 3 px"] <= 1
    text = bench_refiner.table(results)
    assert f"| unrefined | {100 * results['unrefined']['mIoU']:.2f} | " in text


def test_a_network_that_is_not_trained_is_told(tmp_path, monkeypatch, capsys):
    for name, message in (("FPN", "train it first by python -m bench.ablations --only FPN"), ("x", "no training 'x'")):
        arguments = ["--data", str(tmp_path), "--out", str(tmp_path), "--name", name]
        monkeypatch.setattr(sys, "argv", ["bench.refiner", *arguments])
        assert bench_refiner.main() == 2
        assert message in capsys.readouterr().err
