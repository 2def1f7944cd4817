"""Formats read back as other tools read them: every pixel has its class again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.helpers.runs import CLASSES, PALETTE, small_model
from unept.inference import InferenceConfig, infer, read_prediction
from unept.outputs.formats import Result, Writer, read_probabilities, regions

# A region with a hole in which there are two others, one of them with a hole of its own.
IDS = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0, 1],
        [0, 2, 2, 2, 2, 0, 1],
        [0, 2, 1, 1, 2, 0, 1],
        [0, 2, 1, 1, 2, 1, 1],
        [0, 2, 2, 2, 2, 0, 2],
        [0, 0, 0, 0, 0, 0, 0],
    ]
)


@pytest.fixture
def result(tmp_path):
    image = torch.zeros(3, *IDS.shape, dtype=torch.uint8)
    (tmp_path / "photos").mkdir()
    return Result(tmp_path / "photos" / "beach.jpg", image, IDS, torch.full((3, *IDS.shape), 1 / 3), Path("beach"))


def write(result, tmp_path, *formats):
    return Writer(formats, tmp_path, CLASSES, PALETTE).write(result)


def test_coco(result, tmp_path):
    writer = Writer(["coco"], tmp_path, CLASSES, PALETTE)
    assert writer.write(result) == writer.write(result._replace(ids=torch.full((2, 3), 2))) == []
    (path,) = writer.finish()
    record = json.loads(path.read_text())
    assert [image["height"] for image in record["images"]] == [6, 2]
    assert {category["id"]: category["name"] for category in record["categories"]} == {1: "sky", 2: "sea", 3: "sand"}
    found = np.zeros((6, 7), dtype=int)
    for annotation in (a for a in record["annotations"] if a["image_id"] == 1):
        height, width = annotation["segmentation"]["size"]
        pixels = [i % 2 for i, count in enumerate(annotation["segmentation"]["counts"]) for _ in range(count)]
        mask = np.array(pixels).reshape(width, height).T
        found += mask * annotation["category_id"]
        assert annotation["area"] == mask.sum()
        left, top, columns, rows = annotation["bbox"]
        assert mask[top : top + rows, left : left + columns].sum() == mask.sum()
        assert mask[top].any()
        assert mask[:, left].any()
        assert mask[top + rows - 1].any()
    assert np.array_equal(found - 1, IDS.numpy())
    assert [a["segmentation"]["counts"] for a in record["annotations"] if a["image_id"] == 2] == [[0, 6]]


def test_labelme_painted_in_its_order_gives_the_ids(result, tmp_path):
    pytest.importorskip("rasterio")
    (path,) = write(result, tmp_path, "labelme")
    record = json.loads(path.read_text())
    assert (record["imagePath"], record["imageHeight"], record["imageWidth"]) == ("photos/beach.jpg", 6, 7)
    scale = 8  # outlines run between pixels: paint them large and look at the middle of each pixel
    canvas = Image.new("L", (7 * scale, 6 * scale), 9)
    for shape in record["shapes"]:
        assert shape["shape_type"] == "polygon"
        points = [(x * scale, y * scale) for x, y in shape["points"]]
        ImageDraw.Draw(canvas).polygon(points, fill=CLASSES.index(shape["label"]))
    middle = np.asarray(canvas)[scale // 2 :: scale, scale // 2 :: scale]
    assert np.array_equal(middle, IDS.numpy())


def test_polygons(result, tmp_path):
    pytest.importorskip("rasterio")
    (path,) = write(result, tmp_path, "polygons")
    features = json.loads(path.read_text())["features"]
    areas = np.zeros(3)
    for feature in features:
        name, k = feature["properties"]["class"], feature["properties"]["id"]
        assert name == CLASSES[k]
        for i, ring in enumerate(feature["geometry"]["coordinates"]):
            assert ring[0] == ring[-1]
            x, y = np.array(ring[:-1]).T
            area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
            areas[k] += -area if i else area
    assert areas.tolist() == torch.bincount(IDS.flatten()).tolist()
    assert len(features) == len(list(regions(IDS))) == 5


def test_polygons_of_more_than_256_classes():
    pytest.importorskip("rasterio")
    ids = torch.tensor([[7, 7, 263, 263]])
    assert sorted(k for k, _ in regions(ids)) == [7, 263]


def test_a_missing_package_is_one_clear_line(result, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(ValueError, match=r"a polygon needs the package rasterio .*: pip install rasterio$"):
        write(result, tmp_path, "polygons")
    write(result, tmp_path, "ids", "overlay", "coco", "probabilities")


def test_probabilities(result, tmp_path):
    (path,) = write(result, tmp_path, "probabilities")
    stored = np.load(path)
    assert stored["probabilities"].shape == (3, 6, 7)
    assert stored["probabilities"].dtype == np.float16
    assert stored["classes"].tolist() == CLASSES


@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_are_those_that_the_ids_are_read_from(flip):
    image = torch.randint(0, 256, (3, 37, 50), dtype=torch.uint8)
    model, config = small_model(), InferenceConfig(flip=flip, refine_scale=3)
    output = infer(model, image, config)
    ids, confidence = read_prediction(output, (37, 50), config)
    probabilities = read_probabilities(output, (37, 50), config)
    assert probabilities.shape == (1, 3, 37, 50)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 37, 50))
    torch.testing.assert_close(probabilities.gather(1, ids[:, None])[:, 0], confidence)
    torch.testing.assert_close(probabilities.amax(1), confidence)
