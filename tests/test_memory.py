"""What cannot fit into memory is told before the system kills the process."""

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
