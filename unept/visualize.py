"""`python -m unept.visualize IMAGE...`: the paper's pictures from a trained model (Fig. 3-8, Appendix A-D)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import tyro

from . import cli
from .data import DatasetError
from .data.finding import FoundImage
from .data.reading import read_image
from .evaluation.comparison import compare_classes, short_names
from .files import result_path
from .inference import InferenceConfig, InferenceOptions, infer
from .model.attention import SparseSamplingAttention
from .model.network import UNEPT
from .pictures import drawing, figures
from .pictures.recording import Attention, NotInModel, record, sampling_layer

Picture = Literal["refinement", "pyramid", "attention", "points"]
ATTENTIONS: dict[Attention, str] = {
    "decoder": "decoder's cross-attention",
    "decoder-self": "decoder's self-attention",
    "encoder": "encoder's self-attention",
}
MAX_CLASSES = 20  # in the comparison, as in Fig. 8


@dataclass
class VisualizeConfig:
    """Look into a trained model. Writes for each image NAME_refinement.png, NAME_pyramid.png, NAME_attention.png and
    NAME_points.png; with --compare, class_iou_comparison.png.
    """

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, or folders of them."""
    recursive: bool = False
    """Also take the images in subfolders; their pictures go to subfolders of the same names."""
    run: Path | None = None
    """Run folder that unept.train wrote, folder that save_pretrained wrote, or ORG/NAME of a repository on the Hugging
    Face hub. None: the newest run folder with a model under runs/."""
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
    compare: tuple[Path, Path] | None = None
    """Two run folders that unept.evaluate measured: draw their IoU per class (Fig. 8), the largest gain of the first on
    top."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views of the refinement picture; the other pictures show a single view at scale 1."""
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


def draw_image(
    options: VisualizeConfig, config: InferenceConfig, model: UNEPT, layer: SparseSamplingAttention, found: FoundImage
) -> Iterator[str]:
    """Draw the pictures of one image that the options name.

    Yields:
        A line for each picture that says where it is; then a line for each picture that the network does not allow.

    Raises:
        DatasetError: if the image can't be read, or the query lies outside it.
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
    recording = record(model, image, config, query, layer)
    missing = []
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


def draw_comparison(first: Path, second: Path, out: Path) -> None:
    """Draw the IoU per class of two evaluated runs into folder `out`; print where the picture is.

    Raises:
        FileNotFoundError, ValueError: see `compare_classes`.
    """
    rows, means = compare_classes(first, second)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "class_iou_comparison.png"
    drawing.class_comparison(rows[:MAX_CLASSES], short_names(first, second), means, path)
    note = f"  the first {MAX_CLASSES} of {len(rows)} classes" if len(rows) > MAX_CLASSES else ""
    print(f"{path}{note}")


def visualize(options: VisualizeConfig) -> int:
    """Draw all pictures; print where they are.

    An image that can't be read is reported on stderr, and the others are still drawn.

    Returns:
        The exit status: 1 if any image could not be drawn, else 0.

    Raises:
        FileNotFoundError, ValueError: see `draw_comparison`, `find_images`, `unept.cli.open_model`, `draw_image` and
            `sampling_layer`.
    """
    if options.compare is not None:
        draw_comparison(*options.compare, options.out)
    if not options.images:
        return 0
    images, missing = cli.find_named_images(options.images, options.recursive, options.out)
    model, config = cli.open_model(options.run, options.device, options.inference, options.out)
    layer = sampling_layer(model, options.points_of, options.layer)
    failed = cli.process_images(images, lambda found: draw_image(options, config, model, layer, found), failure="drawn")
    return max(failed, missing)


def main() -> None:
    """Run the command line."""
    cli.run(lambda: visualize(tyro.cli(VisualizeConfig, prog="python -m unept.visualize")))


if __name__ == "__main__":
    main()
