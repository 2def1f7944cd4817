"""`python -m unept.demo`: a page in the browser that segments the images which are dropped on it, by Gradio."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from . import cli
from .colors import to_pil
from .data.files import read_image
from .inference import InferenceConfig, InferenceOptions
from .model import UNEPT
from .optional import require
from .pictures.explorer import draw_points, explore
from .predict import describe

HELP = """Drop an image, then click a pixel of it to see the points from which the decoder reads its class.
The slider compares the prediction before (left) and after refinement (right)."""


@dataclass
class DemoConfig:
    """Serve a page that segments images. Needs gradio (pip install gradio)."""

    run: Path | None = None
    """Run folder that unept.train wrote, folder that save_pretrained wrote, ORG/NAME of a repository on the Hugging
    Face hub, or camvid_tiny, the demo model. None: the newest run folder with a model under runs/, or the demo model if
    there is none."""
    host: str = "127.0.0.1"
    """Address to serve on. 0.0.0.0 lets other machines in."""
    port: int | None = None
    """Port. None: the first free one from 7860 on."""
    inference: cli.InferenceArguments = field(default_factory=InferenceOptions)
    """Views and refinement."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""


class Page:
    """What the page does with an image; each method is called by one event.

    Args:
        model: the network.
        config: how images are seen.
    """

    def __init__(self, model: UNEPT, config: InferenceConfig):
        self.model, self.config = model, config

    def segment(self, file: str | None) -> tuple[Any, Any, Any, str]:
        """The pictures of an image file: (unrefined, refined), boundary and confidence as PIL images, and a line.

        The line names the most frequent classes and the share of the pixels that refinement changes. Without a file
        there are no pictures.
        """
        if file is None:
            return None, None, None, ""
        found = explore(self.model, read_image(Path(file)), self.config)
        boundary = None if found.boundary is None else to_pil(found.boundary)
        line = f"{describe(found.ids, self.model.classes)}. Refinement changes {found.changed:.2%} of the pixels."
        return (to_pil(found.unrefined), to_pil(found.refined)), boundary, to_pil(found.confidence), line

    def points(self, file: str, x: int, y: int) -> Image.Image:
        """A picture of the points that the decoder reads for pixel (x, y) of an image file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "points.png"
            draw_points(self.model, read_image(Path(file)), self.config, (x, y), path)
            with Image.open(path) as picture:
                return picture.convert("RGB")


def build(model: UNEPT, config: InferenceConfig) -> Any:
    """Build the page, a `gradio.Blocks`.

    Raises:
        ValueError: gradio is not installed.
    """
    gr = require("gradio", "the page in the browser")
    page = Page(model, config)

    def click(file: str, event: gr.SelectData) -> Image.Image:  # type: ignore[name-defined]  # what gradio reads
        x, y = event.index
        return page.points(file, x, y)

    with gr.Blocks(title="UN-EPT", analytics_enabled=False) as blocks:
        gr.Markdown(f"# UN-EPT\n{HELP}")
        with gr.Row():
            image = gr.Image(type="filepath", label="image", elem_id="image")
            slider = gr.ImageSlider(type="pil", label="before and after refinement", elem_id="slider")
        line = gr.Textbox(label="classes", elem_id="classes")
        with gr.Row():
            boundary = gr.Image(label="boundary, from 0 (blue) to 1 (yellow)", elem_id="boundary", interactive=False)
            confidence = gr.Image(label="confidence, likewise", elem_id="confidence", interactive=False)
        points = gr.Image(show_label=False, elem_id="points", interactive=False)
        image.change(page.segment, image, [slider, boundary, confidence, line])
        image.select(click, image, points)
    return blocks


def demo(options: DemoConfig) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        FileNotFoundError, ValueError: see `unept.cli.open_model` and `build`.
    """
    require("gradio", "the page in the browser")  # before the model is loaded
    model, config = cli.open_model(options.run, options.device, options.inference, None)
    build(model, config).launch(server_name=options.host, server_port=options.port)


def main() -> None:
    """Run the command line."""
    cli.run(lambda: demo(tyro.cli(DemoConfig, prog="python -m unept.demo")))


if __name__ == "__main__":
    main()
