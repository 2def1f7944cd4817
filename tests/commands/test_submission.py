"""`python -m unept.submission` on small saved runs: names, ids and kinds of files, and reading them back."""

import fnmatch
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import layouts, runs
from unept import submission
from unept.config import TrainConfig
from unept.data import build_dataset
from unept.model.network import UNEPT
from unept.pretrained import DEMO

# What each benchmark's files call its classes, by training id; written down apart from the code.
FILE_IDS = {
    "ade20k": [*range(1, 151)],
    "cityscapes": [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33],
    "pascal_context": [*range(60)],
    "pascal_context 59": [*range(1, 60)],
    "camvid": [*range(11)],
}


def save_run(folder, case: str, root) -> UNEPT:
    """A run folder with an untrained model for a data set."""
    dataset, _, without = case.partition(" ")
    model = runs.small_model(len(FILE_IDS[case]))
    return runs.save_run(folder, model, dataset=dataset, root=root, background=not without)


def write(case: str, root, split: str, labelled: bool = True) -> list:
    """Three images of two sizes, whose labels hold every class and nothing else; (image, label) paths."""
    labels = [np.resize(np.uint8(FILE_IDS[case]), shape) for shape in ((12, 16), (16, 12), (13, 17))]
    return layouts.write(getattr(layouts, case.split()[0]), root, split, labels, labelled)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command; gives its exit status, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["submission", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            submission.main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def perfect(monkeypatch):
    """Let the model predict the labels of a data set, one after another."""

    def arrange(dataset) -> None:
        masks = iter([dataset[i][1] for i in range(len(dataset))])

        def predict_ids(model, image, config):
            mask = next(masks).as_subclass(torch.Tensor).long()
            assert image.shape[-2:] == mask.shape
            return mask[None]

        monkeypatch.setattr(submission, "predict_ids", predict_ids)

    return arrange


def test_cityscapes_test_set(tmp_path, command):
    """Without labels, from the network to the archive."""
    pairs = write("cityscapes", tmp_path / "data", "test", labelled=False)
    model = save_run(tmp_path / "run", "cityscapes", tmp_path / "nowhere")
    status, out, _ = command(tmp_path / "run", "--root", tmp_path / "data", "--workers", "1")
    assert status == 0
    assert "3 images of Cityscapes, 19 classes, split test. Written: " in out
    folder = tmp_path / "run" / "submission_test"
    assert {path.name for path in folder.iterdir()} == {"labels", "labels.zip", "view"}
    with zipfile.ZipFile(folder / "labels.zip") as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == len(pairs)
        for image, _ in pairs:
            city, sequence, frame, _ = image.stem.split("_")
            (name,) = fnmatch.filter(archive.namelist(), f"{city}_{sequence}_{frame}*.png")  # the server's pattern
            with archive.open(name) as file, Image.open(file) as picture:
                assert picture.mode == "L"
                ids = np.array(picture)
            pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
            predicted = model.predict(pixels[None])[0].numpy()
            assert np.array_equal(ids, np.array(FILE_IDS["cityscapes"])[predicted])
            assert (folder / "labels" / name).read_bytes() == archive.read(name)
            colours = np.array(Image.open(folder / "view" / name).convert("RGB"))
            assert np.array_equal(
                colours, np.array(build_dataset("cityscapes", tmp_path / "data", "test").palette)[predicted]
            )


@pytest.mark.parametrize("case", FILE_IDS)
def test_perfect_predictions_read_back(tmp_path, command, perfect, case):
    """What is exported for the labels' own classes is what the label files hold, and loads as the same classes."""
    dataset, root = case.split()[0], tmp_path / "data"
    pairs = write(case, root, "val")
    save_run(tmp_path / "run", case, root)
    build = TrainConfig.from_json(tmp_path / "run" / "config.json").data.build
    before = build("val")
    masks = [mask for _, mask in before]
    assert sorted({k for mask in masks for k in mask.unique().tolist()}) == [*range(len(before.classes))]
    perfect(before)
    assert command(tmp_path / "run", "--split", "val", "--out", tmp_path / "out", "--workers", "0")[0] == 0
    stems = [label.name.replace("_gtFine_labelIds", "") for _, label in pairs]
    assert sorted(path.name for path in (tmp_path / "out" / "labels").iterdir()) == sorted(stems)
    for (_, label), stem in zip(pairs, stems, strict=True):
        with Image.open(tmp_path / "out" / "labels" / stem) as picture:
            assert picture.mode == ("L" if dataset in ("ade20k", "cityscapes") else "P")
            assert np.array_equal(np.array(picture), np.array(Image.open(label)))
            if picture.mode == "P":
                truth = build("val").file_ids
                palette = np.zeros((256, 3), dtype=np.uint8)
                palette[list(truth)] = before.palette
                assert np.array_equal(np.array(picture.convert("RGB")), palette[np.array(picture)])
        shutil.copy(tmp_path / "out" / "labels" / stem, label)
    after = build("val")
    assert all(torch.equal(after[i][1], mask) for i, mask in enumerate(masks))
    assert (tmp_path / "out" / "labels.zip").exists() == (dataset in ("ade20k", "cityscapes"))


def test_no_archive_of_an_earlier_submission_survives_a_broken_one(tmp_path, command, perfect):
    pairs = write("ade20k", tmp_path, "val")
    save_run(tmp_path / "run", "ade20k", tmp_path)
    dataset = build_dataset("ade20k", tmp_path, "val")
    perfect(dataset)
    arguments = (tmp_path / "run", "--split", "val", "--workers", "0")
    assert command(*arguments)[0] == 0
    folder = tmp_path / "run" / "submission_val"
    with zipfile.ZipFile(folder / "labels.zip") as archive:
        assert archive.namelist() == [f"ADE_val_{i:08d}.png" for i in (1, 2, 3)]
    perfect(dataset)
    pairs[2][0].write_bytes(b"no image")
    status, _, err = command(*arguments)
    assert status == 2
    assert err.endswith(
        f"error: {pairs[2][0]} can't be read (it is not an image of a known format): convert it to PNG, or remove it\n"
    )
    assert {path.name for path in folder.iterdir()} == {"labels", "view"}


def test_a_write_that_fails_leaves_no_archive(tmp_path, command, perfect, monkeypatch):
    write("ade20k", tmp_path, "val")
    save_run(tmp_path / "run", "ade20k", tmp_path)
    perfect(build_dataset("ade20k", tmp_path, "val"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, _, err = command(tmp_path / "run", "--split", "val", "--workers", "0")
    assert status == 2
    archive = tmp_path / "run" / "submission_val" / "labels.zip"
    line = err.splitlines()[-1]
    assert "error: [Errno 28] No space left on device while writing " in line
    assert f"while writing {archive.parent}" in line
    assert ". The files that were there before are intact: free some space" in line
    assert not list(archive.parent.glob("labels.zip*"))


def test_options_reach_the_network(tmp_path, command, monkeypatch):
    write("camvid", tmp_path, "val")
    save_run(tmp_path / "run", "camvid", tmp_path)
    seen = []

    def record(model, image, config):
        seen.append(config)
        return torch.zeros(1, *image.shape[-2:], dtype=torch.int64)

    monkeypatch.setattr(submission, "predict_ids", record)
    command(tmp_path / "run", "--split", "val", "--scales", "0.5", "1", "--flip", "--window", "32", "--no-refine")
    assert (seen[0].scales, seen[0].flip, seen[0].window, seen[0].refine) == ((0.5, 1.0), True, 32, False)
    assert seen[0].refine_scale == 1  # of the run


def test_bad_input(tmp_path, command, monkeypatch):
    status, _, err = command(tmp_path / "run")
    assert status == 2
    assert err.startswith(f"error: {tmp_path}/run does not exist")
    for model in ("camvid_tiny", DEMO):
        assert "is a model without the run that trained it" in command(model)[2]
    write("camvid", tmp_path, "val")
    save_run(tmp_path / "run", "ade20k", tmp_path)
    status, _, err = command(tmp_path / "run", "--split", "val")
    assert status == 2
    assert err == (
        f"error: there is no folder {tmp_path}/images/validation: check the dataset's root folder and split\n"
    )
    save_run(tmp_path / "other", "camvid", tmp_path)
    shutil.rmtree(tmp_path / "other" / "model")
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "other" / "model")
    status, _, err = command(tmp_path / "other", "--split", "val")
    assert status == 2
    assert err.startswith("error: the model predicts 150 classes, but the data set has 11")
    assert not (tmp_path / "other" / "submission_val").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one of 2 (WORLD_SIZE)" in command(tmp_path / "run")[2]
