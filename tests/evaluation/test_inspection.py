"""Calibration against a formula, and the table of classes as other tools read it."""

import csv
import math

import pytest
import torch

from unept.evaluation.counts import bincount, binsum
from unept.evaluation.inspection import Calibration, write_class_table


def test_calibration_is_that_of_a_loop_over_the_pixels():
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(2, 13, 11, generator=generator)
    target = torch.randint(0, 3, (2, 13, 11), generator=generator)
    target[0, :2] = 255
    prediction = torch.where(torch.rand(2, 13, 11, generator=generator) < confidence, target, (target + 1) % 3)
    confidence[1, 0, :2] = torch.tensor([0.0, 1.0])
    calibration = Calibration(num_bins=10)
    for image in range(2):
        calibration.update(prediction[image], confidence[image], target[image])
    scores = calibration.scores()
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(10)]
    for c, p, t in zip(confidence.flatten().tolist(), prediction.flatten(), target.flatten(), strict=True):
        if t != 255:
            bins[min(int(c * 10), 9)].append((c, bool(p == t)))
    total = sum(map(len, bins))
    gaps = [abs(sum(c for c, _ in b) - sum(right for _, right in b)) for b in bins]
    assert scores.ece == pytest.approx(sum(gaps) / total)
    assert scores.share == pytest.approx([len(b) / total for b in bins])
    assert scores.accuracy[4] == pytest.approx(sum(right for _, right in bins[4]) / len(bins[4]))
    assert scores.confidence[4] == pytest.approx(sum(c for c, _ in bins[4]) / len(bins[4]))


def test_calibration_of_bins_without_pixels():
    calibration = Calibration(num_bins=2)
    assert math.isnan(calibration.scores().ece)
    calibration.update(torch.tensor([0, 1]), torch.tensor([0.75, 0.75]), torch.tensor([0, 0]))
    scores = calibration.scores()
    assert scores.ece == pytest.approx(0.25)
    assert math.isnan(scores.accuracy[0])
    assert scores.share == (0, 1)
    with pytest.raises(ValueError, match=r"confidence \(3,\)"):
        calibration.update(torch.tensor([0, 1]), torch.rand(3), torch.tensor([0, 0]))


def test_table_of_classes(tmp_path):
    scores = {name: [0.5, math.nan] for name in ("iou", "accuracy", "class_boundary_f", "class_boundary_iou")}
    write_class_table(scores | {"share": [0.25, 0.75]}, ['a "wide", road', "sky"], tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["class"], first["IoU"], first["share of pixels"]) == ('a "wide", road', "0.500000", "0.250000")
    assert (second["id"], second["IoU"]) == ("1", "")


@pytest.mark.parametrize("copies", [None, 1, 3, 256])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_sums_by_bin_are_those_of_a_loop(copies, dtype):
    """In any number of copies, as they are spread on a GPU; what lies in the last bin is not summed."""
    bins = torch.randint(0, 5, (13, 11))
    values = torch.randint(-50, 50, (13, 11)).to(dtype)
    expected = torch.stack([values[bins == k].sum() for k in range(4)])
    assert torch.equal(binsum(bins, values, 4, copies), expected)
    assert torch.equal(bincount(bins, 4, copies), torch.stack([(bins == k).sum() for k in range(4)]))


def test_calibration_does_not_wait_for_the_device():
    """Sizes that depend on values, as a boolean mask gives them, are what a tensor without values cannot have."""
    calibration = Calibration(device="meta")
    ids, confidence = torch.zeros(5, 7, dtype=torch.int64, device="meta"), torch.zeros(5, 7, device="meta")
    calibration.update(ids, confidence, ids)
    assert calibration.sums.shape == (3, 15)
