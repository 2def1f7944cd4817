"""`python -m unept.predict` on a small saved run: what it writes, and every way to give it bad input."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.runs import CLASSES, PALETTE, save_run, small_model
from unept import predict
from unept.model.output import AveragedOutput
from unept.outputs.video import open_clip
from unept.pretrained import newest_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder and the model in it."""
    folder = tmp_path_factory.mktemp("work") / "run"
    return folder, save_run(folder, small_model())


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; gives its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            predict.main()
        return end.value.code, *capsys.readouterr()

    return call


def save_image(path, height: int = 33, width: int = 47, **options) -> torch.Tensor:
    """Write a noisy image; gives it as (3, H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_what_is_written(run, command, tmp_path):
    image = save_image(tmp_path / "beach.png")
    status, out, _ = command("beach.png", "--run", run[0])
    assert status == 0
    with Image.open("predictions/beach_ids.png") as picture:
        assert picture.mode == "P"
        ids = np.asarray(picture)
        colors = np.asarray(picture.convert("RGB"))
    assert np.array_equal(ids, run[1].predict(image[None])[0].numpy())
    assert np.array_equal(colors, np.array(PALETTE, dtype=np.uint8)[ids])
    overlay = np.asarray(Image.open("predictions/beach_overlay.png")).astype(int)
    assert np.abs(2 * overlay - colors - image.permute(1, 2, 0).numpy()).max() <= 1
    assert "predictions/beach_ids.png  predictions/beach_overlay.png" in out
    top = np.bincount(ids.ravel(), minlength=3).argmax()
    assert f"{CLASSES[top]} {(ids == top).mean():.1%}" in out


def test_inference_options_reach_the_network(run, command, tmp_path, monkeypatch):
    seen = []

    def record(model, image, config):
        seen.append(config)
        return AveragedOutput(torch.ones(1, 3, 5, 6) / 3, None, None)

    monkeypatch.setattr(predict, "infer", record)
    save_image(tmp_path / "a.png")
    command("a.png", "--run", run[0], "--scales", "0.5", "1", "--flip", "--window", "32", "--no-refine")
    assert (seen[0].scales, seen[0].flip, seen[0].window, seen[0].refine) == ((0.5, 1.0), True, 32, False)


def test_results_that_are_no_images_may_lie_beside_the_images(run, command, tmp_path):
    (tmp_path / "images").mkdir()
    save_image(tmp_path / "images" / "a.png")
    for recursive in ((), ("--recursive",)):
        assert command("images", "--run", run[0], "--out", "images", "--format", "probabilities", *recursive)[0] == 0
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == ["a.png", "a_probabilities.npz"]


def test_folders_and_files(run, command, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("photos/b.jpg", "photos/a.PNG", "c.png"):
        save_image(tmp_path / name, 16, 24)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    status, _, _ = command("photos", "c.png", "c.png", "--run", run[0], "--out", "results/here")
    assert status == 0
    written = {path.name for path in (tmp_path / "results" / "here").iterdir()}
    assert written == {f"{stem}_{kind}.png" for stem in "abc" for kind in ("ids", "overlay")}


def test_a_file_that_is_named_in_two_ways_is_seen_once(run, command, tmp_path):
    (tmp_path / "folder").mkdir()
    save_image(tmp_path / "folder" / "a.png")
    status, out, err = command("folder", str(tmp_path / "folder" / "a.png"), "folder/../folder/a.png", "--run", run[0])
    assert (status, err) == (0, "")
    assert out.count("a_ids.png") == 1


def test_subfolders_are_taken_or_told(run, command, tmp_path):
    for name in ("photos/a.png", "photos/night/a.png", "photos/night/deep/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_image(tmp_path / name, 16, 24)
    status, _, err = command("photos", "--run", run[0])
    assert status == 0
    assert err == "note: 1 subfolders of photos hold images: --recursive takes them; they are left out\n"
    for _ in range(2):  # the second time the results lie in the folder too
        status, _, err = command("photos", "--recursive", "--run", run[0], "--out", "photos/out")
        assert (status, err) == (0, "")
    written = {str(path.relative_to(tmp_path / "photos/out")) for path in (tmp_path / "photos/out").rglob("*_ids.png")}
    assert written == {"a_ids.png", "night/a_ids.png", "night/deep/b_ids.png"}
    (tmp_path / "photos/a.png").unlink()
    status, _, err = command("photos", "--run", run[0])
    assert status == 2
    assert "photos hold images: --recursive takes them" in err


def test_bad_names_do_not_end_the_batch(run, command, tmp_path):
    long, odd = "n" * 248 + ".png", "a\nb\udcff.png"
    for name in (long, odd, "c.png"):
        save_image(tmp_path / name, 16, 24)
    status, out, err = command(long, odd, "missing.png", "c.png", "--run", run[0])
    assert status == 1
    assert "error: there is no image or folder missing.png" in err
    assert f"error: the results of {long} can't be written (File name too long): rename it" in err
    assert "a\\nb\\udcff_ids.png" in out
    assert (tmp_path / "predictions" / "c_ids.png").exists()
    assert out.count("\n") == 4


def test_an_image_that_is_too_large_for_memory(run, command, tmp_path, monkeypatch):
    def fail(model, image, config):
        if image.shape[1] == 48:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return infer(model, image, config)

    infer = predict.infer
    monkeypatch.setattr(predict, "infer", fail)
    save_image(tmp_path / "a.png", 48, 64)
    save_image(tmp_path / "b.png", 16, 24)
    for options, advice in (
        ([], "--window 512 sees it in parts"),
        (["--window", "32"], "--window-batch 2 sees fewer"),
        (["--window", "256", "--window-batch", "1"], "--window 128 sees it in smaller"),
    ):
        status, out, err = command("a.png", "b.png", "--run", run[0], *options)
        assert status == 1
        assert f"error: out of memory with a.png, 64x48 pixels: {advice}" in err
        assert "b_ids.png" in out


@pytest.mark.parametrize("kind", ["image", "tiled", "video"])
def test_a_prediction_of_nan_does_not_end_the_batch(command, tmp_path, kind):
    """The weights are finite, but so large that what is not of the mean color overflows."""
    if kind != "image":
        pytest.importorskip({"tiled": "rasterio", "video": "av"}[kind])
    model = small_model()
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(3e19)
    save_run(tmp_path / "run", model)
    names = ["a.png", "bright.png", "c.png"]
    for name in names:
        Image.new("RGB", (48, 32), "white" if name == "bright.png" else (124, 116, 104)).save(tmp_path / name)
    options, suffix = {"image": ([], "png"), "tiled": (["--tiled"], "tif"), "video": (["--fps", "5"], "mkv")}[kind]
    if kind == "video":
        for name in names:
            (tmp_path / Path(name).stem).mkdir()
            (tmp_path / name).rename(tmp_path / Path(name).stem / name)
        names = [Path(name).stem for name in names]
    status, _, err = command(*names, "--run", "run", "--format", "ids", *options)
    assert status == 1
    assert err.startswith(f"error: with {names[1]}: the prediction holds NaN")
    assert err.endswith("error: 1 of 3 images could not be segmented\n")
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {f"a_ids.{suffix}", f"c_ids.{suffix}"}


def test_exif_orientation(run, command, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    save_image(tmp_path / "turned.jpg", 16, 24, exif=exif)
    command("turned.jpg", "--run", run[0])
    for kind in ("ids", "overlay"):
        assert Image.open(f"predictions/turned_{kind}.png").size == (16, 24)


def test_a_corrupt_image_does_not_stop_the_others(run, command, tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save_image(tmp_path / name, 64, 64)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:500])
    status, out, err = command("a.jpg", "b.jpg", "c.jpg", "--run", run[0])
    assert status == 1
    assert err.count("b.jpg") == 1
    assert err.startswith("error: b.jpg can't be read")
    assert err.endswith("error: 1 of 3 images could not be segmented\n")
    assert "a_ids.png" in out
    assert "c_ids.png" in out
    assert not (tmp_path / "predictions" / "b_ids.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "error: there is no image or folder missing.png"),
        (["empty"], "error: empty holds no images"),
        (["a.png", "other/a.png"], "error: a.png and other/a.png would share one result"),
        (["a.png", "--run", "nowhere"], "error: nowhere does not exist"),
        (["a.png", "--run", "empty"], "error: empty is not a run folder"),
        (["a.png", "--run", "a.png"], "error: a.png is a file: give the folder of a run or of a model"),
        (["other", "--out", "other"], "error: the results in other would be images of the next run: give another"),
        (
            ["a.png", "--run", "camvid_tiny", "--out", "a.png"],
            "error: the folder a.png can't be created (a file",
        ),
        (
            ["a.png", "--run", "camvid_tiny", "--out", "a.png/b"],
            "error: the folder a.png/b can't be created (Not a",
        ),
    ],
    ids=str,
)
def test_bad_input(command, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "other" / "a.png")
    status, _, err = command(*arguments)
    assert status == 2
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_every_format(run, command, tmp_path):
    pytest.importorskip("rasterio")
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png")
    formats = ("ids", "overlay", "probabilities", "polygons", "coco", "labelme", "ids")
    status, out, _ = command("a.png", "b.png", "--run", run[0], "--format", *formats)
    assert status == 0
    endings = ("ids.png", "overlay.png", "probabilities.npz", "polygons.geojson", "labelme.json")
    names = {f"{stem}_{ending}" for stem in "ab" for ending in endings} | {"coco.json"}
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == names
    assert "2 images, " in out.splitlines()[-1]
    assert all(f"predictions/{name}" in out for name in names)


def test_videos(run, command, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "frames").mkdir()
    for i in range(3):
        save_image(tmp_path / "frames" / f"{i}.png", 32, 48)
    status, out, _ = command("frames", "--fps", "5", "--run", run[0])
    assert status == 0
    assert "predictions/frames_ids.mkv  predictions/frames_overlay.mp4  3 images, " in out
    clip = open_clip(tmp_path / "predictions" / "frames_overlay.mp4")
    assert (clip.rate, clip.num_frames) == (5, 3)
    status, out, _ = command("predictions/frames_overlay.mp4", "--format", "overlay", "--run", run[0], "--out", "again")
    assert status == 0
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["frames_overlay_overlay.mp4"]
    status, _, err = command("frames", "--fps", "5", "--run", run[0], "--format", "coco", "ids")
    assert status == 2
    assert err == "error: frames is a video, whose formats are ids and overlay; leave out coco\n"


def test_a_folder_of_frames_by_a_dot(run, command, tmp_path, monkeypatch):
    pytest.importorskip("av")
    (tmp_path / "frames").mkdir()
    save_image(tmp_path / "frames" / "0.png", 32, 48)
    monkeypatch.chdir(tmp_path / "frames")
    status, *_ = command(".", "--fps", "5", "--run", run[0], "--out", "../of_dot")
    assert status == 0
    assert (tmp_path / "of_dot" / "frames_ids.mkv").exists()


@pytest.mark.parametrize("fps", ["inf", "nan", "0", "1e308"])
def test_rates_that_no_video_has(command, fps):
    status, _, err = command(".", "--fps", fps)
    assert status == 2
    assert "fps is" in err


def test_more_classes_than_files_of_ids_hold(command, tmp_path):
    save_image(tmp_path / "a.png", 32, 48)
    save_run(tmp_path / "many", small_model(num_classes=300))
    status, _, err = command("a.png", "--run", "many")
    assert status == 2
    assert "the model has 300 classes, and files of class ids hold 8 bits: for images, ask for other formats" in err
    assert command("a.png", "--run", "many", "--format", "overlay", "coco")[0] == 0


def test_model_of_other_channels(command, tmp_path):
    save_image(tmp_path / "a.png", 32, 48)
    save_run(tmp_path / "gray", small_model(in_chans=1, mean=(0.5,), std=(0.5,)))
    status, _, err = command("a.png", "--run", "gray")
    assert (status, "images of 1 channels, and image files are read as RGB" in err) == (2, True)
    assert not (tmp_path / "predictions").exists()


def test_tiled(run, command, tmp_path):
    pytest.importorskip("rasterio")
    save_image(tmp_path / "large.png", 60, 80)
    status, out, _ = command("large.png", "--tiled", "--window", "32", "--run", run[0])
    assert status == 0
    assert out.splitlines()[-1].startswith("predictions/large_ids.tif  predictions/large_overlay.tif  s")
    assert Image.open("predictions/large_ids.tif").size == (80, 60)
    (tmp_path / "bad.png").write_text("no image")
    assert "bad.png can't be read" in command("bad.png", "--tiled", "--run", run[0])[2]


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("rasterio", ["a.png", "--tiled"]), ("rasterio", ["a.png", "--format", "labelme"]), ("av", ["a.mp4"])],
)
def test_absent_packages(run, command, tmp_path, monkeypatch, package, arguments):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = command(*arguments, "--run", run[0])
    assert status == 2
    assert err.endswith(f": pip install {package}\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "no image given"), (["a.png", "--alpha", "2"], "alpha is 2.0")]
)
def test_bad_options(command, arguments, message):
    status, out, err = command(*arguments)
    assert status == 2
    assert message in out + err


def test_the_newest_run_is_taken(tmp_path):
    for age, name in enumerate(("b", "a")):
        save_run(tmp_path / name, small_model())
        os.utime(tmp_path / name / "model" / "model.safetensors", (1e9 - age, 1e9 - age))
    (tmp_path / "c").mkdir()  # has no model yet
    assert newest_run(tmp_path) == tmp_path / "b"


def test_describe():
    ids = torch.tensor([[0] * 600 + [2] * 399 + [1]])
    assert predict.describe(ids, ["sky", "sea", "sand"]) == "sky 60.0%, sand 39.9%, sea 0.1%"
    assert predict.describe(ids, ["sky", "sea", "sand"], count=1) == "sky 60.0%"
