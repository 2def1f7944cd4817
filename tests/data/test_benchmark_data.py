"""The paper's three benchmarks in miniature: every id both ways, every fault of a folder, and --check-data."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import layouts
from unept import train
from unept.config import DataConfig
from unept.data import (
    ADE20K,
    CamVid,
    Cityscapes,
    DatasetError,
    ImageFolder,
    PascalContext,
    Shapes,
    build_dataset,
    check_splits,
    image_loader,
)

BENCHMARKS = {"ade20k": layouts.ade20k, "cityscapes": layouts.cityscapes, "pascal_context": layouts.pascal_context}

# Written down apart from the code: class by training id, and the id of its pixels in Cityscapes' label files.
CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
CITYSCAPES_IGNORED = [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255]  # 255: license plate, -1
# Some of ADE20K's classes by their id in label files, from the benchmark's objectInfo150.
ADE20K_NAMES = {1: "wall", 2: "building", 8: "bed", 13: "person", 21: "car", 45: "chest of drawers", 67: "flower"}
ADE20K_NAMES |= {90: "television", 100: "buffet", 117: "minibike", 124: "trade name", 137: "traffic light"}
ADE20K_NAMES |= {142: "crt screen", 148: "glass", 150: "flag"}
# PASCAL-Context's id of the 459 classes that each of the 59 comes from; files number the 59 in this order.
OF_459 = {"aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird": 25, "boat": 31}
OF_459 |= {"book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59, "cat": 65, "ceiling": 68}
OF_459 |= {"chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup": 104, "curtain": 105, "dog": 113, "door": 115}
OF_459 |= {"fence": 144, "floor": 158, "flower": 159, "food": 162, "grass": 187, "ground": 189, "horse": 207}
OF_459 |= {"keyboard": 220, "light": 232, "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284}
OF_459 |= {"plate": 295, "platform": 296, "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349}
OF_459 |= {"sidewalk": 354, "sign": 355, "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415}
OF_459 |= {"train": 416, "tree": 420, "truck": 424, "tvmonitor": 427, "wall": 440, "water": 445, "window": 454}
OF_459 |= {"wood": 458}


def every(ids, shape: tuple[int, int] = (12, 14)) -> np.ndarray:
    """A label (H, W) in which each of the ids occurs."""
    return np.resize(np.array(ids, dtype=np.uint8), shape)


def written(dataset: str, root, split: str = "train") -> list:
    """Two images of a benchmark with all valid ids; their paths."""
    ids = {"ade20k": range(151), "cityscapes": [*range(34), 255], "pascal_context": range(60)}[dataset]
    return layouts.write(BENCHMARKS[dataset], root, split, [every(ids), every(ids, (14, 12))])


def test_ade20k(tmp_path):
    written("ade20k", tmp_path)
    dataset = build_dataset("ade20k", tmp_path)
    assert len(dataset) == 2
    assert [dataset.name(i) for i in range(2)] == ["ADE_train_00000001", "ADE_train_00000002"]
    file_ids = every(range(151)).astype(int)
    mask = dataset[0][1].numpy()
    assert (mask[file_ids == 0] == 255).all()
    assert (mask[file_ids > 0] == file_ids[file_ids > 0] - 1).all()
    assert dataset.file_ids == tuple(range(1, 151))
    assert len(set(dataset.classes)) == len(dataset.palette) == 150
    for i, name in ADE20K_NAMES.items():
        assert dataset.classes[i - 1] == name
    assert (dataset.palette[0], dataset.palette[12], dataset.palette[149]) == ((120,) * 3, (150, 5, 61), (92, 0, 255))
    assert dataset.palette[6] == dataset.palette[48] == (140, 140, 140)  # road and skyscraper
    assert len(set(dataset.palette)) == 149
    assert dataset.description == "ADE20K, 150 classes"


def test_cityscapes(tmp_path):
    assert sorted([*CITYSCAPES, *CITYSCAPES_IGNORED]) == [*range(34), 255]
    written("cityscapes", tmp_path, "val")
    dataset = build_dataset("cityscapes", tmp_path, "val")
    assert [dataset.name(i) for i in range(2)] == ["aachen_000001_000019", "munich_000000_000019"]
    assert dataset.classes == tuple(CITYSCAPES.values())
    assert dataset.file_ids == tuple(CITYSCAPES)
    file_ids, mask = every([*range(34), 255]), dataset[1][1].numpy()
    for training_id, file_id in enumerate(CITYSCAPES):
        assert (mask[file_ids == file_id] == training_id).all()
    for file_id in CITYSCAPES_IGNORED:
        assert (mask[file_ids == file_id] == 255).all()
    assert (dataset.palette[0], dataset.palette[13], dataset.palette[18]) == (
        (128, 64, 128),
        (0, 0, 142),
        (119, 11, 32),
    )
    assert len(set(dataset.palette)) == 19
    assert dataset.description == "Cityscapes, 19 classes"


@pytest.mark.parametrize("background", [True, False])
def test_pascal_context(tmp_path, background):
    written("pascal_context", tmp_path)
    config = DataConfig(dataset="pascal_context", root=tmp_path, background=background)
    dataset = config.build("train")
    first = 0 if background else 1
    assert dataset.classes == ("background", *sorted(OF_459, key=OF_459.__getitem__))[first:]
    assert dataset.file_ids == tuple(range(first, 60))
    file_ids, mask = every(range(60)).astype(int), dataset[0][1].numpy()
    assert (mask[file_ids > 0] == file_ids[file_ids > 0] - first).all()
    assert (mask[file_ids == 0] == (0 if background else 255)).all()
    # PASCAL VOC's colours of the labels 0, 1, 2, 15, 20 and 59, wherever they stand in the palette.
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 59: (192, 192, 64)}
    for i, colour in colours.items():
        assert i < first or dataset.palette[i - first] == colour
    assert len(set(dataset.palette)) == len(dataset.classes)
    words = "60 classes with background" if background else "59 classes without background"
    assert dataset.description == f"PASCAL-Context, {words}"


def test_pascal_context_reads_what_the_list_names(tmp_path):
    written("pascal_context", tmp_path)
    listing = tmp_path / "VOC2010/ImageSets/SegmentationContext/train.txt"
    listing.write_text("2008_000001\n\n")
    dataset = PascalContext(tmp_path)
    assert [dataset.name(i) for i in range(len(dataset))] == ["2008_000001"]
    listing.write_text("2008_000001\n2009_000009\n")
    with pytest.raises(DatasetError, match=r"1 of 2 images that .*train\.txt names are not in .*2009_000009\.jpg"):
        PascalContext(tmp_path)
    listing.write_text("\n")
    with pytest.raises(DatasetError, match=r"train\.txt names no image"):
        PascalContext(tmp_path)
    listing.unlink()
    with pytest.raises(DatasetError, match=r"list of images .*train\.txt can't be read"):
        PascalContext(tmp_path)


@pytest.mark.parametrize(
    ("kind", "dataset", "folder"),
    [
        (ADE20K, "ade20k", "ADEChallengeData2016"),
        (PascalContext, "pascal_context", "VOC2010"),
    ],
)
def test_the_archives_own_folder_may_be_the_root(tmp_path, kind, dataset, folder):
    written(dataset, tmp_path)
    assert len(kind(tmp_path / folder)) == len(kind(tmp_path)) == 2
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / folder).rename(tmp_path / "VOCdevkit" / folder)
    assert len(kind(tmp_path / "VOCdevkit")) == 2
    if folder == "VOC2010":
        assert len(kind(tmp_path)) == 2


def test_ids_of_the_other_data_sets(tmp_path):
    layouts.write(layouts.camvid, tmp_path, "val", [every(range(12))])
    assert CamVid(tmp_path, "val").file_ids == tuple(range(11))
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    folder = ImageFolder(tmp_path, "val", images="{split}", labels="{split}annot")
    assert folder.file_ids == (0, 1)
    assert Shapes().file_ids == tuple(range(8))
    assert Shapes().description == "Shapes, 8 classes"
    assert torch.equal(Shapes().image(3), Shapes()[3][0])
    assert not any(kind.has_test_server for kind in (CamVid, ImageFolder, Shapes, PascalContext))


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_a_test_split_has_images_alone(tmp_path, dataset):
    dummies = dataset == "cityscapes"  # ships labels of void ids with its test images; here of one that is no id at all
    pairs = layouts.write(BENCHMARKS[dataset], tmp_path, "test", [every([77]), every([77])], labelled=dummies)
    test = build_dataset(dataset, tmp_path, "test")
    assert len(test) == 2
    assert not test.labelled
    test.check()
    for workers in (0, 1):
        images = list(image_loader(test, workers))
        assert [image.shape for image in images] == [(1, 3, 12, 14)] * 2
        assert all(torch.equal(image[0], test.image(i)) for i, image in enumerate(images))
    with pytest.raises(DatasetError, match=r"has no label: .* take the split val"):
        test[0]
    pairs[1][0].write_bytes(pairs[1][0].read_bytes()[:200])
    with pytest.raises(DatasetError, match=rf"{pairs[1][0].name} can't be read"):
        test.check()
    with pytest.raises(DatasetError, match=rf"{pairs[1][0].name} can't be read"):
        list(image_loader(test))


@pytest.mark.parametrize("dataset", BENCHMARKS)
@pytest.mark.parametrize("damage", ["image", "label"])
def test_truncated_file(tmp_path, dataset, damage):
    file = written(dataset, tmp_path)[1][damage == "label"]
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(DatasetError, match=rf"^\S*{file.name} can't be read \(.*\): the file is damaged[^\n]*$"):
        build_dataset(dataset, tmp_path).check()


@pytest.mark.parametrize(
    ("dataset", "bad", "allowed"),
    [
        ("ade20k", 151, "150 classes allow 0-150"),
        ("ade20k", 255, "150 classes allow 0-150"),
        ("cityscapes", 34, "19 classes allow 0-33, 255"),
        ("pascal_context", 60, "60 classes allow 0-59"),
    ],
)
def test_id_outside_the_list(tmp_path, dataset, bad, allowed):
    label = written(dataset, tmp_path)[0][1]
    ids = np.array(Image.open(label))
    ids[0, :3] = bad
    Image.fromarray(ids).save(label)
    with pytest.raises(DatasetError, match=rf"^\S*{label.name} holds id {bad} in 3 pixels, .*{allowed}\. [^\n]*$"):
        build_dataset(dataset, tmp_path).check()


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_other_size(tmp_path, dataset):
    label = written(dataset, tmp_path)[0][1]
    Image.fromarray(every([1], (12, 13))).save(label)
    with pytest.raises(DatasetError, match=rf"^\S*{label.name} is 13x12 pixels, but its image \S* is 14x12[^\n]*$"):
        build_dataset(dataset, tmp_path).check()


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_missing_label_and_folders(tmp_path, dataset):
    image, label = written(dataset, tmp_path)[1]
    label.rename(label.with_name("elsewhere.png"))
    with pytest.raises(DatasetError, match=rf"have no label, the first being {image.name}: add \S*/{label.name}, or"):
        build_dataset(dataset, tmp_path)
    for folder in (label.parent, image.parent.parent if dataset == "cityscapes" else image.parent):
        folder.rename(folder.with_name(f"{folder.name}_elsewhere"))
        with pytest.raises(DatasetError, match=rf"there is no folder {folder}: check"):
            build_dataset(dataset, tmp_path)


def test_cityscapes_without_cities_or_with_other_files(tmp_path):
    written("cityscapes", tmp_path)
    folder = tmp_path / "leftImg8bit/train"
    (folder / "aachen" / "preview.png").write_bytes(b"")
    (folder / "license.txt").write_text("")
    assert len(Cityscapes(tmp_path)) == 2
    (folder / "zurich").mkdir()
    with pytest.raises(DatasetError, match=r"zurich holds no images: put files ending in _leftImg8bit\.png"):
        Cityscapes(tmp_path)
    (tmp_path / "leftImg8bit/val").mkdir()
    with pytest.raises(DatasetError, match="val holds no folders: it must have one per city"):
        Cityscapes(tmp_path, "val")


def test_check_with_workers_is_the_same_and_draws_no_random_number(tmp_path):
    layouts.write(layouts.camvid, tmp_path, "val", [every([0]) if i == 4 else every([12 + i]) for i in range(9)])
    dataset = CamVid(tmp_path, "val")
    state = torch.get_rng_state()
    messages = []
    for workers in (0, 2):
        with pytest.raises(DatasetError) as error:
            dataset.check(workers=workers)
        messages.append(str(error.value).splitlines())
    assert torch.equal(torch.get_rng_state(), state)
    assert messages[0] == messages[1]
    files = [line.split(" holds ")[0].split("/")[-1] for line in messages[0][:5]]
    assert files == [f"{i}.png" for i in (0, 1, 2, 3, 5)]
    assert messages[0][5] == "... and 3 more of the 9 samples that were checked"


def test_workers_read():
    class Processes(Shapes):
        def __getitem__(self, i: int) -> None:
            raise DatasetError(str(os.getpid()))

    for workers in (0, 1):
        with pytest.raises(DatasetError) as error:
            check_splits(lambda split: Processes(split=split, length=2), workers)
        processes = {int(line) for line in str(error.value).splitlines()}
        assert (os.getpid() in processes) == (workers == 0)
        assert len(processes) == 1 + workers  # with one worker, another for each split


@pytest.mark.parametrize("workers", [0, 2])
def test_check_splits(tmp_path, capsys, workers):
    layouts.write(layouts.cityscapes, tmp_path, "train", [every([7, 26])] * 3)
    pairs = layouts.write(layouts.cityscapes, tmp_path, "val", [every([7, 26])] * 2)
    build = DataConfig(dataset="cityscapes", root=tmp_path).build
    check_splits(build, workers)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines if "in order" in line] == [
        f"{split}: {count} images of Cityscapes, 19 classes are in order" for split, count in (("train", 3), ("val", 2))
    ]
    assert [line.split()[:2] for line in lines if line.startswith("road")] == [
        ["road", str(n)] for n in (3 * 84, 2 * 84)
    ]
    pairs[1][1].write_bytes(b"")
    train_label = tmp_path / "gtFine/train/munich/munich_000002_000019_gtFine_labelIds.png"
    train_label.unlink()
    with pytest.raises(DatasetError) as error:
        check_splits(build, workers)
    assert capsys.readouterr().out == ""
    first, second = str(error.value).splitlines()
    assert f"add {train_label}" in first
    assert f"{pairs[1][1]} can't be read" in second


def test_check_data_ends_without_a_run(tmp_path, capsys, monkeypatch):
    layouts.write(layouts.ade20k, tmp_path, "train", [every(range(151))] * 2)
    layouts.write(layouts.ade20k, tmp_path, "val", [every(range(151))])
    monkeypatch.chdir(tmp_path)
    arguments = ["folder", "--dataset", "ade20k", "--root", str(tmp_path), "--workers", "0", "--check-data"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "train: 2 images of ADE20K, 150 classes are in order" in out
    assert "val: 1 images of ADE20K, 150 classes are in order" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_check_data_reports_what_the_quick_check_would_miss(tmp_path):
    labels = [every(range(60))] * 45
    labels[23] = every([7, 61])
    label = layouts.write(layouts.pascal_context, tmp_path, "train", labels)[23][1]
    layouts.write(layouts.pascal_context, tmp_path, "val", [every(range(60))])
    build_dataset("pascal_context", tmp_path).check(sample=20)
    command = [sys.executable, "-m", "unept.train", "folder", "--dataset", "pascal_context", "--check-data"]
    command += ["--root", str(tmp_path), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    end = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert end.returncode == 2
    assert end.stderr.splitlines()[-1].startswith(f"error: {label} holds id 61 in ")
    assert "\nval: 1 images of PASCAL-Context, 60 classes with background are in order" in end.stdout
    assert not (tmp_path / "runs").exists()
