"""Metrics against plain loops over pixels, and against cases counted by hand."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from unept.evaluation.boundary_metrics import BoundaryFScore, BoundaryIoU
from unept.evaluation.metrics import ConfusionMatrix

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def random_maps(generator: torch.Generator, num_classes: int, shape: tuple[int, ...], present: int | None = None):
    """Blobs of classes below `present`, a prediction that is partly right, and 10 % of pixels ignored."""
    batch, height, width = shape
    coarse = torch.randint(present or num_classes, (batch, height // 3 + 1, width // 3 + 1), generator=generator)
    target = coarse.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :height, :width].clone()
    noise = torch.randint(present or num_classes, shape, generator=generator)
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.7, target.roll(1, 2), noise)
    target[torch.rand(shape, generator=generator) < 0.1] = 255
    return prediction, target


def loop_region_scores(prediction: np.ndarray, target: np.ndarray, num_classes: int):
    """(pixAcc, IoU, accuracy) by counting pixel after pixel; NaN where a class does not occur."""
    hits, truth, found = ([0] * num_classes for _ in range(3))
    for p, t in zip(prediction.ravel(), target.ravel(), strict=True):
        if t == 255:
            continue
        truth[t] += 1
        found[p] += 1
        hits[t] += int(p == t)
    iou = [h / (t + f - h) if t + f else math.nan for h, t, f in zip(hits, truth, found, strict=True)]
    accuracy = [h / t if t else math.nan for h, t in zip(hits, truth, strict=True)]
    return sum(hits) / sum(truth), iou, accuracy


def loop_boundary_counts(prediction: np.ndarray, target: np.ndarray, num_classes: int, tolerance: float) -> np.ndarray:
    """(K, 4) predicted boundary pixels, matched, true boundary pixels, matched, by loops over pairs of pixels."""
    counts = np.zeros((num_classes, 4), np.int64)
    for p_map, t_map in zip(prediction, target, strict=True):
        p_map = np.where(t_map == 255, 255, p_map)
        edges = []
        for labels in (p_map, t_map):
            points = {}
            for y, x in np.ndindex(labels.shape):
                neighbours = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                near = {
                    labels[q] for q in neighbours if 0 <= q[0] < labels.shape[0] and 0 <= q[1] < labels.shape[1]
                } - {255}
                if labels[y, x] != 255 and near - {labels[y, x]}:
                    points.setdefault(int(labels[y, x]), []).append((y, x))
            edges.append(points)
        for column, (mine, other) in ((0, edges), (2, edges[::-1])):
            for k, points in mine.items():
                matched = [any(math.dist(p, q) <= tolerance for q in other.get(k, [])) for p in points]
                counts[k, column] += len(points)
                counts[k, column + 1] += sum(matched)
    return counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_confusion_matrix_equals_plain_loops(device, dtype):
    generator = torch.Generator().manual_seed(0)
    metric = ConfusionMatrix(7, device=device)
    batches = [random_maps(generator, 7, (2, 13, 17), present=5) for _ in range(3)]
    for prediction, target in batches:
        metric.update(prediction.to(device, dtype), target.to(device, dtype))
    prediction, target = (torch.cat(maps).numpy() for maps in zip(*batches, strict=True))
    pixel_accuracy, iou, accuracy = loop_region_scores(prediction, target, 7)
    scores = metric.scores()
    assert scores.pixel_accuracy == pytest.approx(pixel_accuracy, abs=1e-6)
    assert scores.iou == pytest.approx(iou, abs=1e-6, nan_ok=True)
    assert scores.accuracy == pytest.approx(accuracy, abs=1e-6, nan_ok=True)
    assert scores.mean_iou == pytest.approx(np.nanmean(iou), abs=1e-6)
    assert scores.mean_accuracy == pytest.approx(np.nanmean(accuracy), abs=1e-6)
    assert math.isnan(scores.iou[5])
    assert math.isnan(scores.iou[6])


def test_confusion_matrix_by_hand():
    # Class 2 is only predicted, class 3 occurs nowhere, the last pixel is ignored.
    target = torch.tensor([0, 0, 0, 1, 1, 255])
    prediction = torch.tensor([0, 0, 1, 1, 2, 0])
    metric = ConfusionMatrix(4)
    metric.update(prediction, target)
    assert metric.matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = metric.scores()
    assert scores.pixel_accuracy == pytest.approx(3 / 5)
    assert scores.iou[:3] == pytest.approx((2 / 3, 1 / 3, 0.0))
    assert math.isnan(scores.iou[3])
    assert scores.mean_iou == pytest.approx((2 / 3 + 1 / 3) / 3)
    assert scores.mean_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_nothing_counted_gives_nan():
    metric = ConfusionMatrix(2)
    metric.update(torch.zeros(4, dtype=torch.int64), torch.full((4,), 255))
    boundary = BoundaryFScore(2)
    boundary.update(torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.int64))
    assert math.isnan(metric.scores().mean_iou)
    assert math.isnan(metric.scores().pixel_accuracy)
    assert math.isnan(boundary.scores().mean_f)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 2, 3])
def test_boundary_counts_equal_plain_loops(device, tolerance):
    generator = torch.Generator().manual_seed(1)
    metric = BoundaryFScore(6, tolerance, device=device)
    expected = np.zeros((6, 4), np.int64)
    for shape in ((2, 12, 15), (1, 1, 14), (1, 9, 2)):
        prediction, target = random_maps(generator, 6, shape, present=5)
        metric.update(prediction.to(device), target.to(device))
        expected += loop_boundary_counts(prediction.numpy(), target.numpy(), 6, tolerance)
    assert metric.counts.tolist() == expected.tolist()
    found, found_matched, truth, truth_matched = expected[:5].T
    precision, recall = found_matched / found, truth_matched / truth
    scores = metric.scores()
    assert scores.f[:5] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert scores.mean_f == pytest.approx(np.mean(scores.f[:5]), abs=1e-6)
    assert math.isnan(scores.f[5])


def loop_band_counts(prediction: np.ndarray, target: np.ndarray, num_classes: int, ratio: float) -> np.ndarray:
    """(K, 3) pixels in the predicted band, in the true one and in both, by loops over pixels and their squares."""
    counts = np.zeros((num_classes, 3), np.int64)
    for p_map, t_map in zip(prediction, target, strict=True):
        height, width = t_map.shape
        distance = max(1, round(float(np.float64(ratio) * np.sqrt(np.float64(height**2 + width**2)))))
        p_map = np.where(t_map == 255, 255, p_map)
        bands = []
        for labels in (p_map, t_map):
            band = set()
            for y, x in np.ndindex(labels.shape):
                if labels[y, x] == 255:
                    continue
                for v in range(y - distance, y + distance + 1):
                    for u in range(x - distance, x + distance + 1):
                        outside = not (0 <= v < height and 0 <= u < width)
                        if outside or labels[v, u] not in (255, labels[y, x]):
                            band.add((y, x, int(labels[y, x])))
            bands.append(band)
        for column, band in enumerate((*bands, bands[0] & bands[1])):
            for _, _, k in band:
                counts[k, column] += 1
    return counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0.02, 0.08, 0.15])
def test_boundary_iou_equals_plain_loops(device, ratio):
    generator = torch.Generator().manual_seed(2)
    metric = BoundaryIoU(6, ratio, device=device)
    expected = np.zeros((6, 3), np.int64)
    for shape in ((2, 13, 17), (1, 1, 14), (1, 9, 2)):
        prediction, target = random_maps(generator, 6, shape, present=5)
        prediction, target = (m.repeat_interleave(2, 1).repeat_interleave(2, 2) for m in (prediction, target))
        metric.update(prediction.to(device), target.to(device))
        expected += loop_band_counts(prediction.numpy(), target.numpy(), 6, ratio)
    assert metric.counts.tolist() == expected.tolist()
    predicted, true, both = expected[:5].astype(np.float64).T
    scores = metric.scores()
    assert scores.iou[:5] == pytest.approx(both / (predicted + true - both), abs=1e-12)
    assert scores.mean_iou == pytest.approx(np.mean(scores.iou[:5]), abs=1e-12)
    assert math.isnan(scores.iou[5])


def test_boundary_iou_by_hand():
    """100x100 pixels: bands of 3. The edge is predicted 1 pixel to the right."""
    target = torch.zeros(1, 100, 100, dtype=torch.int64)
    target[..., 50:] = 1
    prediction = torch.zeros_like(target)
    prediction[..., 51:] = 1
    metric = BoundaryIoU(2)
    metric.update(prediction, target)
    true = 100 * 50 - 94 * 44  # a frame of 3 pixels of each half
    predicted = 100 * 51 - 94 * 45
    both = true - 94  # the column at distance 3 left of the true edge is not in the predicted band
    assert metric.counts[0].tolist() == [predicted, true, both]
    assert metric.scores().iou[0] == pytest.approx(both / (predicted + true - both))
    with pytest.raises(ValueError, match="dilation_ratio is 0"):
        BoundaryIoU(2, 0)


@pytest.mark.parametrize(("shift", "tolerance", "f"), [(0, 0, 1.0), (1, 0, 0.0), (1, 1, 1.0), (3, 2, 0.0), (3, 3, 1.0)])
def test_a_shifted_edge_matches_within_the_tolerance(shift, tolerance, f):
    target = torch.zeros(1, 10, 20, dtype=torch.int64)
    target[..., 10:] = 1
    prediction = torch.zeros_like(target)
    prediction[..., 10 + shift :] = 1
    metric = BoundaryFScore(2, tolerance)
    metric.update(prediction, target)
    assert metric.scores().f == (f, f)


def test_the_tolerance_is_a_disk():
    # One pixel against one pixel, (2, 2) apart: further than 2, though a square of reach 2 would hold it.
    target, prediction = (torch.zeros(1, 9, 9, dtype=torch.int64) for _ in range(2))
    target[0, 3, 3] = prediction[0, 5, 5] = 1
    for tolerance, matched in ((2, 0), (2.9, 1)):
        metric = BoundaryFScore(2, tolerance)
        metric.update(prediction, target)
        assert metric.counts[1].tolist() == [1, matched, 1, matched]


def test_ignored_pixels_never_count_for_boundaries():
    target = torch.zeros(1, 8, 12, dtype=torch.int64)
    target[..., 6:] = 1
    target[..., 5:7] = 255  # the only edge is hidden
    prediction = torch.randint(2, (1, 8, 12))
    prediction[..., :5] = 0
    prediction[..., 7:] = 1
    metric = BoundaryFScore(2, 3)
    metric.update(prediction, target)
    assert metric.counts.sum() == 0


def test_a_missed_and_an_invented_class_score_zero():
    target, prediction = (torch.zeros(1, 12, 12, dtype=torch.int64) for _ in range(2))
    target[0, 2:5, 2:5] = 1
    prediction[0, 8:11, 8:11] = 2
    metric = BoundaryFScore(4, 1)
    metric.update(prediction, target)
    scores = metric.scores()
    assert scores.f[:3] == (0.0, 0.0, 0.0)
    assert scores.mean_f == 0.0
    assert math.isnan(scores.f[3])


def make_metrics():
    return [ConfusionMatrix(3), BoundaryFScore(3)]


def counts_of(metric):
    return metric.matrix if isinstance(metric, ConfusionMatrix) else metric.counts


def test_counts_of_two_processes_add_up():
    prediction, target = random_maps(torch.Generator().manual_seed(2), 3, (4, 11, 9))
    for whole, first, second in zip(make_metrics(), make_metrics(), make_metrics(), strict=True):
        whole.update(prediction, target)
        first.update(prediction[:3], target[:3])
        second.update(prediction[3:], target[3:])
        counts_of(first).add_(counts_of(second))  # what all_reduce does, in place
        assert first.scores() == whole.scores()


@pytest.mark.parametrize("metric", make_metrics(), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(("prediction", "target"), [(3, 0), (-1, 0), (0, 3)])
def test_an_id_outside_the_classes_is_an_error(metric, prediction, target):
    metric = type(metric)(3)
    metric.update(torch.full((1, 2, 2), prediction), torch.full((1, 2, 2), target))
    with pytest.raises(ValueError, match=r"4 pixels .* outside 0\.\.2"):
        metric.scores()


@pytest.mark.parametrize("metric", make_metrics(), ids=lambda m: type(m).__name__)
def test_bad_inputs(metric):
    ids = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"prediction has dtype torch\.float32"):
        metric.update(ids.float(), ids)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) and target \(1, 2, 4\)"):
        metric.update(ids, ids[:, :2])
    with pytest.raises(ValueError, match="must be on one device"):
        metric.update(ids.to("meta"), ids)
    with pytest.raises(ValueError, match="tolerance is -1"):
        BoundaryFScore(2, -1)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        BoundaryFScore(2).update(ids[0, 0], ids[0, 0])


@pytest.mark.parametrize("metric", [ConfusionMatrix, BoundaryFScore])
def test_update_does_not_wait_for_the_gpu(metric):
    # Fake tensors have no values: whatever would have to read one on the host raises.
    with FakeTensorMode():
        counting = metric(3, device="cuda")
        ids = torch.empty(1, 16, 16, dtype=torch.int64, device="cuda")
        counting.update(ids, ids)
        with pytest.raises(DataDependentOutputException):
            counting.scores()
