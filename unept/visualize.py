"""`python -m unept.visualize IMAGE...`: the paper's pictures from a trained model (Fig. 1 and 3-8)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import tyro
from torch import Tensor

from . import cli
from .data import DatasetError
from .data.finding import FoundImage
from .data.reading import read_image
from .evaluation.comparison import compare_classes, short_names
from .evaluation.evaluator import check_classes
from .files import create_folder, result_path
from .inference import InferenceConfig, InferenceOptions, infer, resolve
from .memory import require_memory_for_images
from .model.network import UNEPT
from .pictures import drawing, figures
from .pictures.recording import Attention, NotInModel, record, sampling_layer
from .pretrained import load_run

Picture = Literal["refinement", "pyramid", "attention", "points"]
ATTENTIONS: dict[Attention, str] = {
    "decoder": "decoder's cross-attention",
    "decoder-self": "decoder's self-attention",
    "encoder": "encoder's self-attention",
}
MAX_CLASSES = 20  # in the comparison of classes, as in Fig. 8


@dataclass
class VisualizeConfig:
    """Look into a trained model. Writes for each image NAME_refinement.png, NAME_pyramid.png, NAME_attention.png and
    NAME_points.png; with --compare NAME_comparison.png, or without images class_iou_comparison.png.
    """

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, or folders of them."""
    recursive: bool = False
    """Also take the images in subfolders; their pictures go to subfolders of the same names."""
    run: Path | None = None
    """Run folder that unept.train wrote, folder that save_pretrained wrote, ORG/NAME of a repository on the Hugging
    Face hub, or camvid_tiny, the demo model. None: the newest run folder with a model under runs/, or the demo model if
    there is none."""
    out: Path = Path("visualizations")
    """Folder for the pictures."""
    pictures: tuple[Picture, ...] = get_args(Picture)
    """Which pictures: refinement (predictions before and after it, Fig. 3 and 4), pyramid (principal components of
    features, Fig. 5), attention (of a ViT backbone, Fig. 6), points (that a query samples, Fig. 7)."""
    query: tuple[float, float] | None = None
    """Position (x, y) in pixels of the image whose points and attention to show. None: the centre of the image."""
    points_of: Attention = "decoder"
    """Attention whose points to show: the decoder's cross-attention or self-attention, or the encoder's (queries of
    scale 1)."""
    layer: int | None = None
    """Number of the layer, from 1. None: the last."""
    compare: tuple[Path, ...] | None = None
    """Two or more run folders. With images or --samples: draw what each of them predicts, and where they differ most
    (Fig. 1 and 3). Without: draw their IoU per class, as unept.evaluate measured it, or else the training (Fig. 8)."""
    samples: int = 0
    """With --compare: so many images of the first run's validation set, with their truth and the errors of each run."""
    root: Path | None = None
    """Folder of that data set. None: as in training."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views of the refinement picture; the other pictures show a single view at scale 1."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""

    def __post_init__(self) -> None:
        if not self.images and self.compare is None:
            raise ValueError("nothing to draw: name image files or folders of them, or two runs with --compare")
        if self.compare is not None and len(self.compare) < 2:
            raise ValueError("--compare takes two or more run folders")
        if self.samples < 0 or (self.samples and self.compare is None):
            raise ValueError(f"samples is {self.samples}; give a number of images, together with --compare")
        if not self.pictures:
            raise ValueError(f"pictures is empty; give some of {', '.join(get_args(Picture))}")
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer is {self.layer}; layers count from 1")
        if self.inference.refine is False and self.compare is None:
            raise ValueError("--no-refine leaves nothing to compare: choose other pictures with --pictures instead")


def draw_image(options: VisualizeConfig, config: InferenceConfig, model: UNEPT, found: FoundImage) -> Iterator[str]:
    """Draw the pictures of one image that the options name.

    Yields:
        A line for each picture that says where it is; then a line for each picture that the network does not allow.

    Raises:
        DatasetError: if the image can't be read, or the query lies outside it.
        MemoryError: if a CPU has too little memory to see it whole, which the recorded view is.
        NotInModel: if the only picture asked for shows what the network does not have.
    """
    file = found.path
    image = read_image(file).to(model.mean.device)
    height, width = image.shape[1:]
    query = options.query or ((width - 1) / 2, (height - 1) / 2)
    if not (0 <= query[0] <= width - 1 and 0 <= query[1] <= height - 1):
        raise DatasetError(
            f"the query ({query[0]:g}, {query[1]:g}) lies outside {file}, which has {width} x {height} pixels: give "
            f"--query X Y from 0 0 to {width - 1} {height - 1}"
        )
    missing = []
    try:
        layer = sampling_layer(model, options.points_of, options.layer) if "points" in options.pictures else None
    except NotInModel as error:
        if len(set(options.pictures)) == 1:
            raise
        layer, missing = None, [str(error)]
    advice = f"with {file}, {width}x{height} pixels: --short-side 1024 makes it smaller"
    require_memory_for_images((height, width), replace(config, window=0, window_stride=0), image.device, advice)
    recording = record(model, image, config, query, layer)
    for picture in dict.fromkeys(options.pictures):
        path = result_path(options.out, found.name, f"{picture}.png")
        note = ""
        try:
            if picture == "refinement":
                output = infer(model, image, config)
                share = figures.draw_refinement(model, image, output, config, file.stem, path)
                note = f"  refinement changes {share:.2%} of the pixels"
            elif picture == "pyramid":
                figures.draw_pyramid(image, recording, path)
            elif picture == "attention":
                figures.draw_attention(model, image, recording, query, path)
            elif recording.points is None:
                continue  # `missing` says why
            else:
                caption = f"{file.stem}: what a query of the {ATTENTIONS[options.points_of]} reads"
                drawing.sampled_points(recording.points, image.cpu(), caption, path)
        except NotInModel as error:
            if len(set(options.pictures)) == 1:
                raise
            missing.append(str(error))
        else:
            yield f"{path}{note}"
    yield from missing


def draw_class_bars(runs: Sequence[Path], out: Path) -> None:
    """Draw the IoU per class of evaluated runs into folder `out` (Fig. 8); print where the picture is.

    Of many classes it shows the 20 that differ most, the largest gain of the first run on top.

    Raises:
        FileNotFoundError, ValueError: see `compare_classes`.
    """
    rows, means = compare_classes(*runs)
    shown = sorted(rows[:MAX_CLASSES], key=lambda row: max(row[1][1:]) - row[1][0])
    create_folder(out)
    path = out / "class_iou_comparison.png"
    drawing.class_comparison(shown, short_names(*runs), means, path)
    note = f"  the {MAX_CLASSES} of {len(rows)} classes that differ most" if len(rows) > MAX_CLASSES else ""
    cli.say(f"{path}{note}")


def draw_comparisons(options: VisualizeConfig) -> int:
    """Draw what the compared runs predict for images, and with `samples` the truth and their errors (Fig. 1, 3).

    Returns:
        The exit status: 1 if any image could not be drawn, else 0.

    Raises:
        FileNotFoundError, ValueError: see `find_images`, `unept.pretrained.load_run` and `unept.data.build_dataset`; or
            the runs have different classes.
    """
    assert options.compare is not None
    device = cli.choose_device(options.device)
    found: list[FoundImage] = []
    missing = 0
    if options.images:
        found, missing = cli.find_named_images(options.images, options.recursive, options.out)
    loaded = [load_run(run, device) for run in options.compare]
    predictors = {
        name: (model, resolve(options.inference, model))
        for name, (_, model) in zip(short_names(*options.compare), loaded, strict=True)
    }
    for run, (_, model) in zip(options.compare, loaded, strict=True):
        if model.classes != loaded[0][1].classes:
            raise ValueError(f"{options.compare[0]} and {run} have different classes: compare runs on one data set")
    create_folder(options.out)

    def draw(name: Path, image: Tensor, truth: Tensor | None) -> str:
        path = result_path(options.out, name, "comparison.png")
        figures.draw_predictions(predictors, image.as_subclass(Tensor).to(device), truth, name.name, path)
        return str(path)

    if options.samples:
        dataset = loaded[0][0].data.build("val", options.root)
        check_classes(loaded[0][1], dataset)
        count = min(options.samples, len(dataset))
        for i in (n * len(dataset) // count for n in range(count)):
            image, labels = dataset[i]
            cli.say(draw(Path(dataset.name(i)), image, labels.as_subclass(Tensor)))
    failed = cli.process_images(found, lambda file: [draw(file.name, read_image(file.path), None)], failure="drawn")
    return max(failed, missing)


def visualize(options: VisualizeConfig) -> int:
    """Draw all pictures; print where they are.

    An image that can't be read is reported on stderr, and the others are still drawn.

    Returns:
        The exit status: 1 if any image could not be drawn, else 0.

    Raises:
        FileNotFoundError, ValueError: see `draw_class_bars`, `draw_comparisons`, `find_images`, `unept.cli.open_model`,
            `draw_image` and `sampling_layer`; or a run is compared with itself.
    """
    if options.compare is not None and len({run.resolve() for run in options.compare}) < len(options.compare):
        raise ValueError(f"--compare names a run twice: {', '.join(map(str, options.compare))}")
    if options.compare is not None and (options.images or options.samples):
        return draw_comparisons(options)
    if options.compare is not None:
        draw_class_bars(options.compare, options.out)
        return 0
    images, missing = cli.find_named_images(options.images, options.recursive, options.out)
    model, config = cli.open_model(options.run, options.device, options.inference, options.out)
    failed = cli.process_images(images, lambda found: draw_image(options, config, model, found), failure="drawn")
    return max(failed, missing)


def main() -> None:
    """Run the command line."""
    cli.run(lambda: visualize(tyro.cli(VisualizeConfig, prog="python -m unept.visualize")))


if __name__ == "__main__":
    main()
