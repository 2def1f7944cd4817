"""What cannot fit into memory is told before the system kills the process."""

import platform
import resource
import subprocess
import sys

import pytest
import torch

from tests.helpers.known_scores import Halves, Shifted
from tests.helpers.runs import small_model
from unept import Segmenter
from unept.evaluation.evaluator import evaluate_model
from unept.inference import InferenceConfig
from unept.memory import BYTES_A_PIXEL, require_memory


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
    assert len(Segmenter(segmenter.model, window=32)(picture)) == 2
    evaluate_model(Shifted(), Halves(), InferenceConfig(window=32), cpu, boundary_tolerance=3)


KEPT = """
import resource
from pathlib import Path
import torch
from unept.memory import keep_freed_memory, require_memory
keep_freed_memory()
def resident():
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 26)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = resident()
try:
    require_memory(1 << 60, "")
except MemoryError:
    print(pages, kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what it likes")
def test_freed_memory_is_kept_until_it_is_asked_for():
    command = [sys.executable, "-c", KEPT]
    pages, returned = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(pages) < (1 << 28) // resource.getpagesize() // 10  # 256 MiB come from the system page by page otherwise
    assert int(returned) > 1 << 27
