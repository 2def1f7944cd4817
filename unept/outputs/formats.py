"""Segmented images as files: class ids, overlays, probabilities, GeoJSON, COCO and LabelMe.

Letters: H, W height and width of an image, K number of classes. Polygons run along the edges of pixels: pixel (x, y)
covers x to x + 1 and y to y + 1, with y downwards.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..colors import Palette, overlay, save_palette_png, save_picture, to_pil
from ..files import result_path, temporary_file, write_json
from ..inference import InferenceConfig
from ..model.output import AveragedOutput, DenseOutput, padded_size, read_offset
from ..optional import require

Format = Literal["ids", "overlay", "probabilities", "polygons", "coco", "labelme"]
NEED_POLYGONS = ("polygons", "labelme")


class Result(NamedTuple):
    """A segmented image. Tensors are on the CPU."""

    file: Path
    """The file of the image."""
    image: Tensor
    """uint8 (3, H, W), RGB."""
    ids: Tensor
    """(H, W): class ids."""
    probabilities: Tensor | None
    """(K, H, W) of the classes; None where no format needs it."""
    name: Path
    """What its results are called, below the folder for them."""


def check_packages(formats: Sequence[Format]) -> None:
    """Raise ValueError if a format needs a package that is not installed."""
    if any(name in NEED_POLYGONS for name in formats):
        require("rasterio", "a polygon")


class Writer:
    """Write segmented images in several formats into a folder.

    Args:
        formats: the names of the formats.
        out: the folder, which exists.
        classes: the K class names.
        palette: the K colors.
        alpha: weight of the colors in the overlay, from 0 to 1.

    Raises:
        ValueError: a format needs a package that is not installed.
    """

    def __init__(
        self, formats: Sequence[Format], out: Path, classes: Sequence[str], palette: Palette, alpha: float = 0.5
    ):
        self.formats, self.out, self.classes, self.palette, self.alpha = formats, out, classes, palette, alpha
        self._coco = CocoFile(classes)
        check_packages(formats)

    @property
    def needs_probabilities(self) -> bool:
        """Whether `Result.probabilities` is written."""
        return "probabilities" in self.formats

    def write(self, result: Result) -> list[Path]:
        """Write an image in every format but coco; gives the files, in the order of the formats.

        What coco says of it is kept for `finish`.
        """
        if "coco" in self.formats:
            self._coco.add(result)
        return [self._write_one[name](self, result) for name in self.formats if name != "coco"]

    def finish(self) -> list[Path]:
        """Write the files that hold all images; gives them."""
        if "coco" not in self.formats:
            return []
        path = self.out / "coco.json"
        write_json(path, self._coco.record)
        return [path]

    def _path(self, result: Result, ending: str) -> Path:
        return result_path(self.out, result.name, ending)

    def _ids(self, result: Result) -> Path:
        path = self._path(result, "ids.png")
        save_palette_png(result.ids, self.palette, path)
        return path

    def _overlay(self, result: Result) -> Path:
        path = self._path(result, "overlay.png")
        save_picture(to_pil(overlay(result.image, result.ids, self.palette, self.alpha)), path)
        return path

    def _probabilities(self, result: Result) -> Path:
        path = self._path(result, "probabilities.npz")
        assert result.probabilities is not None
        with temporary_file(path) as temporary:
            np.savez_compressed(
                temporary, probabilities=result.probabilities.half().numpy(), classes=np.array(self.classes)
            )
        return path

    def _polygons(self, result: Result) -> Path:
        path = self._path(result, "polygons.geojson")
        features = [
            {"type": "Feature", "properties": {"id": k, "class": self.classes[k]}, "geometry": geometry}
            for k, geometry in regions(result.ids)
        ]
        write_json(path, {"type": "FeatureCollection", "features": features})
        return path

    def _labelme(self, result: Result) -> Path:
        path = self._path(result, "labelme.json")
        write_json(path, labelme_record(result, self.classes, path.parent))
        return path

    _write_one: ClassVar[dict[str, Callable[["Writer", Result], Path]]] = {
        "ids": _ids,
        "overlay": _overlay,
        "probabilities": _probabilities,
        "polygons": _polygons,
        "labelme": _labelme,
    }


def read_probabilities(output: DenseOutput, size: Sequence[int], config: InferenceConfig) -> Tensor:
    """Probability of every class of every pixel, read where the class ids of the pixel are read.

    Unlike class ids, they are held at full resolution, with K float32 numbers per pixel.

    Args:
        output: maps of any resolution (`unept.inference.infer`).
        size: (H, W) of the images.
        config: how boundary pixels are refined.

    Returns:
        (B, K, H, W) float32; they sum to 1 over the classes.
    """
    height, width = padded = padded_size(size)
    maps = F.interpolate(output.scores.float(), padded, mode="bilinear", align_corners=False)
    offset = read_offset(output, padded, config.refinement)
    if offset is not None:
        x, y = torch.arange(width, device=maps.device), torch.arange(height, device=maps.device)[:, None]
        columns, rows = (x + offset[:, 0]).clamp(0, width - 1), (y + offset[:, 1]).clamp(0, height - 1)
        places = (rows * width + columns).flatten(1)[:, None].expand(-1, maps.shape[1], -1)
        maps = maps.flatten(2).gather(2, places).view_as(maps)
    maps = maps[..., : size[0], : size[1]]
    return maps if isinstance(output, AveragedOutput) else maps.softmax(dim=1)


def regions(ids: Tensor) -> Iterator[tuple[int, dict[str, Any]]]:
    """The connected regions of class ids (H, W): each one's class id and its polygon, a geometry of GeoJSON.

    Pixels that share a side are connected. The first ring of the polygon is the outline, the others are holes.

    Raises:
        ValueError: rasterio is not installed.
    """
    features = require("rasterio.features", "a polygon")
    for geometry, value in features.shapes(ids.to(torch.int32).numpy(), connectivity=4):
        rings = [[list(point) for point in ring] for ring in geometry["coordinates"]]
        yield int(value), {"type": "Polygon", "coordinates": rings}


def labelme_record(result: Result, classes: Sequence[str], folder: Path) -> dict[str, Any]:
    """What LabelMe reads: a polygon per connected region, the largest first.

    LabelMe has no holes. What lies in a hole is a region of its own, which is smaller than the outline around it and
    so comes later, and tools that turn the file into class ids paint it over.

    Args:
        result: the segmented image.
        classes: the K class names.
        folder: where the file will be, to which the path of the image is relative.
    """
    outlines = [(k, geometry["coordinates"][0][:-1]) for k, geometry in regions(result.ids)]
    outlines.sort(key=lambda outline: -_area(outline[1]))
    height, width = result.ids.shape
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {"label": classes[k], "points": points, "group_id": None, "shape_type": "polygon", "flags": {}}
            for k, points in outlines
        ],
        "imagePath": os.path.relpath(result.file, folder),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _area(points: Sequence[Sequence[float]]) -> float:
    """The area that a polygon encloses."""
    x, y = np.array(points).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


class CocoFile:
    """Predictions as COCO has semantic labels ("stuff"): one annotation per image and class, with run lengths.

    Attributes:
        record: images, categories (whose ids count from 1) and annotations so far.
    """

    def __init__(self, classes: Sequence[str]):
        self.record: dict[str, Any] = {
            "images": [],
            "categories": [{"id": k + 1, "name": name, "supercategory": name} for k, name in enumerate(classes)],
            "annotations": [],
        }

    def add(self, result: Result) -> None:
        """Add a segmented image."""
        height, width = result.ids.shape
        images, annotations = self.record["images"], self.record["annotations"]
        images.append(
            {
                "id": len(images) + 1,
                "file_name": (result.name.parent / result.file.name).as_posix(),
                "height": height,
                "width": width,
            }
        )
        ids = result.ids.numpy()
        for k in np.unique(ids).tolist():
            mask = ids == k
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            left, top = int(columns[0]), int(rows[0])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": k + 1,
                    "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                    "area": int(mask.sum()),
                    "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
                    "iscrowd": 0,
                }
            )


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask (H, W) column by column, of pixels outside and inside in turn, as COCO has them."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(changes, prepend=0, append=pixels.size).tolist()
