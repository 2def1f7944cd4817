"""Datasets of files in miniature, and every bad input that a folder can hold."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from unept.colors import default_palette
from unept.data import DATASETS, DatasetError, FileDataset, ImageFolder, build_dataset, evaluation_loader
from unept.data.check import check_before_run
from unept.data.files import read_image

WIDTH, HEIGHT = 12, 8


def picture(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(noise.astype(np.uint8))


def label(ids: object, mode: str = "L", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A label of one id, or of the given (H, W) ids."""
    image = Image.fromarray(np.broadcast_to(np.uint8(ids), size[::-1]).copy())
    if mode == "P":
        image.putpalette([channel for colour in default_palette(256) for channel in colour])
    return image


@pytest.fixture
def folder(tmp_path):
    """Three training pairs and one validation pair of three classes; tests break it."""
    (tmp_path / "classes.txt").write_text("road\ntraffic light 250 170 30\nsky\n")
    for split, count in (("train", 3), ("val", 1)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            picture(i).save(tmp_path / f"images/{split}/frame{i}.png")
            ids = np.full((HEIGHT, WIDTH), i % 3)
            ids[:2, :3] = 255
            label(ids, "LP"[i % 2]).save(tmp_path / f"labels/{split}/frame{i}.png")
    return tmp_path


@pytest.fixture
def camvid(tmp_path):
    """Two training pairs; the labels hold all twelve ids."""
    for name in ("train", "trainannot"):
        (tmp_path / name).mkdir()
    for name, suffix in (("a", ".png"), ("b", ".jpg")):
        picture().save(tmp_path / "train" / f"{name}{suffix}")
        label(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 12).save(tmp_path / "trainannot" / f"{name}.png")
    return tmp_path


def test_folder_gives_images_and_training_ids(folder):
    dataset = build_dataset("folder", folder, "train")
    assert len(dataset) == 3
    assert dataset.classes == ("road", "traffic light", "sky")
    assert dataset.palette[1] == (250, 170, 30)
    assert [dataset.name(i) for i in range(3)] == ["frame0", "frame1", "frame2"]
    for i in range(3):
        image, mask = dataset[i]
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert image.dtype == mask.dtype == torch.uint8
        assert torch.equal(image, torch.from_numpy(np.array(picture(i))).permute(2, 0, 1))
        expected = torch.full((HEIGHT, WIDTH), i, dtype=torch.uint8)
        expected[:2, :3] = 255
        assert torch.equal(mask, expected)
    dataset.check()


def test_folder_options_name_other_folders(folder):
    (folder / "images").rename(folder / "pictures")
    (folder / "labels" / "val").rename(folder / "val_ids")
    (folder / "classes.txt").rename(folder / "names.txt")
    dataset = build_dataset(
        "folder", folder, "val", images="pictures/{split}", labels="{split}_ids", classes_file="names.txt"
    )
    assert len(dataset) == 1
    dataset.check()


def test_labels_without_an_image_and_foreign_files_are_left_out(folder):
    label(0).save(folder / "labels/train/other.png")
    (folder / "images/train/notes.txt").write_text("")
    (folder / "images/train/._frame0.png").write_text("")
    assert build_dataset("folder", folder, "val").warnings() == []
    (folder / "images/train/more").mkdir()
    picture().save(folder / "images/train/more/frame9.png")
    dataset = build_dataset("folder", folder)
    assert len(dataset) == 3
    told = "\n".join(check_before_run(dataset, "train"))
    assert f"1 subfolders of {folder}/images/train hold images, more the first of them: they are left out" in told
    assert f"1 labels in {folder}/labels/train have no image, other.png the first of them: they are left out" in told


def test_labels_of_all_splits_in_one_folder_are_not_left_out(folder):
    for label_file in (folder / "labels/val").iterdir():
        label_file.rename(folder / "labels/train" / f"val_{label_file.name}")
    assert build_dataset("folder", folder, labels="labels/train").warnings() == []
    (folder / "labels/train").rename(folder / "images/train/labels")
    assert build_dataset("folder", folder, labels="images/train/labels").warnings() == []
    assert "3 labels" not in build_dataset("folder", folder, labels="images/{split}/labels").warnings()[0]


def test_camvid_ignores_void(camvid):
    dataset = build_dataset("camvid", camvid)
    assert len(dataset.classes) == len(dataset.palette) == len(set(dataset.palette)) == 11
    assert [dataset.name(i) for i in range(2)] == ["a", "b"]
    expected = torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 12
    expected[expected == 11] = 255
    for i in range(2):
        assert torch.equal(dataset[i][1], expected.to(torch.uint8))


def test_unknown_names_list_the_valid_ones(folder):
    with pytest.raises(ValueError, match="no dataset 'coco'; the datasets are shapes, camvid, folder"):
        build_dataset("coco")
    with pytest.raises(ValueError, match="no split 'training'; the splits are train, val, test"):
        build_dataset("folder", folder, "training")
    with pytest.raises(ValueError, match="'camvid' reads files: give root"):
        build_dataset("camvid")
    with pytest.raises(DatasetError, match=r"shapes is made in memory.*data/shapes"):
        build_dataset("shapes", "data/shapes")


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"shapes"}))
def test_a_missing_root_is_named(name, tmp_path):
    with pytest.raises(DatasetError, match=r"there is no folder .*nowhere"):
        build_dataset(name, tmp_path / "nowhere")


def test_missing_folder(folder):
    with pytest.raises(DatasetError, match=r"no folder .*images/test: check"):
        build_dataset("folder", folder, "test")


def test_no_images(folder):
    for file in (folder / "images/val").iterdir():
        file.rename(file.with_suffix(".gif"))
    with pytest.raises(DatasetError, match=r"images/val holds no images: put files ending in \.png, \.jpg"):
        build_dataset("folder", folder, "val")


def test_image_without_a_label(folder):
    (folder / "labels/train/frame1.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 3 images .* no label.*frame1\.png: add .*labels/train/frame1\.png"):
        build_dataset("folder", folder)
    for file in (folder / "labels/train").iterdir():
        file.rename(file.with_stem(f"{file.stem}_mask"))
    with pytest.raises(DatasetError, match=r"If frame0_mask\.png is its label: --label-suffix _mask$"):
        build_dataset("folder", folder)


def test_two_images_of_one_stem(folder):
    picture().save(folder / "images/train/frame1.jpg")
    with pytest.raises(DatasetError, match=r"frame1\.jpg and frame1\.png would share one label"):
        build_dataset("folder", folder)


def test_label_of_another_size(folder):
    label(0, size=(6, 4)).save(folder / "labels/train/frame2.png")
    with pytest.raises(
        DatasetError, match=r"labels/train/frame2\.png is 6x4 pixels, but its image .* is 12x8"
    ) as error:
        build_dataset("folder", folder)[2]
    assert "EXIF" not in str(error.value)


@pytest.mark.parametrize("dataset", ["folder", "camvid"])
def test_label_id_outside_the_class_list(dataset, request):
    root = request.getfixturevalue(dataset)
    ids = np.zeros((HEIGHT, WIDTH))
    ids[0, :5], ids[1, 1] = 12, 254
    file = root / ("labels/train/frame0.png" if dataset == "folder" else "trainannot/a.png")
    label(ids).save(file)
    allowed = "3 classes allow 0-2, 255" if dataset == "folder" else "11 classes allow 0-11, 255"
    with pytest.raises(DatasetError, match=rf"{file.name} holds id 12 in 5 pixels, id 254 in 1 pixels.* {allowed}"):
        build_dataset(dataset, root)[0]


def test_label_that_shows_colours(folder):
    picture().save(folder / "labels/train/frame0.png")
    with pytest.raises(DatasetError, match=r"labels/train/frame0\.png shows .* in \d+ pixels, .*class list"):
        build_dataset("folder", folder)[0]


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncated", r".*\): the file is damaged"), ("text", "it is not an image"), ("empty", "it is empty")],
)
def test_damaged_file(folder, kind, damage, message):
    file = folder / kind / "train" / "frame1.png"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) * 2 // 3], "text": b"no image", "empty": b""}[damage])
    with pytest.raises(DatasetError, match=rf"{kind}/train/frame1\.png can't be read \({message}"):
        build_dataset("folder", folder)[1]


def test_truncated_jpeg(camvid):
    file = camvid / "train/b.jpg"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DatasetError, match=r"train/b\.jpg can't be read \(.*truncated.*restore or remove it"):
        build_dataset("camvid", camvid)[1]


def test_a_worker_names_the_damaged_file(camvid):
    (camvid / "train/a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"train/a\.png can't be read"):
        next(iter(evaluation_loader(build_dataset("camvid", camvid), workers=1)))


def test_check_reports_all_or_an_even_sample(folder):
    for i in range(3, 40):
        picture(i).save(folder / f"images/train/frame{i:02d}.png")
        label(7).save(folder / f"labels/train/frame{i:02d}.png")
    dataset = build_dataset("folder", folder)
    with pytest.raises(DatasetError) as error:
        dataset.check()
    lines = str(error.value).splitlines()
    assert [line.split(" holds ")[0][-11:] for line in lines[:5]] == [f"frame{i:02d}.png" for i in range(3, 8)]
    assert lines[5] == "... and 32 more of the 40 samples that were checked"
    with pytest.raises(DatasetError, match="frame20"):
        dataset.check(sample=2)
    dataset.pairs = dataset.pairs[:1] + dataset.pairs[-2:]
    dataset.check(sample=1)
    with pytest.raises(ValueError, match="sample is 0"):
        dataset.check(sample=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists 0 classes"),
        ("\n".join(f"class{i}" for i in range(256)), "lists 256 classes: write 1 to 255"),
        ("road\n\nsky", r"line 2 of .*classes\.txt names no class"),
        ("road\n1 2 3", "line 2 of .* names no class"),
        ("road\nsky\nroad", "lists 'road' twice, in lines 1 and 3"),
        ("road 0 0 256", r"line 1 of .* the color \(0, 0, 256\)"),
    ],
)
def test_bad_class_list(folder, text, message):
    (folder / "classes.txt").write_text(text)
    with pytest.raises(DatasetError, match=message):
        build_dataset("folder", folder)


def test_missing_or_binary_class_list(folder):
    (folder / "classes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DatasetError, match=r"class list .*classes\.txt can't be read"):
        build_dataset("folder", folder)
    with pytest.raises(DatasetError, match=r"class list .*other\.txt can't be read"):
        ImageFolder(folder, classes_file="other.txt")


def test_class_list_with_byte_order_mark(folder):
    (folder / "classes.txt").write_bytes("\ufeffstraße\r\nGehweg 1 2 3\r\nHimmel\r\n".encode())
    dataset = build_dataset("folder", folder)
    assert dataset.classes == ("straße", "Gehweg", "Himmel")
    assert dataset.palette[1] == (1, 2, 3)


def test_every_image_mode_becomes_rgb(tmp_path):
    gray = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    expected = torch.from_numpy(gray).expand(3, -1, -1)
    deep = gray.astype(np.uint16) * 256 + 17
    opaque = np.full_like(gray, 255)
    images = {
        "gray": Image.fromarray(gray),
        "gray_alpha": Image.merge("LA", [Image.fromarray(gray), Image.fromarray(opaque)]),
        "rgba": Image.merge("RGBA", [Image.fromarray(gray)] * 3 + [Image.fromarray(gray)]),
        "deep": Image.fromarray(deep),
        "palette": Image.fromarray(gray).convert("P"),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        pixels = read_image(tmp_path / f"{name}.png")
        assert torch.equal(pixels, expected), name
        assert pixels.is_contiguous()
    Image.fromarray(gray).save(tmp_path / "transparent.png", transparency=3)
    assert torch.equal(read_image(tmp_path / "transparent.png"), expected)
    Image.fromarray(gray.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DatasetError, match=r"float\.tif holds floating-point pixels"):
        read_image(tmp_path / "float.tif")


def test_exif_rotation_is_applied(folder):
    rotated = Image.Exif()
    rotated[0x0112] = 6  # shown turned clockwise by 90 degrees
    picture().save(folder / "images/val/frame0.png", exif=rotated)
    with pytest.raises(DatasetError, match=r"is 12x8 pixels, but its image .* is 8x12.*EXIF rotation"):
        build_dataset("folder", folder, "val")[0]
    label(1, size=(HEIGHT, WIDTH)).save(folder / "labels/val/frame0.png")
    image, mask = build_dataset("folder", folder, "val")[0]
    assert torch.equal(image, torch.from_numpy(np.rot90(np.array(picture()), -1).copy()).permute(2, 0, 1))
    assert mask.shape == (WIDTH, HEIGHT)


def test_training_id_table_maps_file_ids(folder):
    pairs = [(folder / "images/train/frame2.png", folder / "labels/train/frame2.png")]
    dataset = FileDataset(pairs, ("only",), ((1, 2, 3),), {2: 0, 255: 255})
    assert set(dataset[0][1].flatten().tolist()) == {0, 255}
