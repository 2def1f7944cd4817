"""Boundary targets against SciPy's distance transforms, one a class.

Labels are those of the `shapes` data set, or of CamVid where UNEPT_CAMVID names a folder of its label images
(`.../valannot`). Every variant has to give SciPy's distances, as far as they don't saturate, before it is timed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unept.data.camvid import VOID
from unept.data.shapes import Shapes
from unept.kernels import boundary_targets, use_backend

from .baselines import needs_cuda
from .harness import DEVICE, Group, Unavailable, Variant

RADIUS = 5
EXACT = RADIUS + 2 * 2**0.5  # up to here
VARIANTS = ["unept triton", "unept torch", "scipy"]
BASELINE = "scipy"


@dataclass
class Case:
    """One group: label maps (B, H, W) uint8, 255 where ignored."""

    source: str
    batch: int

    @property
    def name(self) -> str:
        """The group's name in the report, unique to it."""
        return f"boundary_targets, {self.source}, B={self.batch}"

    @cached_property
    def labels(self) -> Tensor:
        """On the CPU."""
        if self.source == "shapes":
            return torch.stack([Shapes(size=480)[i][1].as_subclass(torch.Tensor) for i in range(self.batch)])
        files = sorted(Path(os.environ["UNEPT_CAMVID"]).glob("*.png"))
        spread = files[:: max(1, len(files) // self.batch)][: self.batch]
        maps = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in spread])
        return maps.masked_fill_(maps == VOID, 255)

    @cached_property
    def wanted(self) -> tuple[Tensor, Tensor]:
        """SciPy's distances and directions."""
        return scipy_batch(self.labels)


def cases(full: bool, device: str) -> list[Case]:
    """Four maps, 16 in full."""
    return [
        Case(source, 16 if full else 4) for source in ("shapes", *(["camvid"] if "UNEPT_CAMVID" in os.environ else []))
    ]


def scipy_targets(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance and direction of one image (H, W), by a distance transform and two correlations a class."""
    try:
        from scipy import ndimage
    except ModuleNotFoundError:
        raise Unavailable("distances are checked against SciPy's: pip install scipy") from None
    dy, dx = np.mgrid[-2:3, -2:3].astype(np.float32)
    square = np.maximum(dx * dx + dy * dy, 1)
    kernels = dx / square, dy / square
    ignored = labels == 255
    distance = np.full(labels.shape, np.inf, np.float32)
    gradient = np.zeros((2, *labels.shape), np.float32)
    # Ignored and outside pixels count as being as far as the pixel that looks at them.
    left_out = [ndimage.correlate(ignored.astype(np.float32), kernel, mode="constant", cval=1) for kernel in kernels]
    for label in np.unique(labels[~ignored]):
        own = labels == label
        if (own | ignored).all():
            continue
        of_class = ndimage.distance_transform_edt(own | ignored).astype(np.float32) * own
        distance[own] = of_class[own]
        for axis, kernel in enumerate(kernels):
            total = ndimage.correlate(of_class, kernel, mode="constant") + left_out[axis] * of_class
            gradient[axis, own] = total[own]
    bins = np.round((np.arctan2(gradient[1], gradient[0]) + np.pi) * (8 / (2 * np.pi))).astype(np.int64) % 8
    return distance, np.where((distance > RADIUS) | ignored, 255, bins)


def scipy_batch(labels: Tensor) -> tuple[Tensor, Tensor]:
    distance, direction = zip(*(scipy_targets(image) for image in labels.numpy()), strict=True)
    return torch.from_numpy(np.stack(distance)), torch.from_numpy(np.stack(direction))


def gate(case: Case, run: Callable[[], tuple[Tensor, Tensor]]) -> None:
    distance, direction = (found.cpu() for found in run())
    wanted_distance, wanted_direction = case.wanted
    exact = wanted_distance <= EXACT
    torch.testing.assert_close(distance[exact], wanted_distance[exact])
    assert torch.equal(direction == 255, wanted_direction == 255)
    # Rounding decides on the edge between two bins, and no gradient has no direction.
    assert (direction == wanted_direction).float().mean() > 0.999


def prepare(case: Case, name: str) -> Variant:
    """The variant `name` of a case."""
    if name == "unept triton":
        needs_cuda("Triton")
    if name == "scipy":
        run = partial(scipy_batch, case.labels)
    else:
        run = partial(boundary_targets, case.labels.to(DEVICE), radius=RADIUS)
    backend = "triton" if name == "unept triton" else "torch"
    context = partial(use_backend, backend)
    return Variant(step=run, gate=partial(gate, case, run), context=context, on_gpu=name != "scipy")


def test_boundary_targets(samples, case, variant):
    shape = tuple(case.labels.shape)
    group = Group(
        name=case.name,
        prepare=partial(prepare, case),
        baseline=BASELINE,
        info={"shape": "x".join(map(str, shape)), "dtype": "uint8"},
        min_bytes=case.labels.numel() * (1 + 4 + 8),
    )
    samples(group)
