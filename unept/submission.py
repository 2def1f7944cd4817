"""`python -m unept.submission RUN`: predictions of a whole split, as files that its benchmark's server takes."""

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
from .data import SegmentationDataset, image_loader
from .evaluation.evaluator import check_classes
from .files import write_atomically
from .inference import InferenceConfig, predict_ids
from .model.network import UNEPT
from .pictures import drawing


@dataclass
class SubmissionConfig:
    """Predict a split with a trained model, and write the ids as the benchmark's label files hold them.

    OUT/labels has a PNG of every image. For ADE20K and Cityscapes they are gray, OUT/labels.zip is for the benchmark's
    server, and OUT/view shows them in colour; for all others they are palette PNGs.
    """

    run: tyro.conf.Positional[Path]
    """Run folder that unept.train wrote."""
    split: Literal["test", "val"] = "test"
    """Which part of the data set; it needs no labels."""
    root: Path | None = None
    """Folder of the data set. None: as in training."""
    out: Path | None = None
    """Folder for the results. None: submission_SPLIT in the run folder."""
    inference: tyro.conf.OmitArgPrefixes[InferenceConfig] = field(default_factory=InferenceConfig)
    """Views and refinement."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""
    workers: int = 2
    """Processes that read the images; 0 reads in the main process."""


def save_labels(ids: Tensor, dataset: SegmentationDataset, name: str, out: Path) -> Path:
    """Write the class ids (H, W) of an image as `out/labels/<name>.png`, in the ids of the data set's label files.

    The servers ask for files like their own labels, which are gray. A palette PNG would show the classes, but not all
    that reads one gives the ids (PIL does, OpenCV gives the gray of the colours): the colours go to `out/view/`.

    Returns:
        The path of the file of ids.
    """
    path = out / "labels" / f"{name}.png"
    file_ids = np.array(dataset.file_ids, dtype=np.uint8)
    labels = file_ids[ids.cpu().numpy()]
    if dataset.has_server:
        Image.fromarray(labels).save(path)
        drawing.save_palette_png(ids, dataset.palette, out / "view" / f"{name}.png")
    else:
        palette: np.ndarray = np.zeros((256, 3), dtype=np.uint8)
        palette[file_ids] = dataset.palette
        drawing.save_palette_png(torch.from_numpy(labels), palette.tolist(), path)
    return path


def write_submission(
    model: UNEPT,
    dataset: SegmentationDataset,
    config: InferenceConfig,
    device: torch.device,
    out: Path,
    workers: int = 0,
) -> Path:
    """Predict every image at its own size and write what `SubmissionConfig` says into folder `out`.

    The archive is written whole or not at all, and is there only while it holds what the folders hold: one of an
    earlier submission is removed first.

    Args:
        model: on `device`; left in the mode it is in.
        dataset: its labels are not read.
        config: views and refinement.
        device: of the model.
        out: made if need be; files of the same names are replaced.
        workers: processes that read the images; 0: this one.

    Returns:
        The archive, or the folder of labels where no server takes one.

    Raises:
        ValueError: the model and the data set have different classes, or the data set is empty.
        DatasetError: an image can't be read.
        OSError: the disk is full or not writable.
    """
    check_classes(model, dataset)
    archive = out / "labels.zip"
    archive.unlink(missing_ok=True)
    for folder in ("labels", "view") if dataset.has_server else ("labels",):
        (out / folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(tqdm(image_loader(dataset, workers), desc="predict", unit="image", leave=False)):
        ids = predict_ids(model, image.to(device, non_blocking=True), config)[0]
        paths.append(save_labels(ids, dataset, dataset.name(i), out))
    if not dataset.has_server:
        return out / "labels"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:  # stored as they are: PNGs don't get smaller
        for path in paths:
            file.write(path, path.name)
    write_atomically(archive, content.getvalue())
    return archive


def submit(options: SubmissionConfig) -> None:
    """Write the submission of a run folder's best model; print where it is.

    Raises:
        FileNotFoundError, ValueError, OSError: see `unept.cli.load_run`, `unept.data.build_dataset` and
            `write_submission`.
    """
    cli.refuse_several_processes()
    device = cli.choose_device(options.device)
    trained, model = cli.load_run(options.run, device)
    dataset = trained.data.build(options.split, options.root)
    config = cli.as_trained(options.inference, trained)
    out = options.run / f"submission_{options.split}" if options.out is None else options.out
    result = write_submission(model, dataset, config, device, out, options.workers)
    print(f"{len(dataset)} images of {dataset.description}, split {options.split}. Written: {result}")
    if dataset.has_server:
        print(f"The same ids are in {out / 'labels'}, and in colour in {out / 'view'}")


def main() -> None:
    """The command line."""
    cli.run(lambda: submit(tyro.cli(SubmissionConfig, prog="python -m unept.submission")))


if __name__ == "__main__":
    main()
