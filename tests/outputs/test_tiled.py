"""An image that is read in windows gives the class ids of the whole image, and its files keep its coordinates."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.runs import small_model
from unept.colors import save_picture, to_pil
from unept.data import DatasetError
from unept.inference import InferenceConfig, InferenceOptions, predict_ids, resolve
from unept.outputs.tiled import Raster, predict_file, predict_rows, tile_config

CPU = torch.device("cpu")


class Memory:
    """An image in memory that notes the largest part that was read."""

    def __init__(self, image: torch.Tensor):
        self.image, self.size, self.largest = image, tuple(image.shape[1:]), (0, 0)

    def read(self, top: int, left: int, height: int, width: int) -> torch.Tensor:
        assert top >= 0
        assert left >= 0
        assert top + height <= self.size[0]
        assert left + width <= self.size[1]
        self.largest = max(self.largest, (height, width))
        return self.image[:, top : top + height, left : left + width]


def smooth_image(height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].byte()


@pytest.mark.parametrize(
    ("model_options", "config"),
    [
        ({}, {"window": 32, "window_stride": 16, "refine_scale": 5, "refine_steps": 3}),
        ({"boundary_upsampling": "subpixel", "logits_stride": 2}, {"window": 40, "window_stride": 24, "flip": True}),
        ({"num_directions": 32}, {"window": 40, "window_stride": 24, "refine_scale": 8}),
        ({}, {"window": 256}),
        ({"context_queries": "learned"}, {"window": 32}),
    ],
    ids=["refined", "fine", "32-directions", "one-window", "unrefined"],
)
def test_the_ids_are_those_of_the_whole_image(model_options, config, monkeypatch):
    monkeypatch.setattr("unept.outputs.tiled.BLOCK", 40)
    image, config = smooth_image(93, 117), InferenceConfig(**config)
    model = small_model(**model_options)
    whole = predict_ids(model, image, config)[0]
    source, bands = Memory(image), []
    for top, ids in predict_rows(model, source, config, CPU):
        assert top == sum(map(len, bands))
        bands.append(ids)
    tiled = torch.cat(bands)
    assert tiled.shape == whole.shape
    assert whole.unique().numel() > 1
    assert (tiled != whole).float().mean() < 0.001  # but for rounding
    assert max(source.largest) <= config.window
    assert len(bands) > 1 or config.window == 256


def test_a_file_keeps_its_coordinates(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    image = smooth_image(50, 70)
    transform = rasterio.transform.from_origin(500000, 4600000, 0.5, 0.5)
    profile = {"driver": "GTiff", "height": 50, "width": 70, "dtype": "uint16", "crs": "EPSG:32633"}
    with rasterio.open(tmp_path / "in.tif", "w", count=4, transform=transform, nodata=0, **profile) as file:
        pixels = (np.vstack([image.numpy(), image.numpy()[:1]]).astype(np.uint16) + 1) * 256 - 1
        pixels[:, :4] = 0
        file.write(pixels)
    model, config = small_model(), InferenceConfig(window=32)
    source = Raster(tmp_path / "in.tif")
    counts = predict_file(model, source, config, CPU, tmp_path / "ids.tif", tmp_path / "overlay.tif", alpha=1)
    with rasterio.open(tmp_path / "ids.tif") as file:
        assert (file.crs.to_epsg(), file.transform, file.nodata) == (32633, transform, 255)
        ids = file.read(1)
        colors = {k: color[:3] for k, color in file.colormap(1).items() if k < 3}
    image[:, :4] = 0
    expected = predict_ids(model, image, config)[0].numpy()
    assert (ids[:4] == 255).all()
    assert (ids[4:] != expected[4:]).mean() < 0.001
    assert np.array_equal(np.bincount(ids.ravel(), minlength=256), counts.numpy())
    assert [list(colors[k]) for k in range(3)] == model.palette
    with rasterio.open(tmp_path / "overlay.tif") as file:
        assert file.transform == transform
        assert np.array_equal(file.read()[:, 10, 20], model.palette[ids[10, 20]])


def test_a_file_keeps_its_control_points(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    corners = [(0, 0), (0, 70), (50, 0), (50, 70)]
    points = [rasterio.control.GroundControlPoint(row, col, 10 + col / 70, 50 - row / 50) for row, col in corners]
    with rasterio.open(tmp_path / "in.tif", "w", driver="GTiff", height=50, width=70, count=3, dtype="uint8") as file:
        file.write(smooth_image(50, 70).numpy())
        file.gcps = points, rasterio.crs.CRS.from_epsg(4326)
    paths = tmp_path / "ids.tif", tmp_path / "overlay.tif"
    predict_file(small_model(), Raster(tmp_path / "in.tif"), InferenceConfig(window=32), CPU, *paths)
    for path in paths:
        with rasterio.open(path) as file:
            found, crs = file.gcps
            assert crs.to_epsg() == 4326
            assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]


def test_files_are_written_whole_or_not_at_all(tmp_path):
    """The image ends in the middle of its rows."""
    pytest.importorskip("rasterio")
    save_picture(to_pil(smooth_image(96, 64)), tmp_path / "in.tif")
    (tmp_path / "ids.tif").write_text("of a run before")
    source, read = Raster(tmp_path / "in.tif"), Raster.read

    def damaged(self, top, *place):
        if top:
            raise DatasetError("in.tif is damaged")
        return read(self, top, *place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Raster, "read", damaged)
        with pytest.raises(DatasetError):
            predict_file(
                small_model(), source, InferenceConfig(window=32), CPU, tmp_path / "ids.tif", tmp_path / "overlay.tif"
            )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ids.tif", "in.tif"]
    assert (tmp_path / "ids.tif").read_text() == "of a run before"


def test_images_that_rasterio_reads_otherwise_are_refused(tmp_path):
    pytest.importorskip("rasterio")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.tif"):
        Image.new("RGB", (40, 24)).save(tmp_path / name, exif=exif)
        with pytest.raises(DatasetError, match=f"{name} is turned by its EXIF tag: save it upright"):
            Raster(tmp_path / name)
    Image.new("RGB", (40, 24)).save(tmp_path / "tag.png", exif=b"Exif\0\0no TIFF")
    assert Raster(tmp_path / "tag.png").size == (24, 40)
    Image.new("1", (40, 24), 1).save(tmp_path / "bits.png")
    with pytest.raises(DatasetError, match="fewer than 8 bits per pixel"):
        Raster(tmp_path / "bits.png")
    Image.new("L", (40, 24), 9).save(tmp_path / "gray.png")
    assert (Raster(tmp_path / "gray.png").read(0, 0, 24, 40) == 9).all()


def test_what_cannot_be_tiled():
    with pytest.raises(ValueError, match="with --tiled the only scale is 1"):
        tile_config(InferenceConfig(scales=(0.5, 1.0)))
    with pytest.raises(ValueError, match="add --short-side 0"):
        tile_config(InferenceConfig(short_side=512))
    with pytest.raises(ValueError, match=r"long side 520, .* add --long-side 0"):
        tile_config(InferenceConfig(long_side=520))
    model = small_model()
    model.preprocessing = {"short_side": 512}
    assert tile_config(resolve(InferenceOptions(short_side=0), model)).window_stride > 0
