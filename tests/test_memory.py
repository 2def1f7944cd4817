"""What cannot fit into memory is told before the system kills the process."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.known_scores import Halves, Shifted
from tests.helpers.runs import small_model
from unept import Segmenter
from unept.colors import to_pil
from unept.data.finding import FoundImage
from unept.evaluation.evaluator import evaluate_model
from unept.inference import InferenceConfig
from unept.memory import BYTES_A_PIXEL, require_memory, require_memory_for_images
from unept.visualize import VisualizeConfig, draw_image


def test_an_image_that_cannot_be_seen_whole_is_refused_with_advice(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 9000000 kB\nMemAvailable:    {BYTES_A_PIXEL} kB\n")
    require_memory(1024, "with a.png: --window 512", meminfo)
    with pytest.raises(MemoryError, match=r"^out of memory with a\.png: --window 512$"):
        require_memory(1025, "with a.png: --window 512", meminfo)
    require_memory(10**12, "where nothing is known", tmp_path / "absent")


def test_every_way_to_see_images_asks_for_memory(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemAvailable: 10 kB\n")
    monkeypatch.setattr("unept.memory.MEMINFO", tmp_path / "meminfo")
    segmenter, cpu = Segmenter(small_model()), torch.device("cpu")
    picture = torch.zeros(2, 3, 64, 40, dtype=torch.uint8)
    with pytest.raises(MemoryError, match=r"^out of memory with 2 images of 40x64 pixels: .*window=512"):
        segmenter(picture)
    with pytest.raises(MemoryError, match=r"^out of memory with an image of 32x16 pixels: --window 512"):
        evaluate_model(Shifted(), Halves(), InferenceConfig(), cpu, boundary_tolerance=3)
    to_pil(picture[0]).save(tmp_path / "a.png")
    found = FoundImage(tmp_path / "a.png", Path("a"))
    lines = draw_image(VisualizeConfig((found.path,), out=tmp_path), InferenceConfig(window=32), segmenter.model, found)
    with pytest.raises(MemoryError, match=r"a\.png, 40x64 pixels: --short-side"):
        next(iter(lines))
    assert len(Segmenter(segmenter.model, window=32)(picture)) == 2
    evaluate_model(Shifted(), Halves(), InferenceConfig(window=32), cpu, boundary_tolerance=3)


@pytest.mark.parametrize(
    "options",
    [{"short_side": 64}, {"long_side": 4096}, {"scales": (0.5, 64.0)}],
    ids=lambda options: next(iter(options)),
)
def test_the_view_is_what_takes_memory(tmp_path, monkeypatch, options):
    """A short side of 64 makes 64 x 4096 pixels of 1 x 64."""
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr("unept.memory.MEMINFO", meminfo)
    shape, cpu, pixels = (1, 64), torch.device("cpu"), 64 * 4096
    meminfo.write_text(f"MemAvailable: {BYTES_A_PIXEL * pixels // 1024} kB\n")
    require_memory_for_images(shape, InferenceConfig(**options), cpu, "")
    for more in ({"flip": True}, {"scales": (65.0,)}):
        with pytest.raises(MemoryError, match="out of memory"):
            require_memory_for_images(shape, InferenceConfig(**options | more), cpu, "")


KEPT = """
import resource
from pathlib import Path
import torch
from unept.allocator import freed_memory_kept
from unept.memory import require_memory

def resident():
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])

def take(times):
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(1 << 26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept():
    print(take(4))
    kept = resident()
    try:
        require_memory(1 << 60, "")
    except MemoryError:
        print(kept - resident())
    take(4)
    kept = resident()
print(kept - resident(), take(2))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what it likes")
def test_freed_memory_is_kept_until_it_is_asked_for_or_the_training_ends():
    """256 MiB come from the system page by page, or else from what was kept."""
    command = [sys.executable, "-c", KEPT]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    pages, when_asked, at_the_end, pages_after = map(int, found)
    whole = (1 << 28) // resource.getpagesize()
    assert pages < whole // 10
    assert when_asked > 1 << 27
    assert at_the_end > 1 << 27
    assert pages_after > whole // 2


LOADED = """
import resource
from pathlib import Path
import torch
from torchvision import tv_tensors
from unept.allocator import freed_memory_kept
from unept.data import SegmentationDataset, evaluation_loader

def resident():
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])

class Large(SegmentationDataset):
    classes, palette = ("a", "b"), ((0, 0, 0), (255, 255, 255))

    def __len__(self):
        return 1

    def __getitem__(self, i):
        before = resident()
        torch.zeros(1 << 26)
        kept = torch.full((3, 8, 8), min((resident() - before) >> 20, 255), dtype=torch.uint8)
        return tv_tensors.Image(kept), tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.uint8))

with freed_memory_kept():
    for workers in (1, 0):  # a process inherits what was kept before it
        for image, _ in evaluation_loader(Large(), workers=workers):
            print(int(image.max()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what it likes")
def test_a_process_that_loads_images_keeps_none_of_their_memory():
    """An image of 256 MiB, read in the training's process and in one of its own."""
    command = [sys.executable, "-c", LOADED]
    worker, here = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(here) > 128
    assert int(worker) < 32
