"""Draw the network of Fig. 2 as this code has it, with the file of each part: `python docs/draw_network.py`.

Writes docs/network.svg, which README shows. The drawing has a background of its own and colors for light and for dark
pages. It needs nothing but Python. Since the fonts of the reader are not known, the width of a text is estimated
generously, and a text that is wider than its box is an error.
"""

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

TARGET = Path(__file__).with_name("network.svg")
WIDTH, HEIGHT = 1104, 652
MODEL = "unept/model/"  # a file in this folder is drawn by its name, any other by its path

# Of each kind of text: size in pixels, and the mean width of a character in units of the size.
FONTS = {"title": (15, 0.6), "note": (13, 0.56), "file": (12, 0.62)}
LINE = 18  # pixels from one line of text to the next

STYLE = """
  text { font-family: ui-sans-serif, "Helvetica Neue", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 15px; font-weight: 600; }
  .note { font-size: 13px; }
  .file { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; font-size: 12px; fill: #0550ae; }
  .page { fill: #ffffff; }
  .panel { fill: #f6f8fa; stroke: #d1d9e0; }
  .part { fill: #ffffff; stroke: #59636e; }
  .kernel { fill: #fff1e5; stroke: #bc4c00; }
  .data { fill: #dafbe1; stroke: #1a7f37; }
  .arrow { fill: none; stroke: #59636e; stroke-width: 1.5; }
  .head { fill: #59636e; }
  .call { fill: none; stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 3 3; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .file { fill: #79c0ff; }
    .page { fill: #0d1117; }
    .panel { fill: #151b23; stroke: #3d444d; }
    .part { fill: #212830; stroke: #9198a1; }
    .kernel { fill: #3d1f0c; stroke: #f0883e; }
    .data { fill: #12331f; stroke: #3fb950; }
    .arrow { stroke: #9198a1; }
    .head { fill: #9198a1; }
    .call { stroke: #f0883e; }
  }
"""


@dataclass(frozen=True)
class Box:
    """A rectangle with centered lines of text: a title, notes, and the files that hold this part."""

    x: int
    y: int
    width: int
    height: int
    kind: str
    """A class of STYLE: part, kernel or data."""
    title: str
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Paths from the root of the repository."""

    def draw(self) -> list[str]:
        """The rectangle and its lines, as elements of SVG."""
        lines = [("title", self.title), *(("note", note) for note in self.notes)]
        lines += [("file", path.removeprefix(MODEL)) for path in self.files]
        center = self.x + self.width // 2
        first = self.y + self.height // 2 - LINE * (len(lines) - 1) // 2 + 5
        elements = [rectangle(self.x, self.y, self.width, self.height, self.kind)]
        for i, (font, line) in enumerate(lines):
            size, character = FONTS[font]
            if size * character * len(line) > self.width - 8 or LINE * len(lines) > self.height:
                raise ValueError(f"{line!r} does not fit into the box {self.title!r}: widen the box")
            elements.append(text(center, first + i * LINE, line, font, anchor="middle"))
        return elements


TRANSFORMER = (MODEL + "transformer.py", MODEL + "attention.py")
PREDICTION = (MODEL + "output.py", "kernels/upsample/")
BOXES = (
    Box(16, 214, 100, 76, "data", "Images", ("(B, 3, H, W)",)),
    # The context branch.
    Box(466, 34, 296, 46, "kernel", "Sparse sampling attention", files=("kernels/sparse_attention/",)),
    Box(146, 100, 136, 114, "part", "Backbone", ("any timm model,", "L feature maps"), (MODEL + "backbone.py",)),
    Box(306, 100, 136, 114, "part", "Pyramid", ("1x1 convolutions,", "one sequence"), (MODEL + "backbone.py",)),
    Box(466, 100, 136, 114, "part", "Encoder", ("2 layers of", "self-attention"), TRANSFORMER),
    Box(626, 100, 136, 114, "part", "Decoder", ("2 layers: self-,", "cross-attention"), TRANSFORMER),
    Box(785, 100, 136, 114, "part", "Classifier", ("1x1 convolution:", "Ŷ at 1/8"), (MODEL + "network.py",)),
    # The spatial branch, the refinement and the prediction.
    Box(146, 392, 136, 106, "part", "Convolutions", ("three of 3x3,", "stride 2 each"), (MODEL + "spatial.py",)),
    Box(466, 388, 136, 52, "part", "Boundary head", files=(MODEL + "boundary.py",)),
    Box(466, 458, 136, 52, "part", "Direction head", files=(MODEL + "boundary.py",)),
    Box(626, 272, 136, 92, "part", "Refinement", ("where to read Ŷ:", "p + offset(p)"), (MODEL + "boundary.py",)),
    Box(785, 268, 136, 100, "data", "Prediction", ("Ŷ_ref, class ids", "(B, H, W)"), PREDICTION),
    # The loss.
    Box(16, 552, 100, 60, "data", "Labels Y", ("(B, H, W)",)),
    Box(466, 552, 296, 60, "kernel", "Distance and direction", files=("kernels/boundary_targets.py",)),
    Box(943, 104, 146, 62, "part", "λ₁ CE(Y, Ŷ)", files=("kernels/upsample/",)),
    Box(943, 287, 146, 62, "part", "λ₂ CE(Y, Ŷ_ref)", files=("kernels/upsample/",)),
    Box(943, 396, 146, 36, "part", "λ₃ L_bound"),
    Box(943, 466, 146, 36, "part", "λ₄ L_dir"),
)

# Lines through points (x, y), each with a head at its end.
ARROWS = (
    ((66, 214), (66, 157), (146, 157)),
    ((66, 290), (66, 445), (146, 445)),
    ((282, 157), (306, 157)),
    ((442, 157), (466, 157)),
    ((602, 157), (626, 157)),
    ((762, 157), (785, 157)),
    ((853, 214), (853, 268)),
    ((921, 135), (943, 135)),
    ((282, 445), (374, 445), (374, 244), (694, 244), (694, 214)),
    ((374, 414), (466, 414)),
    ((374, 445), (374, 484), (466, 484)),
    ((602, 414), (943, 414)),
    ((602, 484), (943, 484)),
    ((660, 414), (660, 364)),
    ((728, 484), (728, 364)),
    ((762, 318), (785, 318)),
    ((921, 318), (943, 318)),
    ((116, 582), (466, 582)),
    ((290, 582), (290, 538), (980, 538), (980, 524)),
    ((762, 582), (1052, 582), (1052, 524)),
)
DOTS = ((374, 414), (374, 445), (660, 414), (728, 484), (290, 582))  # where a line leaves another
CALLS = (((534, 100), (534, 80)), ((694, 100), (694, 80)))  # from a part to the kernels that it calls


def rectangle(x: int, y: int, width: int, height: int, kind: str) -> str:
    """A rectangle with round corners."""
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def text(x: int, y: int, line: str, font: str, anchor: str = "start") -> str:
    """One line of text. Of other text than a file's name, a word after an underscore is a subscript."""
    content = escape(line)
    if font != "file":
        content = re.sub(
            r"_([a-z]+)", r'<tspan dy="3" font-size="10">\1</tspan><tspan dy="-3">&#8203;</tspan>', content
        )
    return f'<text class="{font}" x="{x}" y="{y}" text-anchor="{anchor}">{content}</text>'


def polyline(points: tuple[tuple[int, int], ...], kind: str) -> str:
    """A line through points."""
    marker = ' marker-end="url(#head)"' if kind == "arrow" else ""
    return f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"{marker}/>'


def draw() -> str:
    """The drawing, as the text of an SVG file."""
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-label="UN-EPT: both branches, the refinement and the loss, with the file of each part">',
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0,0 L8,4 L0,8 z"/></marker>',
        rectangle(0, 0, WIDTH, HEIGHT, "page"),
        rectangle(132, 12, 798, 214, "panel"),
        text(146, 36, "Context branch (Sec. 3.1)", "title"),
        rectangle(132, 258, 798, 266, "panel"),
        text(146, 282, "Spatial branch (Sec. 3.2)", "title"),
        text(386, 238, "context queries (B, 256, H/8, W/8)", "note"),
        rectangle(938, 12, 156, 512, "panel"),
        text(1016, 36, "Loss (Eq. 7)", "title", anchor="middle"),
        text(1016, 56, "loss.py", "file", anchor="middle"),
        text(16, 640, "Files without a folder are in unept/model/; network.py joins the parts.", "note"),
        text(530, 640, "Orange: operators, in Triton on a GPU and in PyTorch elsewhere.", "note"),
    ]
    elements += [polyline(points, "call") for points in CALLS]
    elements += [polyline(points, "arrow") for points in ARROWS]
    elements += [f'<circle class="head" cx="{x}" cy="{y}" r="3"/>' for x, y in DOTS]
    elements += [element for box in BOXES for element in box.draw()]
    return "\n".join([*elements, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
