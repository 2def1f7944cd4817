"""`python -m unept.predict IMAGE...`: segment images with a trained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor

from . import cli
from .colors import overlay, save_palette_png, save_picture, to_pil
from .data.finding import FoundImage
from .data.reading import read_image
from .inference import InferenceConfig, InferenceOptions, predict_ids
from .model import UNEPT


@dataclass
class PredictConfig:
    """Segment images. Writes for each NAME_ids.png (a palette PNG whose pixels are class ids) and NAME_overlay.png."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    recursive: bool = False
    """Also take the images in subfolders; their results go to subfolders of the same names."""
    run: Path | None = None
    """Run folder that unept.train wrote, folder that save_pretrained wrote, or ORG/NAME of a repository on the Hugging
    Face hub. None: the newest run folder with a model under runs/."""
    out: Path = Path("predictions")
    """Folder for the results."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    alpha: float = 0.5
    """Weight of the class colors in the overlay, from 0 to 1."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("no image given: name image files, or folders of them")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be between 0 and 1")


def describe(ids: Tensor, classes: Sequence[str], count: int = 5) -> str:
    """The most frequent classes of ids (H, W), at most `count`, and their share of the pixels."""
    shares = torch.bincount(ids.flatten(), minlength=len(classes)) / ids.numel()
    top = shares.topk(min(count, len(classes)))
    listed = [(classes[k], share) for share, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    return ", ".join(f"{name} {share:.1%}" for name, share in listed if share >= 0.001)


def predict_image(options: PredictConfig, config: InferenceConfig, model: UNEPT, found: FoundImage) -> Iterator[str]:
    """Segment one image and write its ids and overlay.

    Yields:
        A line that says where they are and which classes were found.

    Raises:
        DatasetError: if the image can't be read.
        MemoryError: if it does not fit into memory.
        OSError: if its results can't be written.
    """
    image = read_image(found.path)
    with cli.out_of_memory(memory_advice(image, config, found)):
        ids = predict_ids(model, image.to(model.mean.device), config)[0].cpu()
    ids_path, overlay_path = (cli.result_path(options.out, found, kind) for kind in ("ids", "overlay"))
    save_palette_png(ids, model.palette, ids_path)
    save_picture(to_pil(overlay(image, ids, model.palette, options.alpha)), overlay_path)
    yield f"{ids_path}  {overlay_path}  {describe(ids, model.classes)}"


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

    An image that can't be read or is too large is reported on stderr, and the others are still segmented.

    Returns:
        The exit status: 1 if anything that was named could not be segmented, else 0.

    Raises:
        FileNotFoundError, ValueError: see `find_images` and `unept.cli.open_model`.
    """
    images, missing = cli.find_named_images(options.images, options.recursive, options.out)
    model, config = cli.open_model(options.run, options.device, options.inference, options.out)
    failed = cli.process_images(images, lambda found: predict_image(options, config, model, found), failure="read")
    return max(failed, missing)


def main() -> None:
    """Run the command line."""
    cli.run(lambda: predict(tyro.cli(PredictConfig, prog="python -m unept.predict")))


if __name__ == "__main__":
    main()
