"""`python -m unept.predict IMAGE...`: segment images, videos and rasters with a trained model."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import get_args

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from . import cli
from .colors import overlay
from .data import DatasetError
from .data.finding import FoundImage
from .data.reading import read_image
from .files import result_path
from .inference import InferenceConfig, InferenceOptions, infer, predict_ids
from .memory import require_memory_for_images
from .model import UNEPT
from .model.finite import require_numbers
from .model.output import class_ids
from .optional import require
from .outputs import tiled
from .outputs.formats import Format, Result, Writer, check_packages, read_probabilities
from .outputs.video import VideoWriter, is_video, open_clip
from .validation import check_range


@dataclass
class PredictConfig:
    """Segment images and videos. Writes for each image a file per format, by default NAME_ids.png (a palette PNG whose
    pixels are class ids) and NAME_overlay.png; for a video NAME_ids.mkv and NAME_overlay.mp4.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, folders of them, and video files; before options of several values."""
    recursive: bool = False
    """Also take the images in subfolders; their results go to subfolders of the same names."""
    run: Path | None = None
    """Run folder that unept.train wrote, folder that save_pretrained wrote, ORG/NAME of a repository on the Hugging
    Face hub, or camvid_tiny, the demo model. None: the newest run folder with a model under runs/, or the demo model if
    there is none."""
    out: Path = Path("predictions")
    """Folder for the results."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    format: tuple[Format, ...] = ("ids", "overlay")
    """What to write. ids, overlay: as above. probabilities: of all classes, float16 (K, H, W), as .npz. polygons:
    GeoJSON with a polygon per region, in pixels. coco: one coco.json for all images. labelme: a file of LabelMe per
    image. The polygons of both need rasterio. Videos and --tiled take ids and overlay."""
    fps: float | None = None
    """Read each folder as the frames of a video, by name, with so many of them per second. None: as single images."""
    tiled: bool = False
    """Read an image in windows (--window, by default 512) and write GeoTIFFs with its coordinates, for images that do
    not fit into memory. Needs rasterio."""
    alpha: float = 0.5
    """Weight of the class colors in the overlay, from 0 to 1."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("no image given: name image files, or folders of them")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be between 0 and 1")
        if self.fps is not None:
            check_range("fps", self.fps, 0.001, 1000)
        if not self.format:
            raise ValueError(f"format is empty; give some of {', '.join(get_args(Format))}")
        self.format = tuple(dict.fromkeys(self.format))

    def check_classes(self, count: int) -> None:
        """Raise ValueError if the ids of so many classes do not fit into the 8 bits of the files that are asked for."""
        if (count > 256 and "ids" in self.format) or (count > 255 and self.tiled):
            raise ValueError(
                f"the model has {count} classes, and files of class ids hold 8 bits"
                + (", in those of --tiled with a value for no data" if self.tiled else "")
                + ": for images, ask for other formats, such as --format overlay coco"
            )

    def check(self, clips: Sequence[Path]) -> None:
        """Raise ValueError if videos, the paths `clips`, or --tiled stand beside options that do not allow them.

        Or if a package that is needed is not installed, before a model is loaded and a folder is made.
        """
        others = [name for name in self.format if name not in ("ids", "overlay")]
        if others and (clips or self.tiled):
            what = f"{clips[0]} is a video" if clips else "--tiled is given"
            raise ValueError(f"{what}, whose formats are ids and overlay; leave out {' and '.join(others)}")
        if clips and self.tiled:
            raise ValueError(f"{clips[0]} is a video; --tiled reads images: run the command for each kind")
        if duplicates := [name_of(a) for a, b in combinations(clips, 2) if name_of(a) == name_of(b) and a != b]:
            raise ValueError(
                f"several videos are called {duplicates[0]} and would share one result: run the command for each "
                "of them, with different --out"
            )
        check_packages(self.format)
        if clips:
            require("av", "a video")
        if self.tiled:
            require("rasterio", "--tiled")


def name_of(clip: Path) -> str:
    """The name of a video or of a folder of frames, without a suffix; that of the folder itself for `.` and `..`."""
    return (clip.resolve() if clip.is_dir() else clip).stem


def describe(ids: Tensor, classes: Sequence[str], count: int = 5) -> str:
    """The most frequent classes of ids (H, W), at most `count`, and their share of the pixels."""
    return describe_counts(torch.bincount(ids.flatten(), minlength=len(classes)), classes, count)


def describe_counts(pixels: Tensor, classes: Sequence[str], count: int = 5) -> str:
    """The same from the number of pixels (K,) of each class."""
    shares = pixels / pixels.sum()
    top = shares.topk(min(count, len(classes)))
    listed = [(classes[k], share) for share, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    return ", ".join(f"{name} {share:.1%}" for name, share in listed if share >= 0.001)


def predict_image(
    options: PredictConfig, config: InferenceConfig, model: UNEPT, writer: Writer, found: FoundImage
) -> Iterator[str]:
    """Segment one image and write it in every format.

    Yields:
        A line that says where the results are and which classes were found.

    Raises:
        DatasetError: if the image can't be read.
        FloatingPointError: the prediction holds NaN.
        MemoryError: if it does not fit into memory.
        OSError: if its results can't be written.
    """
    image = read_image(found.path)
    size = image.shape[1:]
    advice = memory_advice(image, config, found)
    require_memory_for_images(size, config, model.mean.device, advice)
    with cli.out_of_memory(advice):
        output = infer(model, image.to(model.mean.device), config)
        require_numbers(output.scores)
        ids = class_ids(output, size, config.refinement)[0].cpu()
        probabilities = read_probabilities(output, size, config)[0].cpu() if writer.needs_probabilities else None
    paths = writer.write(Result(found.path, image, ids, probabilities, found.name))
    yield f"{'  '.join(map(str, paths)) or found.path}  {describe(ids, model.classes)}"


def predict_clip(options: PredictConfig, config: InferenceConfig, model: UNEPT, found: FoundImage) -> Iterator[str]:
    """Segment the frames of a video, one by one, into NAME_ids.mkv and NAME_overlay.mp4, as the formats say.

    Yields:
        A line that says where they are, and how fast it went.

    Raises:
        DatasetError: if the video can't be read, or has no frame.
        FloatingPointError: the prediction holds NaN.
        OSError: if the results can't be written. In all of these cases those that were there before are intact.
    """
    clip = open_clip(found.path, options.fps)
    suffixes = {"ids": "mkv", "overlay": "mp4"}
    paths = {name: result_path(options.out, found.name, f"{name}.{suffixes[name]}") for name in options.format}
    start, count = time.perf_counter(), 0
    with ExitStack() as stack:
        videos = {name: stack.enter_context(VideoWriter(paths[name], clip.rate)) for name in paths}
        for frame in tqdm(clip.frames(), found.path.name, clip.num_frames, unit="image", disable=None, leave=False):
            ids = predict_ids(model, frame.to(model.mean.device), config)[0].cpu()
            if "ids" in videos:
                videos["ids"].write(ids)
            if "overlay" in videos:
                videos["overlay"].write(overlay(frame, ids, model.palette, options.alpha))
            count += 1
        if not count:
            raise DatasetError(f"{found.path} can't be read as a video: it has no frame; convert or remove it")
    rate = count / (time.perf_counter() - start)
    yield f"{'  '.join(map(str, paths.values()))}  {count} images, {rate:.1f} images/s"


def predict_tiled(options: PredictConfig, config: InferenceConfig, model: UNEPT, found: FoundImage) -> Iterator[str]:
    """Segment an image window by window into NAME_ids.tif and, if the formats say so, NAME_overlay.tif.

    Yields:
        A line that says where they are and which classes were found.

    Raises:
        DatasetError: if the image can't be read.
        MemoryError: if it does not fit into memory.
        OSError: if its results can't be written.
    """
    names = dict.fromkeys(("ids", *options.format))
    paths = {name: result_path(options.out, found.name, f"{name}.tif") for name in names}
    source, device = tiled.Raster(found.path), model.mean.device
    counts = tiled.predict_file(model, source, config, device, paths["ids"], paths.get("overlay"), options.alpha)
    yield f"{'  '.join(map(str, paths.values()))}  {describe_counts(counts[: len(model.classes)], model.classes)}"


def memory_advice(image: Tensor, config: InferenceConfig, found: FoundImage) -> str:
    """Say how an image (3, H, W) takes less memory, as advice for `out_of_memory`."""
    height, width = image.shape[1:]
    if not config.window:
        advice = "--window 512 sees it in parts"
    elif config.window_batch > 1:
        advice = f"--window-batch {config.window_batch // 2} sees fewer of its parts at once"
    else:
        advice = f"--window {max(64, config.window // 16 * 8)} sees it in smaller parts"
    return f"with {found.path}, {width}x{height} pixels: {advice}; --short-side 1024 makes it smaller"


def predict(options: PredictConfig) -> int:
    """Segment the images; print where the results are and which classes were found.

    An image that can't be read, is too large or gives NaN is reported on stderr, and the others are still segmented.

    Returns:
        The exit status: 1 if anything that was named could not be segmented, else 0.

    Raises:
        FileNotFoundError, ValueError: see `find_images`, `unept.cli.open_model`, `Writer` and `tile_config`.
    """
    clips = [path for path in options.images if is_video(path) or (options.fps is not None and path.is_dir())]
    options.check(clips)
    others = [path for path in options.images if path not in clips]
    images: list[FoundImage] = []
    missing = 0
    if others:
        images, missing = cli.find_named_images(
            others, options.recursive, options.out, writes_images=not {"ids", "overlay"}.isdisjoint(options.format)
        )
    model, config = cli.open_model(options.run, options.device, options.inference, options.out)
    options.check_classes(model.num_classes)
    if options.tiled:
        config = tiled.tile_config(config)
    writer = Writer(options.format, options.out, model.classes, model.palette, options.alpha)

    def process(found: FoundImage) -> Iterator[str]:
        if found.path in clips:
            return predict_clip(options, config, model, found)
        if options.tiled:
            return predict_tiled(options, config, model, found)
        return predict_image(options, config, model, writer, found)

    start = time.perf_counter()
    everything = [*images, *(FoundImage(path, Path(name_of(path))) for path in clips)]
    failed = cli.process_images(everything, process, failure="segmented")
    for path in writer.finish() if images and not options.tiled else ():
        cli.say(path)
    if len(images) > 1 and not clips:
        cli.say(f"{len(images)} images, {len(images) / (time.perf_counter() - start):.2f} images/s")
    return max(failed, missing)


def main() -> None:
    """Run the command line."""
    cli.run(lambda: predict(tyro.cli(PredictConfig, prog="python -m unept.predict")))


if __name__ == "__main__":
    main()
