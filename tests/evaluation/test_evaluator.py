"""Scores and tables of known predictions."""

import math

import pytest
import torch

from tests.helpers.known_scores import Halves, Shifted, Unlike
from unept.data import DatasetError
from unept.evaluation.evaluator import evaluate_model, format_table
from unept.evaluation.inspection import Inspection
from unept.inference import InferenceConfig
from unept.pictures import drawing
from unept.pictures.figures import draw_samples


def scores_of_shifted(**options) -> dict:
    config = InferenceConfig(**options)
    return evaluate_model(Shifted(), Halves(), config, torch.device("cpu"), boundary_tolerance=3)


def test_scores_of_a_known_prediction():
    scores = scores_of_shifted()
    # In 31 counted columns the truth's edge is at 16; the prediction's at 20, read 1 pixel to the left at 21.
    assert scores["pixAcc_unrefined"] == pytest.approx(27 / 31)
    assert scores["pixAcc"] == pytest.approx(26 / 31)
    assert scores["mIoU_unrefined"] == pytest.approx((15 / 19 + 12 / 16) / 2)
    assert scores["mIoU"] == pytest.approx((15 / 20 + 11 / 16) / 2)
    assert scores["iou"][:2] == pytest.approx([15 / 20, 11 / 16])
    assert scores["accuracy"][:2] == pytest.approx([1, 11 / 16])
    assert math.isnan(scores["iou"][2])
    assert scores["share"] == pytest.approx([15 / 31, 16 / 31, 0])
    assert scores["left_out"] == ["nowhere"]
    assert (scores["images"], scores["boundary_tolerance"]) == (3, 3)
    # Boundary columns of the truth 15 | 16, of the prediction 19 | 20: 4 off; tolerance 4 finds them.
    assert scores["boundary_f_unrefined"] == 0
    near = evaluate_model(Shifted(), Halves(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=4)
    assert (near["boundary_f_unrefined"], near["boundary_f"]) == (1, 0)
    both = evaluate_model(Shifted(), Halves(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=(3, 4, 5))
    assert (both["boundary_f_4px_unrefined"], both["boundary_f_4px"], both["boundary_f_5px"]) == (1, 0, 1)
    assert all(str(both[name]) == str(score) for name, score in scores.items() if name != "images_per_s")  # NaN too
    assert "boundary F, 4 px        0.00      100.00" in format_table(both, Halves.classes)
    # The bands are 1 pixel wide. Top and bottom row and a column at the edge: 44 pixels of the true left, 52 of the
    # predicted, 30 in both; the right has another column at the edge of the image: 60, 52, 38.
    assert scores["boundary_iou_unrefined"] == pytest.approx((30 / (44 + 52 - 30) + 38 / (60 + 52 - 38)) / 2)
    assert scores["class_boundary_iou"][:2] == pytest.approx([30 / (44 + 54 - 30), 36 / (60 + 50 - 36)])


def test_options_reach_the_prediction():
    assert scores_of_shifted(refine_scale=4)["pixAcc"] == pytest.approx(23 / 31)
    without = scores_of_shifted(refine=False)
    assert without["pixAcc"] == without["pixAcc_unrefined"] == pytest.approx(27 / 31)


def test_inspection_of_a_known_prediction():
    inspection = Inspection(3)
    config = InferenceConfig()
    evaluate_model(Shifted(), Unlike(), config, torch.device("cpu"), boundary_tolerance=3, inspection=inspection)
    # The truth's edges are at 17, 20 and 29, the refined prediction's at 21: in 31 counted columns of 16 rows.
    assert inspection.matrix.tolist() == [
        [16 * (16 + 19 + 20), 16 * 8, 0],
        [16 * (4 + 1), 16 * (11 + 11 + 3), 0],
        [0] * 3,
    ]
    means = [(16 / 20 + 11 / 15) / 2, (19 / 20 + 11 / 12) / 2, (20 / 28 + 3 / 11) / 2]
    assert [image.index for image in inspection.images] == [0, 1, 2]
    assert [image.mean_iou for image in inspection.images] == pytest.approx(means)
    assert [image.index for image in inspection.worst(2)] == [2, 0]
    assert inspection.calibration.sums[0].sum() == 3 * 16 * 31


class Second(Halves):
    """Its first image cannot be read."""

    def __getitem__(self, i):
        if i == 0:
            raise DatasetError("the first image is damaged")
        return super().__getitem__(i)


def test_inspection_numbers_images_as_the_data_set_does():
    inspection = Inspection(3)
    options = {"boundary_tolerance": 3, "on_bad_sample": "skip", "inspection": inspection}
    evaluate_model(Shifted(), Second(), InferenceConfig(), torch.device("cpu"), **options)
    assert [image.index for image in inspection.images] == [1, 2]


class Unlabelled(Halves):
    labelled = False


def test_images_without_labels_are_refused():
    message = r"Unlabelled, 3 classes: this split has images without labels.*python -m unept.predict"
    with pytest.raises(ValueError, match=message):
        evaluate_model(Shifted(), Unlabelled(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=3)


def test_one_forward_pass_an_image():
    model = Shifted()
    evaluate_model(model, Halves(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=3)
    assert model.calls == 3


def test_table():
    scores = scores_of_shifted() | {"images_per_s": 12.34}
    table = format_table(scores, Halves.classes).splitlines()
    assert table[2].split() == [
        "left",
        "75.00",
        "100.00",
        "0.00",
        f"{100 * scores['class_boundary_iou'][0]:.2f}",
        "48.39",
    ]
    assert table[4].split() == ["nowhere", "-", "-", "-", "-", "0.00"]
    assert len({len(line) for line in table[:6]}) == 1
    assert table[7].split() == ["mIoU", "71.88", "76.97"]
    note = "boundary F within 3 px, boundary IoU within 2 % of the diagonal"
    assert table[-2].startswith(f"Halves, 3 classes. All in percent; {note}; 3 images, 12.3 images/s")
    assert table[-1].startswith("mIoU leaves out 1 of 3 classes, found neither in the labels nor in the predictions")
    complete = format_table(scores | {"left_out": []}, Halves.classes).splitlines()
    assert complete == table[:-1]


def test_samples_are_spread_over_the_data_set(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "sample_panel", lambda samples, *_: drawn.extend(samples))
    draw_samples(Shifted(), Halves(), 2, InferenceConfig(), torch.device("cpu"), tmp_path / "x.png")
    assert [sample.name for sample in drawn] == ["half0", "half1"]
    assert (drawn[0].prediction[0] == 0).sum() == 20
    assert (drawn[0].refined[0] == 0).sum() == 21
    assert drawn[0].boundary.shape == (16, 32)
    torch.testing.assert_close(drawn[0].boundary, torch.full((16, 32), 5.0).sigmoid())


def test_classes_in_another_order():
    model = Shifted()
    model.classes = ["right", "left", "nowhere"]
    with pytest.raises(ValueError, match="its 'right' stands where the data set has 'left'"):
        evaluate_model(model, Halves(), InferenceConfig(), torch.device("cpu"), boundary_tolerance=3)
