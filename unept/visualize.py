"""`python -m unept.visualize IMAGE...`: the paper's pictures from a trained model (Fig. 3-8, Appendix A-D)."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from . import cli
from .data import DatasetError
from .data.base import read_image
from .inference import InferenceConfig, InferenceOptions, infer, resolve
from .model.attention import SparseSamplingAttention
from .model.boundary import Refinement
from .model.network import UNEPT
from .model.output import DenseOutput, boundary_probability, class_ids
from .pictures import drawing
from .pictures.recording import (
    Attention,
    NotInModel,
    Recording,
    feature_colors,
    joint_attention,
    on_image,
    record,
    sampling_layer,
)
from .predict import find_images, newest_run

Picture = Literal["refinement", "pyramid", "attention", "points"]
ATTENTIONS: dict[Attention, str] = {
    "decoder": "decoder's cross-attention",
    "decoder-self": "decoder's self-attention",
    "encoder": "encoder's self-attention",
}
MAX_CLASSES = 20  # of the comparison, as in Fig. 8
ZOOM = 4  # the enlarged window has 1 / ZOOM of the image's height and width


@dataclass
class VisualizeConfig:
    """Look into a trained model. Writes for each image NAME_refinement.png, NAME_pyramid.png, NAME_attention.png and
    NAME_points.png; with --compare, class_iou_comparison.png.
    """

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, or folders of them."""
    run: Path | None = None
    """Run folder that unept.train wrote. None: the newest with a model under runs/."""
    out: Path = Path("visualizations")
    """Folder for the pictures."""
    pictures: tuple[Picture, ...] = get_args(Picture)
    """Which: refinement (predictions before and after it, Fig. 3 and 4), pyramid (principal components of features,
    Fig. 5), attention (of a ViT backbone, Fig. 6), points (that a query samples, Fig. 7)."""
    query: tuple[float, float] | None = None
    """(x, y) in pixels of the image: whose points and attention to show. None: the centre of the image."""
    points_of: Attention = "decoder"
    """Whose points to show: the decoder's cross-attention or self-attention, or the encoder's (queries of scale 1)."""
    layer: int | None = None
    """Which of these layers, from 1. None: the last."""
    compare: tuple[Path, Path] | None = None
    """Two run folders that unept.evaluate measured: their IoU by class (Fig. 8), what the first gains most on top."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views of the refinement picture; the others are of a single view at scale 1."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""

    def __post_init__(self) -> None:
        if not self.images and self.compare is None:
            raise ValueError("nothing to draw: name image files or folders of them, or two runs with --compare")
        if not self.pictures:
            raise ValueError(f"pictures is empty; give some of {', '.join(get_args(Picture))}")
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer is {self.layer}; layers count from 1")
        if self.inference.refine is False:
            raise ValueError("--no-refine leaves nothing to compare: choose other pictures with --pictures instead")


def most_different(first: Tensor, second: Tensor) -> tuple[int, int, int, int]:
    """The window (top, left, height, width), 1/4 of (H, W) each way, in which most ids of two maps (H, W) differ.

    Of several the one nearest to the centre; so the centre itself where the maps are the same.
    """
    height, width = (max(1, n // ZOOM) for n in first.shape)
    differ = (first != second).float()[None, None]
    counts = (F.avg_pool2d(differ, (height, width), stride=1)[0, 0] * height * width).round()
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in counts.shape)
    distance = (rows[:, None].square() + columns.square()).masked_fill(counts.cpu() < counts.max().cpu(), torch.inf)
    top, left = divmod(int(distance.argmin()), counts.shape[1])
    return top, left, height, width


def draw_refinement(
    model: UNEPT, image: Tensor, output: DenseOutput, refinement: Refinement | None, name: str, path: Path
) -> float:
    """Draw the predictions before and after refinement; gives the share of the pixels that it changes.

    Raises:
        NotInModel: the network does not refine.
    """
    size = (image.shape[1], image.shape[2])
    boundary = boundary_probability(output, size)
    if boundary is None:
        raise NotInModel("no refinement picture: this network has no spatial branch, so it does not refine")
    plain = class_ids(output, size, None)[0].cpu()
    refined = class_ids(output, size, refinement)[0].cpu()
    sample = drawing.Sample(name, image.cpu(), None, plain, refined, boundary[0].cpu())
    drawing.refinement_panel(sample, most_different(plain, refined), model.classes, model.palette, path)
    return float((plain != refined).float().mean())


def draw_pyramid(image: Tensor, recording: Recording, path: Path) -> None:
    """Draw the first three principal components of each level's features as colours, padding left out."""
    size = (image.shape[1], image.shape[2])
    pictures = {"image": image.cpu()}
    for level, feature in enumerate(recording.features, start=1):
        # The cells that show any of the image.
        rows, columns = (
            min(n, int(-(-pixels * n // length)))
            for n, pixels, length in zip(feature.shape[1:], size, recording.covered, strict=True)
        )
        colors, share = feature_colors(feature[:, :rows, :columns])
        padding = (0, feature.shape[2] - columns, 0, feature.shape[1] - rows)
        picture = on_image(F.pad(colors, padding), recording.covered, size, mode="nearest")
        caption = f"scale {level}: {feature.shape[0]} channels, {rows}x{columns}\n{share:.0%} of the variance"
        pictures[caption] = (picture * 255).round().to(torch.uint8)
    drawing.picture_row(pictures, path)


def draw_attention(model: UNEPT, image: Tensor, recording: Recording, query: tuple[float, float], path: Path) -> None:
    """Draw the backbone's joint attention: of the class token, the image masked where that is below its average, and
    of the token at the query.

    Raises:
        NotInModel: see `joint_attention`.
    """
    image = image.cpu()
    overall, at_query = (
        on_image(joint[None], recording.covered, image.shape[1:])[0]
        for joint in joint_attention(model, recording, query)
    )
    masked = torch.where(overall < overall.mean(), image // 8, image)
    pictures = {
        "image and query": image,
        "joint attention": drawing.heat(overall, image),
        "masked below its average": masked,
        "joint attention of the query": drawing.heat(at_query, image),
    }
    drawing.picture_row(pictures, path, star=query)


def load_evaluation(run: Path) -> dict[str, Any]:
    """What `unept.evaluate` wrote into a run folder.

    Raises:
        FileNotFoundError: it was not evaluated.
        ValueError: the file is damaged.
    """
    path = run / "evaluation.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: measure the run first with `python -m unept.evaluate {run}`")
    try:
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("classes", "iou", "mIoU", "split")}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): evaluate the run again") from error


def compare_classes(first: Path, second: Path) -> tuple[list[tuple[str, float, float]], tuple[float, float]]:
    """Name and both IoU of the classes of two evaluated runs, what the first gains most on top, and both mIoU.

    Classes that have no IoU in one of them (they never occur) are left out.

    Raises:
        FileNotFoundError, ValueError: see `load_evaluation`; or the runs differ in their classes or the split.
    """
    one, other = load_evaluation(first), load_evaluation(second)
    if one["classes"] != other["classes"]:
        raise ValueError(
            f"the {len(one['classes'])} classes of {first} and the {len(other['classes'])} of {second} differ in name "
            "or order: compare runs on one class list"
        )
    if one["split"] != other["split"]:
        raise ValueError(
            f"{first} was evaluated on {one['split']} and {second} on {other['split']}: evaluate one again with --split"
        )
    rows = [
        (name, a, b)
        for name, a, b in zip(one["classes"], one["iou"], other["iou"], strict=True)
        if a is not None and b is not None
    ]
    if not rows:
        raise ValueError(f"{first} and {second} have no class with an IoU in both: evaluate them on labelled images")
    return sorted(rows, key=lambda row: row[2] - row[1]), (one["mIoU"], other["mIoU"])


def run_names(first: Path, second: Path) -> tuple[str, str]:
    """Two run folders in short: their own names, or the whole paths where these are the same."""
    return (str(first), str(second)) if first.name == second.name else (first.name, second.name)


def draw_image(
    options: VisualizeConfig, config: InferenceConfig, model: UNEPT, layer: SparseSamplingAttention, file: Path
) -> list[str]:
    """Draw the pictures of one image that the options name, and print where they are.

    Returns:
        Which pictures the network does not allow, and why.

    Raises:
        DatasetError: the image can't be read, or the query lies outside of it.
        NotInModel: the only picture asked for is of what the network does not have.
    """
    image = read_image(file).to(model.mean.device)
    height, width = image.shape[1:]
    query = options.query or ((width - 1) / 2, (height - 1) / 2)
    if not (0 <= query[0] <= width - 1 and 0 <= query[1] <= height - 1):
        raise DatasetError(
            f"the query ({query[0]:g}, {query[1]:g}) lies outside of {file}, which has {width} x {height} pixels: give "
            f"--query X Y from 0 0 to {width - 1} {height - 1}"
        )
    recording = record(model, image, config, query, layer)
    missing = []
    for picture in dict.fromkeys(options.pictures):
        path = options.out / f"{file.stem}_{picture}.png"
        note = ""
        try:
            if picture == "refinement":
                output = infer(model, image, config)
                refinement = replace(config, refine=True).refinement  # whether the run refined or not
                share = draw_refinement(model, image, output, refinement, file.stem, path)
                note = f"  refinement changes {share:.2%} of the pixels"
            elif picture == "pyramid":
                draw_pyramid(image, recording, path)
            elif picture == "attention":
                draw_attention(model, image, recording, query, path)
            else:
                caption = f"{file.stem}: what a query of the {ATTENTIONS[options.points_of]} reads"
                drawing.sampled_points(recording.points, image.cpu(), caption, path)
        except NotInModel as error:
            if len(set(options.pictures)) == 1:
                raise
            missing.append(str(error))
        else:
            print(f"{path}{note}")
    return missing


def visualize(options: VisualizeConfig) -> int:
    """Draw all pictures; print where they are.

    An image that can't be read is reported on stderr, and the others are still done.

    Returns:
        Exit status: 1 if any image could not be drawn, else 0.

    Raises:
        FileNotFoundError, ValueError: see `unept.predict`, `unept.cli.load_run`, `compare_classes`, `draw_image`.
    """
    if options.compare is not None:
        rows, means = compare_classes(*options.compare)
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "class_iou_comparison.png"
        drawing.class_comparison(rows[:MAX_CLASSES], run_names(*options.compare), means, path)
        left_out = f"  the first {MAX_CLASSES} of {len(rows)} classes" if len(rows) > MAX_CLASSES else ""
        print(f"{path}{left_out}")
    if not options.images:
        return 0
    files = find_images(options.images)
    device = cli.choose_device(options.device)
    run = newest_run() if options.run is None else options.run
    _, model = cli.load_run(run, device)
    layer = sampling_layer(model, options.points_of, options.layer)
    config = resolve(options.inference, model)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"Model of {run}")
    failed, told = 0, set()
    for file in files:
        try:
            for line in draw_image(options, config, model, layer, file):
                if line not in told:
                    print(line)
                    told.add(line)
        except DatasetError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"error: {failed} of {len(files)} images could not be drawn", file=sys.stderr)
    return min(failed, 1)


def main() -> None:
    """The command line."""
    cli.run(lambda: visualize(tyro.cli(VisualizeConfig, prog="python -m unept.visualize")))


if __name__ == "__main__":
    main()
