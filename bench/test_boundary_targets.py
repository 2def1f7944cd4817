"""Boundary targets against SciPy's distance transforms: `pytest bench/test_boundary_targets.py --benchmark-only`.

Labels are those of the `shapes` data set, or of CamVid where UNEPT_CAMVID names a folder of its label images
(`.../valannot`). Every variant has to give SciPy's distances, as far as they don't saturate, before it is timed.
"""

import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from unept.kernels import boundary_targets, use_backend

from unept.data.camvid import VOID
from unept.data.shapes import Shapes

RADIUS = 5
EXACT = RADIUS + 2 * 2**0.5  # up to here
VARIANTS = [("torch", "cpu"), ("scipy", "cpu")]
if torch.cuda.is_available():
    VARIANTS = [("triton", "cuda"), ("torch", "cuda"), *VARIANTS]
BATCH = 16 if torch.cuda.is_available() else 4


@pytest.fixture(scope="module", params=["shapes", *(["camvid"] if "UNEPT_CAMVID" in os.environ else [])])
def labels(request):
    """(name, class ids (B, H, W) uint8, 255 where ignored)."""
    if request.param == "shapes":
        return "shapes", torch.stack([Shapes(size=480)[i][1].as_subclass(torch.Tensor) for i in range(BATCH)])
    files = sorted(Path(os.environ["UNEPT_CAMVID"]).glob("*.png"))
    spread = files[:: max(1, len(files) // BATCH)][:BATCH]
    maps = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in spread])
    return "camvid", maps.masked_fill_(maps == VOID, 255)


def scipy_targets(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance and direction of one image (H, W), by a distance transform and two correlations a class."""
    ndimage = pytest.importorskip("scipy.ndimage")
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


def scipy_batch(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distance, direction = zip(*(scipy_targets(image) for image in labels.numpy()), strict=True)
    return torch.from_numpy(np.stack(distance)), torch.from_numpy(np.stack(direction))


@pytest.mark.benchmark(group="boundary_targets")
@pytest.mark.parametrize(("backend", "device"), VARIANTS, ids=lambda name: name)
def test_boundary_targets(benchmark, labels, backend, device):
    name, maps = labels
    want_distance, want_direction = scipy_batch(maps)
    maps = maps.to(device)

    def run():
        result = scipy_batch(maps) if backend == "scipy" else boundary_targets(maps, radius=RADIUS)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    with use_backend("auto" if backend == "scipy" else backend):
        distance, direction = (found.cpu() for found in run())
        exact = want_distance <= EXACT
        torch.testing.assert_close(distance[exact], want_distance[exact])
        assert torch.equal(direction == 255, want_direction == 255)
        # Rounding decides on the edge between two bins, and no gradient has no direction.
        assert (direction == want_direction).float().mean() > 0.999
        benchmark.extra_info.update(
            labels=name,
            size=list(maps.shape),
            device=torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
        )
        benchmark.pedantic(run, rounds=10, iterations=20 if device == "cuda" else 1, warmup_rounds=2)
