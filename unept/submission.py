"""`python -m unept.submission RUN`: predict a whole split into files that its benchmark's server accepts."""

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import cli
from .colors import save_palette_png, save_picture
from .data import SegmentationDataset, image_loader
from .distributed import default_workers
from .evaluation.evaluator import check_classes
from .files import write_atomically
from .inference import InferenceConfig, InferenceOptions, predict_ids, resolve
from .model.output import SegmentationModel
from .pretrained import load_run
from .validation import check_range


@dataclass
class SubmissionConfig:
    """Predict a split with a trained model, and write the ids as the benchmark's label files hold them.

    OUT/labels has a PNG for every image. For ADE20K and Cityscapes they are gray, OUT/labels.zip is for the benchmark's
    server, and OUT/view shows them in color; for all others they are palette PNGs.
    """

    run: tyro.conf.Positional[Path]
    """Run folder that unept.train wrote."""
    split: Literal["test", "val"] = "test"
    """Which part of the dataset; it needs no labels."""
    root: Path | None = None
    """Folder of the dataset. None: as in training."""
    out: Path | None = None
    """Folder for the results. None: submission_SPLIT in the run folder."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""
    workers: int = field(default_factory=default_workers)
    """Processes that read the images; 0 reads in the main process."""

    def __post_init__(self) -> None:
        check_range("workers", self.workers, 0, 1024)


def save_labels(ids: Tensor, dataset: SegmentationDataset, name: str, out: Path) -> Path:
    """Write the class ids (H, W) of an image as `out/labels/<name>.png`, in the ids of the dataset's label files.

    The servers ask for files like their own labels, which are gray. A palette PNG would show the classes, but not every
    reader returns its ids (PIL does, OpenCV returns the gray of the colors). So the colors go to `out/view/`.

    Returns:
        The path of the file with the ids.
    """
    path = out / "labels" / f"{name}.png"
    file_ids = np.array(dataset.file_ids, dtype=np.uint8)
    labels = file_ids[ids.cpu().numpy()]
    if dataset.has_test_server:
        save_picture(Image.fromarray(labels), path)
        save_palette_png(ids, dataset.palette, out / "view" / f"{name}.png")
    else:
        palette: np.ndarray = np.zeros((256, 3), dtype=np.uint8)
        palette[file_ids] = dataset.palette
        save_palette_png(torch.from_numpy(labels), palette.tolist(), path)
    return path


def write_submission(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    config: InferenceConfig,
    device: torch.device,
    out: Path,
    workers: int = 0,
) -> Path:
    """Predict every image at its own size and write what `SubmissionConfig` says into folder `out`.

    The archive is written whole or not at all, and exists only while it holds what the folders hold: that of an earlier
    submission is removed first.

    Args:
        model: the network, on `device`; it is left in the mode it is in.
        dataset: the dataset, whose labels are not read.
        config: views and refinement.
        device: the device of the model.
        out: the folder for the results. It is created; files of the same names in it are replaced.
        workers: the number of processes that read the images; 0 reads in this process.

    Returns:
        The path of the archive, or of the folder of labels where no server takes an archive.

    Raises:
        ValueError: if the model and the dataset have different classes, or the dataset is empty.
        DatasetError: if an image can't be read.
        OSError: if the disk is full or not writable.
    """
    check_classes(model, dataset)
    if max(dataset.file_ids) > 255:
        raise ValueError(
            f"the labels of the dataset have the id {max(dataset.file_ids)}, and the files that are written hold 0 to "
            "255: predict with unept.predict, which writes class ids"
        )
    archive = out / "labels.zip"
    archive.unlink(missing_ok=True)
    for folder in ("labels", "view") if dataset.has_test_server else ("labels",):
        (out / folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(
        tqdm(image_loader(dataset, workers), desc="predict", unit="image", leave=False, disable=None)
    ):
        ids = predict_ids(model, image.to(device, non_blocking=True), config)[0]
        paths.append(save_labels(ids, dataset, dataset.name(i), out))
    if not dataset.has_test_server:
        return out / "labels"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:  # stored uncompressed: PNGs don't get smaller
        for path in paths:
            file.write(path, path.name)
    write_atomically(archive, content.getvalue())
    return archive


def submit(options: SubmissionConfig) -> None:
    """Write the submission of a run folder's best model, and print where it is.

    Raises:
        FileNotFoundError, ValueError, OSError: see `unept.pretrained.load_run`, `unept.data.build_dataset` and
            `write_submission`.
    """
    cli.refuse_several_processes()
    device = cli.choose_device(options.device)
    trained, model = load_run(options.run, device)
    dataset = trained.data.build(options.split, options.root)
    config = resolve(options.inference, model)
    out = options.run / f"submission_{options.split}" if options.out is None else options.out
    result = write_submission(model, dataset, config, device, out, options.workers)
    cli.say(f"{len(dataset)} images of {dataset.description}, split {options.split}. Written: {result}")
    if dataset.has_test_server:
        cli.say(f"The same ids are in {out / 'labels'}, and in colour in {out / 'view'}")


def main() -> None:
    """Run the command line."""
    cli.run(lambda: submit(tyro.cli(SubmissionConfig, prog="python -m unept.submission")))


if __name__ == "__main__":
    main()
