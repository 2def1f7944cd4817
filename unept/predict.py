"""`python -m unept.predict IMAGE...`: segment images with a trained model."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor

from . import cli
from .data import DatasetError
from .data.base import IMAGE_SUFFIXES, read_image
from .inference import InferenceOptions, predict_ids, resolve
from .pictures import drawing

RUNS = Path("runs")


@dataclass
class PredictConfig:
    """Segment images. Writes for each NAME_ids.png (a palette PNG whose pixels are class ids) and NAME_overlay.png."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    run: Path | None = None
    """Run folder that unept.train wrote, folder that save_pretrained wrote, or ORG/NAME of a repository on the Hugging
    Face hub. None: the newest run folder with a model under runs/."""
    out: Path = Path("predictions")
    """Folder for the results."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    alpha: float = 0.5
    """Weight of the class colours in the overlay, from 0 to 1."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("no image given: name image files, or folders of them")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be between 0 and 1")


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """Image files, and those directly in folders, by name.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without images.
        ValueError: two files of one stem, whose results would have one name.
    """
    files = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
            if not inside:
                raise FileNotFoundError(
                    f"{path} holds no images: put files ending in {', '.join(IMAGE_SUFFIXES)} in it"
                )
            files += sorted(inside)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no image or folder {path}")
    by_stem: dict[str, Path] = {}
    for file in dict.fromkeys(files):
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            raise ValueError(f"{other} and {file} would share one result: predict them into different folders (--out)")
    return list(by_stem.values())


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder under `runs` whose model is the newest.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [folder for folder in sorted(runs.glob("*/")) if cli.has_model(folder)]
    if not found:
        raise FileNotFoundError(
            f"there is no run folder with a model under {runs}/: train one with `python -m unept.train`, "
            "or name one with --run"
        )
    return max(found, key=lambda folder: (folder / "model" / "model.safetensors").stat().st_mtime)


def describe(ids: Tensor, classes: list[str], count: int = 5) -> str:
    """The most frequent classes of ids (H, W) and their share of the pixels."""
    shares = torch.bincount(ids.flatten(), minlength=len(classes)) / ids.numel()
    top = shares.topk(min(count, len(classes)))
    listed = [(classes[k], share) for share, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    return ", ".join(f"{name} {share:.1%}" for name, share in listed if share >= 0.001)


def predict(options: PredictConfig) -> int:
    """Segment the images; print where the results are and what was found.

    An image that can't be read is reported on stderr, and the others are still done.

    Returns:
        Exit status: 1 if any image could not be read, else 0.

    Raises:
        FileNotFoundError, ValueError: see `find_images`, `newest_run` and `unept.cli.load`.
    """
    files = find_images(options.images)
    device = cli.choose_device(options.device)
    run = newest_run() if options.run is None else options.run
    model = cli.load(run, device)
    config = resolve(options.inference, model)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"Model of {run}")
    failed = 0
    for file in files:
        try:
            image = read_image(file)
        except DatasetError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        ids = predict_ids(model, image.to(device), config)[0].cpu()
        ids_path, overlay_path = (options.out / f"{file.stem}_{kind}.png" for kind in ("ids", "overlay"))
        drawing.save_palette_png(ids, model.palette, ids_path)
        drawing.save_image(drawing.overlay(image, ids, model.palette, options.alpha), overlay_path)
        print(f"{ids_path}  {overlay_path}  {describe(ids, model.classes)}")
    if failed:
        print(f"error: {failed} of {len(files)} images could not be read", file=sys.stderr)
    return min(failed, 1)


def main() -> None:
    """The command line."""
    cli.run(lambda: predict(tyro.cli(PredictConfig, prog="python -m unept.predict")))


if __name__ == "__main__":
    main()
