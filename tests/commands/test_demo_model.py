"""The model that ships with the package: it is whole, it is found without a run, and it sees a street as a street."""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unept import Segmenter, predict, train
from unept.data.camvid import CLASSES
from unept.pretrained import DEMO

STREET = Path(__file__).parents[2] / "docs" / "street.jpg"
SHA256 = "7d0b34727276bf7b62298d7ec1db77bc74d1d6a75a425cd9f5a2aa77ace99cfd"


def test_the_weights_are_those_that_were_measured():
    weights = (DEMO / "model.safetensors").read_bytes()
    assert len(weights) <= 12e6
    assert hashlib.sha256(weights).hexdigest() == SHA256


def test_a_segmenter_without_a_source_is_the_demo_model_and_says_so():
    with pytest.warns(UserWarning, match="demo model.*CamVid, for research"):
        segmenter = Segmenter(device="cpu")
    assert segmenter.classes == tuple(name for name, _ in CLASSES)
    found = segmenter(STREET)
    names = np.array(segmenter.classes)[found.ids.numpy()]
    assert (names[-90:, 120:360] == "Road").mean() > 0.9  # in front of the car
    shares = {name: (names == name).mean() for name in segmenter.classes}
    assert min(shares["Building"], shares["Road"]) > 0.1
    assert shares["Fence"] < 0.1
    assert found.confidence.mean() > 0.8
    assert 0.02 < (found.boundary > 0.5).float().mean() < 0.5


def test_it_is_what_one_fine_tunes(tmp_path, monkeypatch, capsys):
    """On a folder of two classes: all but the classifier is taken."""
    for split in ("train", "val"):
        for kind, mode, pixels in (("images", "RGB", (90, 90, 90)), ("labels", "L", 0)):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True)
            for i in range(2):
                picture = Image.new(mode, (64, 48), pixels)
                picture.paste(1 if mode == "L" else (200, 50, 50), (8 * i, 8, 8 * i + 24, 40))
                picture.save(folder / f"{i}.png")
    (tmp_path / "data" / "classes.txt").write_text("background\nthing\n")
    monkeypatch.chdir(tmp_path)
    options = [
        "--short-side",
        "48",
        "--crop-size",
        "48",
        "48",
        "--batch-size",
        "2",
        "--iterations",
        "1",
        "--workers",
        "0",
    ]
    assert train.train(["folder", "--root", "data", "--init-from", "camvid_tiny", "--out", "tuned", *options]) == 0
    assert re.search(r"Started from camvid_tiny: .*anew: classifier", capsys.readouterr().out)
    assert Segmenter("tuned", device="cpu").classes == ("background", "thing")


def test_a_command_without_a_run_takes_it_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["predict", str(STREET), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        predict.main()
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert re.search(r"no model under runs/\. This is the demo model .* CamVid, for research", out)
    assert "Road" in out
    assert (tmp_path / "predictions" / "street_overlay.png").exists()
