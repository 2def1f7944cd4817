"""Segment images that do not fit into memory: windows of a file in, rows of a GeoTIFF out, by rasterio.

The window slides over the image as `unept.inference` slides it, the average of overlapping windows included, and the
refinement reads across them: what comes out is what `--window` gives for the whole image. Memory holds the maps of one
row of windows, so that it grows with the width of the image, not with its height.

Letters: H, W height and width of the image; all places are in its pixels, padded to multiples of 8 (`STRIDE`).
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags
from torch import Tensor
from tqdm import tqdm

from ..colors import overlay
from ..data import DatasetError
from ..data.reading import DAMAGED, open_image
from ..files import temporary_file
from ..inference import InferenceConfig, Maps, averaged_output, predict_ids, window_maps, window_starts
from ..model.boundary import step_length
from ..model.finite import require_numbers
from ..model.output import STRIDE, SegmentationModel, class_ids, padded_size
from ..optional import require

WINDOW = 512  # where none is given
BLOCK = 2048  # columns of class ids that are read from the maps at once


class Source(Protocol):
    """An image of which parts can be read."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """The pixels of a part that lies inside the image, uint8 (3, height, width), RGB."""


def tile_config(config: InferenceConfig) -> InferenceConfig:
    """The config with a window, by default of 512 pixels.

    Raises:
        ValueError: the config sees images at another size than their own.
    """
    if config.scales != (1.0,):
        raise ValueError(f"scales are {config.scales}; with --tiled the only scale is 1")
    for side, pixels in (("short", config.short_side), ("long", config.long_side)):
        if pixels:
            raise ValueError(
                f"the model was trained on images of {side} side {pixels}, but --tiled sees images at their own size: "
                f"add --{side}-side 0 if the size of objects in pixels is that of the training images"
            )
    return config if config.window else replace(config, window=WINDOW, window_stride=0)


def predict_rows(
    model: SegmentationModel,
    source: Source,
    config: InferenceConfig,
    device: torch.device,
    progress: bool | None = False,
) -> Iterator[tuple[int, Tensor]]:
    """Segment an image from top to bottom.

    Args:
        model: in any mode.
        source: the image.
        config: with a window; see `tile_config`.
        device: device of the model.
        progress: whether to show a progress bar; None shows it on a terminal.

    Yields:
        The first row of a band of the image, and its class ids, (rows, W) uint8 on the CPU.
    """
    if max(source.size) <= config.window:
        yield 0, predict_ids(model, source.read(0, 0, *source.size).to(device), config)[0].to("cpu", torch.uint8)
        return
    height, width = padded_size(source.size)
    rows = min(config.window, height)
    starts = window_starts(height, rows, config.window_stride)
    band = _Band(width, device)
    done = 0
    bar = tqdm(starts, desc="predict", unit="row of windows", disable=None if progress is None else not progress)
    for top, following in zip(bar, [*starts[1:], height], strict=True):
        band.grow(top + rows)
        for left, maps in _row_of_windows(model, source, config, device, (top, rows, width)):
            band.add(maps, top, left, rows)
        margin = band.margin(config)
        end = height if following == height else following - margin
        if end > done:
            first = max(0, done - margin)
            ids = torch.cat(
                [
                    _class_ids(band, (first, following), (left, min(left + BLOCK, width)), margin, config)
                    for left in range(0, width, BLOCK)
                ],
                dim=1,
            )
            yield done, ids[done - first : min(end, source.size[0]) - first, : source.size[1]]
            done = end
            band.forget(max(0, done - margin))


class _Band:
    """Sums of the windows' maps over the rows of the image from `top` to `end`, and how many windows each has."""

    def __init__(self, width: int, device: torch.device):
        self.width, self.top, self.end = width, 0, 0
        self.maps: Maps = []
        self.count = torch.zeros(1, 1, 0, width // STRIDE, device=device)

    def grow(self, end: int) -> None:
        added = end - self.end
        self.end = end
        self.count = F.pad(self.count, (0, 0, 0, added // STRIDE))
        self.maps = [F.pad(m, (0, 0, 0, added * m.shape[3] // self.width)) for m in self.maps]

    def add(self, maps: Maps, top: int, left: int, rows: int) -> None:
        """Add the maps of a window (1, C, h, w) with so many rows of the image."""
        if not self.maps:
            for m in maps:
                stride = rows // m.shape[2]
                shape = (1, m.shape[1], (self.end - self.top) // stride, self.width // stride)
                self.maps.append(m.new_zeros(shape))
        ones = self.count.new_ones(1, 1, rows // STRIDE, maps[0].shape[3] * (rows // maps[0].shape[2]) // STRIDE)
        for canvas, m in zip([*self.maps, self.count], [*maps, ones], strict=True):
            stride = rows // m.shape[2]
            y, x = (top - self.top) // stride, left // stride
            canvas[:, :, y : y + m.shape[2], x : x + m.shape[3]] += m

    def crop(self, vertical: tuple[int, int], horizontal: tuple[int, int]) -> Maps:
        """The averages in a part (start, end) of the image each way."""
        parts = []
        for m in [*self.maps, self.count]:
            stride = self.width // m.shape[3]
            rows, columns = (slice(a // stride, b // stride) for a, b in (self._rows(vertical), horizontal))
            parts.append(m[:, :, rows, columns])
        *maps, count = parts
        return [m / F.interpolate(count, m.shape[2:]) for m in maps]

    def margin(self, config: InferenceConfig) -> int:
        """Rows and columns beyond a pixel that its class id may depend on, a multiple of `STRIDE`."""
        reach = config.refine_scale * config.refine_steps if config.refine and len(self.maps) > 1 else 0
        if reach and config.refine_direction == "best":
            reach *= step_length(self.maps[1].shape[1] - 1)
        return padded_size((reach + STRIDE, 0))[0]  # a pixel is up-sampled from maps up to STRIDE pixels away

    def forget(self, top: int) -> None:
        """Drop the rows above `top`."""
        self.maps = [m[:, :, (top - self.top) * m.shape[3] // self.width :].clone() for m in self.maps]
        self.count = self.count[:, :, (top - self.top) // STRIDE :]
        self.top = top

    def _rows(self, vertical: tuple[int, int]) -> tuple[int, int]:
        return vertical[0] - self.top, vertical[1] - self.top


def _row_of_windows(
    model: SegmentationModel,
    source: Source,
    config: InferenceConfig,
    device: torch.device,
    place: tuple[int, int, int],
) -> Iterator[tuple[int, Maps]]:
    """The first column and the maps (1, C, h, w) of each window in a row; `place` is (top, rows, width)."""
    top, rows, width = place
    columns = min(config.window, width)
    lefts = window_starts(width, columns, config.window_stride)
    step = max(1, config.window_batch // 2) if config.flip else config.window_batch  # mirrored ones go along
    for start in range(0, len(lefts), step):
        batch = lefts[start : start + step]
        crops = torch.stack([_read_padded(model, source, device, (top, left, rows, columns)) for left in batch])
        maps = window_maps(model, crops, config)
        for b, left in enumerate(batch):
            yield left, [m[b : b + 1] for m in maps]


def _read_padded(
    model: SegmentationModel, source: Source, device: torch.device, place: tuple[int, int, int, int]
) -> Tensor:
    """Normalised pixels (3, rows, columns) of a window, which may reach below and to the right of the image."""
    top, left, rows, columns = place
    height, width = min(rows, source.size[0] - top), min(columns, source.size[1] - left)
    pixels = model.normalized(source.read(top, left, height, width).to(device))
    return F.pad(pixels, (0, columns - width, 0, rows - height))


def _class_ids(
    band: _Band, vertical: tuple[int, int], horizontal: tuple[int, int], margin: int, config: InferenceConfig
) -> Tensor:
    """Class ids of a part of the image, uint8; its columns are read with a margin."""
    left, right = horizontal
    outer = (max(0, left - margin), min(right + margin, band.width))
    output = averaged_output(band.crop(vertical, outer))
    require_numbers(output.scores)
    size = (vertical[1] - vertical[0], outer[1] - outer[0])
    return class_ids(output, size, config.refinement)[0, :, left - outer[0] : right - outer[0]].to("cpu", torch.uint8)


def _orientation(path: Path) -> int:
    """The EXIF orientation of an image file; 1, upright, where there is none or PIL cannot open the file."""
    try:
        with open_image(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGED:  # DatasetError is one of them; where only the tag is damaged, the pixels are read as they are
        return 1


class Raster:
    """An image file as rasterio reads it: GeoTIFF and all other formats of GDAL, 8 or 16 bits, gray, RGB or more bands.

    Of more than three bands the first three are read; 16 bits become 8 as in `unept.data.files.read_image`.

    Args:
        path: the file.

    Raises:
        DatasetError: the file cannot be read, or holds other pixels.
        ValueError: rasterio is not installed.
    """

    def __init__(self, path: Path):
        rasterio = require("rasterio", "--tiled")
        self._window = rasterio.windows.Window
        self._failure = rasterio.errors.RasterioError
        self.path = path
        try:
            self.file = _open(path)
        except self._failure as error:
            raise DatasetError(f"{path} can't be read ({error}): the file is damaged or not an image") from error
        if {*self.file.dtypes} - {"uint8", "uint16"}:
            raise DatasetError(f"{path} has pixels of {self.file.dtypes[0]}: save it with 8 or 16 bits per channel")
        if self.file.colorinterp[0] == rasterio.enums.ColorInterp.palette:
            raise DatasetError(f"{path} has a palette: convert it to RGB first")
        if int(self.file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8)) < 8:
            raise DatasetError(f"{path} has fewer than 8 bits per pixel: save it with 8 or 16 bits per channel")
        if _orientation(path) != 1:
            raise DatasetError(f"{path} is turned by its EXIF tag: save it upright, or segment it without --tiled")
        self.bands = (1, 2, 3) if self.file.count >= 3 else (1, 1, 1)

    @property
    def size(self) -> tuple[int, int]:
        """See `Source`."""
        return self.file.height, self.file.width

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """See `Source`."""
        pixels = self._read(self.file.read, top, left, height, width, indexes=self.bands)
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        return torch.from_numpy(pixels)

    def valid(self, top: int, height: int) -> Tensor:
        """Which pixels (height, W) of a band hold data, a bool mask; a GeoTIFF may say where it has none."""
        return torch.from_numpy(self._read(self.file.dataset_mask, top, 0, height, self.size[1]) > 0)

    def _read(self, method: Any, top: int, left: int, height: int, width: int, **options: Any) -> np.ndarray:
        try:
            return method(window=self._window(left, top, width, height), **options)
        except self._failure as error:
            raise DatasetError(f"{self.path} can't be read ({error}): the file is damaged; restore it") from error


def _open(path: Path, mode: str = "r", **options: Any) -> Any:
    """Open a raster without rasterio's warning that it has no coordinates, which most images have not."""
    rasterio = require("rasterio", "--tiled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, mode, **options)


NO_DATA = 255


def predict_file(
    model: SegmentationModel,
    source: Raster,
    config: InferenceConfig,
    device: torch.device,
    ids_path: Path,
    overlay_path: Path | None = None,
    alpha: float = 0.5,
) -> Tensor:
    """Segment a file and write GeoTIFFs that have its coordinates, each whole or not at all.

    Args:
        model: in any mode.
        source: the image.
        config: with a window; see `tile_config`.
        device: device of the model.
        ids_path: file for the class ids, 8 bits with the palette; 255 where the image has no data.
        overlay_path: file for the image mixed with the colors of its classes; None writes none.
        alpha: the weight of these colors.

    Returns:
        int64 (256,): the number of pixels of every id.

    Raises:
        DatasetError: the file is damaged.
        FloatingPointError: the prediction holds NaN.
        OSError: the disk is full or not writable. In all of these cases the files that were there before are intact.
    """
    rasterio = require("rasterio", "--tiled")
    height, width = source.size
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": height, "width": width, "dtype": "uint8", "crs": source.file.crs,
        "transform": source.file.transform, "tiled": True, "compress": "deflate", "bigtiff": "if_safer",
    }  # fmt: skip
    counts = torch.zeros(256, dtype=torch.int64)
    with ExitStack() as stack:

        def create(path: Path, **options: Any) -> Any:
            temporary = stack.enter_context(temporary_file(path))
            file = stack.enter_context(_open(temporary, "w", **profile, **options))
            if source.file.gcps[0]:
                file.gcps = source.file.gcps
            if source.file.rpcs is not None:
                file.rpcs = source.file.rpcs
            return file

        ids_file = create(ids_path, count=1, nodata=NO_DATA)
        ids_file.write_colormap(1, {k: (*color, 255) for k, color in enumerate(model.palette)})
        colored = create(overlay_path, count=3, photometric="rgb") if overlay_path else None
        for top, ids in predict_rows(model, source, config, device, progress=None):
            ids = torch.where(source.valid(top, len(ids)), ids, NO_DATA)
            counts += torch.bincount(ids.flatten(), minlength=256)
            window = rasterio.windows.Window(0, top, width, len(ids))
            ids_file.write(ids.numpy(), 1, window=window)
            if colored is not None:
                image = source.read(top, 0, len(ids), width)
                colored.write(overlay(image, ids, model.palette, alpha).numpy(), window=window)
    return counts
