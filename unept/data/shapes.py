"""`shapes`: textured polygons and ellipses, made in memory; nothing to download, and every label is exact.

Color alone does not tell the classes apart: classes of similar colors differ in texture, every object varies in color,
period and direction, and light and noise change over the image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision import tv_tensors

from ..validation import check_choice
from .base import SPLITS, DatasetError, SegmentationDataset

Color = tuple[int, int, int]
LENGTHS = {"train": 4000, "val": 200, "test": 200}


@dataclass(frozen=True)
class Material:
    """How a class looks: two colors (r, g, b), mixed by a pattern with a period from `period`, in pixels."""

    name: str
    label_color: Color
    colors: tuple[Color, Color]
    pattern: str
    period: tuple[float, float]


MATERIALS = (
    Material("background", (60, 60, 60), ((176, 168, 152), (118, 122, 124)), "clouds", (24, 48)),
    Material("brick", (200, 60, 40), ((178, 74, 54), (222, 186, 160)), "grid", (9, 13)),
    Material("coral", (255, 140, 120), ((214, 96, 78), (150, 40, 40)), "dots", (7, 10)),
    Material("grass", (60, 180, 60), ((120, 176, 70), (44, 100, 40)), "stripes", (4, 7)),
    Material("moss", (0, 100, 60), ((104, 150, 70), (52, 92, 54)), "clouds", (6, 10)),
    Material("water", (60, 140, 240), ((70, 140, 196), (160, 206, 226)), "waves", (7, 11)),
    Material("denim", (40, 50, 140), ((58, 88, 150), (120, 150, 196)), "checks", (7, 10)),
    Material("honey", (250, 200, 40), ((240, 190, 70), (176, 116, 30)), "dots", (7, 10)),
)

# The share of the second color as a function of two phases in radians, before it is clipped to 0..1. The factors give
# soft edges.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda u, v: 0.5 + np.sin(u),
    "waves": lambda u, v: 0.5 + np.sin(u + 1.5 * np.sin(v / 2)),
    "dots": lambda u, v: 1.5 * (np.cos(u) + np.cos(v)) - 0.5,
    "grid": lambda u, v: 2 * np.maximum(np.cos(u), np.cos(v)) - 1.2,
    "checks": lambda u, v: 0.5 + 2 * np.sin(u) * np.sin(v),
}
NOISE = 10.0  # standard deviation of every pixel's noise, in levels of 0..255
COLOR_JITTER = 12.0  # standard deviation of an object's color, in levels of 0..255


class Shapes(SegmentationDataset):
    """Textured polygons and ellipses on a textured background, 8 classes; later objects hide earlier ones.

    An image holds three to eight objects. Sample i is a pure function of (seed, split, i, size).

    Args:
        root: must be None, since there are no files.
        split: `"train"`, `"val"` or `"test"`; each has samples of its own.
        size: height and width of the images in pixels.
        length: number of samples; None means 4000 for training, 200 otherwise.
        seed: of all samples.

    Raises:
        DatasetError: if root is given.
        ValueError: if size is below 16, or length below 1.
    """

    classes = tuple(material.name for material in MATERIALS)
    palette = tuple(material.label_color for material in MATERIALS)

    def __init__(
        self, root: None = None, split: str = "train", size: int = 128, length: int | None = None, seed: int = 0
    ):
        if root is not None:
            raise DatasetError(f"shapes is made in memory and has no files, but root is {root}: omit it")
        check_choice("split", split, *SPLITS)
        if size < 16:
            raise ValueError(f"size is {size} pixels; it must be at least 16")
        if length is not None and length < 1:
            raise ValueError(f"length is {length}; it must be at least 1")
        self.split = split
        self.size = size
        self.length = LENGTHS[split] if length is None else length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        if not 0 <= i < self.length:
            raise IndexError(f"there is no sample {i}: the dataset has {self.length}")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), i))
        objects, materials = draw_objects(rng, self.size)
        image = paint(rng, objects, materials)
        labels = materials[objects]
        return tv_tensors.Image(torch.from_numpy(image)), tv_tensors.Mask(torch.from_numpy(labels))

    def name(self, i: int) -> str:
        """`shapes_<split>_<i>`."""
        return f"shapes_{self.split}_{i:05d}"


def draw_objects(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the objects of a sample: which one is seen at each pixel, and what each is made of.

    Returns:
        objects: uint8 (size, size), the number of the object seen at each pixel; 0 is the background.
        materials: uint8 (number of objects,), the class id of each object.
    """
    count = rng.integers(3, 9)
    materials = np.concatenate([[0], rng.integers(1, len(MATERIALS), count)]).astype(np.uint8)
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    for number in range(1, count + 1):
        outline = polygon(rng) if rng.random() < 0.5 else ellipse(rng)
        centre, radius = rng.uniform(0.05, 0.95, 2), rng.uniform(0.12, 0.3)
        points = (centre + radius * outline) * size
        draw.polygon([(x, y) for x, y in points.tolist()], fill=number)
    return np.array(canvas), materials


def paint(rng: np.random.Generator, objects: np.ndarray, materials: np.ndarray) -> np.ndarray:
    """Paint the objects of `draw_objects`: uint8 (3, size, size), RGB."""
    size = len(objects)
    image: np.ndarray = np.empty((3, size, size), np.float32)
    for number, material in enumerate(materials):
        inside = objects == number
        rows, columns = (np.flatnonzero(inside.any(axis)).tolist() for axis in (1, 0))
        if not rows:  # hidden by later objects
            continue
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        painted = surface(rng, MATERIALS[material], bottom - top, right - left)
        np.copyto(image[:, top:bottom, left:right], painted, where=inside[top:bottom, left:right])
    light = 0.75 + 0.5 * clouds(rng, size, size, size / 2)
    noise = rng.standard_normal((3, size, size), dtype=np.float32)
    return (image * light + NOISE * noise).clip(0, 255).astype(np.uint8)


def surface(rng: np.random.Generator, material: Material, height: int, width: int) -> np.ndarray:
    """A rectangle of a material, with a random tint, period and direction: float32 (3, height, width)."""
    period = rng.uniform(*material.period)
    if material.pattern == "clouds":
        mix = clouds(rng, height, width, period)
    else:
        angle = rng.uniform(0, math.pi)
        phase_u, phase_v = rng.uniform(0, 2 * math.pi, 2)
        y, x = np.ogrid[:height, :width]
        cos, sin = 2 * math.pi / period * np.array([math.cos(angle), math.sin(angle)])
        u = (phase_u + cos * x + sin * y).astype(np.float32)
        v = (phase_v - sin * x + cos * y).astype(np.float32)
        mix = PATTERNS[material.pattern](u, v).clip(0, 1)
    first, second = np.float32(material.colors)
    tint = np.float32(COLOR_JITTER * rng.standard_normal(3))
    return (first + tint)[:, None, None] + (second - first)[:, None, None] * mix


def clouds(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Smooth random values, mostly in 0..1, that vary over `period` pixels: float32 (height, width)."""
    coarse = rng.random((math.ceil(height / period) + 1, math.ceil(width / period) + 1), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def polygon(rng: np.random.Generator) -> np.ndarray:
    """A random outline of three to seven corners around the origin, at distances 0.6 to 1.2: (corners, 2), (x, y)."""
    corners = rng.integers(3, 8)
    angle = rng.uniform(0, 2 * math.pi) + 2 * math.pi / corners * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners))
    return rng.uniform(0.6, 1.2, (corners, 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)


def ellipse(rng: np.random.Generator) -> np.ndarray:
    """A random ellipse around the origin, with half-axes 1 and 0.4 to 1, as an outline: (48, 2), (x, y)."""
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x, y = np.cos(t), rng.uniform(0.4, 1) * np.sin(t)
    angle = rng.uniform(0, math.pi)
    return np.stack([x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)], 1)
