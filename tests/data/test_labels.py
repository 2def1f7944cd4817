"""Labels and class lists as people have them: read right, or refused by a message that names file, line and remedy."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unept import train
from unept.config import DataConfig
from unept.data import DatasetError, ImageFolder, build_dataset
from unept.data.reading import read_image

IDS = np.arange(48).reshape(6, 8) % 4
COLORS = np.array([(0, 0, 0), (128, 64, 128), (70, 130, 180), (220, 20, 60)], dtype=np.uint8)
CLASSES = "".join(f"class {k} {r} {g} {b}\n" for k, (r, g, b) in enumerate(COLORS))


def gray_png(ids: np.ndarray, bits: int) -> bytes:
    """A gray PNG of 1, 2, 4, 8 or 16 bits, which PIL can't write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = ids.shape
    digits = (ids[..., None] >> np.arange(bits)[::-1] & 1).reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row.astype(bool)).tobytes() for row in digits)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    """A data set of one image, and a function that replaces its label; tests give the class list."""
    for part in ("images/train", "labels/train"):
        (tmp_path / part).mkdir(parents=True)
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "images/train/a.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")

    def save(label, name: str = "a.png", **options) -> ImageFolder:
        path = tmp_path / "labels/train" / name
        if isinstance(label, bytes):
            path.write_bytes(label)
        else:
            (Image.fromarray(label) if isinstance(label, np.ndarray) else label).save(path, **options)
        return tmp_path

    return tmp_path, save


def mask(root, **options) -> np.ndarray:
    return ImageFolder(root, **options)[0][1].numpy()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_of_any_depth_holds_its_ids(folder, bits):
    root, save = folder
    ids = IDS % min(4, 1 << bits)
    save(gray_png(ids, bits))
    assert np.array_equal(mask(root), ids)


def test_every_mode_and_suffix_that_loses_nothing(folder):
    root, save = folder
    ids = IDS.astype(np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    labels = {
        "a.PNG": palette, "a.Tif": ids.astype(np.uint16), "a.bmp": ids, "a.gif": palette, "a.pgm": ids,
        "a.webp": np.stack([ids] * 3, -1), "a.tiff": Image.fromarray(np.stack([ids] * 3, -1)),
        "a.png": Image.merge("LA", [Image.fromarray(ids)] * 2),
    }  # fmt: skip
    for name, label in labels.items():
        save(label, name, **({"lossless": True} if name.endswith("webp") else {}))
        assert np.array_equal(mask(root), ids), name
        (root / "labels/train" / name).unlink()


def test_what_loses_ids_is_refused(folder):
    root, save = folder
    ids = IDS.astype(np.uint8)
    for name, options in (("a.webp", {}), ("a.tif", {"compression": "jpeg"}), ("a.png", {"format": "JPEG"})):
        save(ids, name, **options)
        with pytest.raises(DatasetError, match=rf"{name} was compressed with loss"):
            mask(root)
        (root / "labels/train" / name).unlink()
    save(ids, "a.jpg")
    with pytest.raises(DatasetError, match=r"add .*a\.png, or remove the image\. a\.jpg is no label: JPEG"):
        mask(root)
    save(ids, "a.png")
    save(ids, "a.bmp")
    with pytest.raises(DatasetError, match=r"a\.bmp and a\.png are labels of one image"):
        mask(root)


def test_sixteen_bits_beyond_the_classes(folder):
    root, save = folder
    save(IDS.astype(np.uint16) * 1000)
    with pytest.raises(
        DatasetError, match="holds id 1000 in 12 pixels, id 2000 in 12 pixels, id 3000 in 12 pixels, out"
    ):
        mask(root)
    mapped = mask(root, label_ids=("0=a", "1000=1", "2000=c", "3000=d"))
    assert np.array_equal(mapped, IDS)
    assert ImageFolder(root, label_ids=("0=a", "1000=1", "2000=c", "3000=d")).file_ids == (0, 1000, 2000, 3000)


def test_colors_of_the_class_list(folder):
    root, save = folder
    save(COLORS[IDS])
    with pytest.raises(DatasetError, match=r"a\.png shows colors .* give the color of every class in the class list"):
        mask(root)
    (root / "classes.txt").write_text(CLASSES)
    assert np.array_equal(mask(root), IDS)
    save(np.concatenate([COLORS[IDS], np.full((6, 8, 1), 255, np.uint8)], -1))  # RGBA
    assert np.array_equal(mask(root), IDS)
    other = COLORS[IDS].copy()
    other[0, :3] = 1, 2, 3
    save(other)
    with pytest.raises(DatasetError, match=r"shows \(1, 2, 3\) in 3 pixels, which the class list does not have"):
        mask(root)
    with pytest.raises(DatasetError, match="shows colors, but label_format is 'ids'"):
        mask(root, label_format="ids")
    palette = Image.fromarray(3 - IDS.astype(np.uint8))  # its colors are right and its ids are not
    palette.putpalette(COLORS[::-1].tobytes())
    save(palette)
    assert np.array_equal(mask(root), 3 - IDS)
    assert np.array_equal(mask(root, label_format="colors"), IDS)


def test_a_label_that_has_two_readings(folder):
    root, save = folder
    (root / "classes.txt").write_text("a 1 1 1\nb 0 0 0\n")
    save(np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(DatasetError, match="can be read in two ways"):
        mask(root)
    assert (mask(root, label_format="ids") == 0).all()
    assert (mask(root, label_format="colors") == 1).all()
    (root / "classes.txt").write_text("a 0 0 0\nb 1 1 1\n")
    assert (mask(root) == 0).all()


def test_suffix_ignored_ids_and_a_map_of_ids(folder):
    root, save = folder
    (root / "classes.txt").write_text("background\nthing\n")
    save(np.where(IDS == 3, 7, IDS == 2).astype(np.uint8) * np.uint8(1), "a_mask.tif")
    expected = np.where(IDS == 3, 255, IDS == 2)
    for suffix in ("_mask", "_mask.tif"):
        assert np.array_equal(mask(root, label_suffix=suffix, ignore_id=(7,)), expected)
    save(((IDS == 2) * 255).astype(np.uint8))
    data = DataConfig(dataset="folder", root=root, label_ids=("0=background", "255=thing"))
    assert np.array_equal(data.build("train")[0][1].numpy(), IDS == 2)
    for label_ids, message in (
        (("0=0", "255=2"), "label_ids has '255=2'; write ID=CLASS"), (("x=0",), "label_ids has 'x=0'"),
        (("0=0", "0=1"), "maps id 0 twice"), (("0=0",), "class 'thing' has no id"),
        (("0=0", "70000=1"), "70000 can't be an id"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mask(root, label_ids=label_ids)
    with pytest.raises(ValueError, match="id 1 is in label_ids and in ignore_id"):
        mask(root, label_ids=("0=0", "1=1"), ignore_id=(1,))


@pytest.mark.parametrize(
    ("content", "names", "color"),
    [
        (b"a\r\nb 1 2 3\r\n\r\n", ("a", "b"), (1, 2, 3)),
        (b"\xef\xbb\xbf# made by hand\n## and more\na\nb,1,2,3", ("a", "b"), (1, 2, 3)),
        ("a\nb (1, 2, 3)\n".encode("utf-16"), ("a", "b"), (1, 2, 3)),
        (b"name,r,g,b\na,0,0,0\nb,1,2,3\n", ("a", "b"), (1, 2, 3)),
        (b"0: a\n1: b #010203\n", ("a", "b"), (1, 2, 3)),
        (b"0\ta\t9 9 9\n1\tb\t1 2 3", ("a", "b"), (1, 2, 3)),
        (b"door, double\nclass 1  1 2 3\n\n", ("door, double", "class 1"), (1, 2, 3)),
        (b"a\rb 1;2;3", ("a", "b"), (1, 2, 3)),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_class_lists_as_people_write_them(folder, content, names, color):
    root, save = folder
    save(np.zeros((6, 8), np.uint8))
    (root / "classes.txt").write_bytes(content)
    dataset = ImageFolder(root)
    assert dataset.classes == names
    assert dataset.palette[1] == color


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n#b\nc", "line 2 of .* begins with '#'"),
        (b"# a\n\nb", "line 2 of .* names no class"),
        (b"1 a\n2 b", "line 1 of .* numbers its class 1, but it is class 0"),
        (b"a\nb\x0cc", "line 2 of .* holds characters that are not text"),
        (b"a\n\xe4", "line 2 is not UTF-8 text"),
        (b"a 1 2\nb", "line 1 of .* ends in two numbers"),
        (b"# a\nb 1 2 3\nc 1 2 3", "lines 2 and 3 of .* give the same color"),
        (b"# a\nb\nb", "lists 'b' twice, in lines 2 and 3"),
        (b"a\x00\nb", "line 1 of .* not text"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_class_lists_that_could_shift_ids(folder, content, message):
    root, save = folder
    save(np.zeros((6, 8), np.uint8))
    (root / "classes.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        ImageFolder(root)


def test_four_messages_for_images(tmp_path, monkeypatch):
    """A large image is read, whatever PIL's limit for uploads; what can't be read says why."""
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # above twice of this PIL raises
    assert read_image(tmp_path / "large.png").shape == (3, 200, 300)
    assert Image.MAX_IMAGE_PIXELS == 1000
    content = (tmp_path / "large.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 1 << 16, 1 << 15) + content[24:29]
    (tmp_path / "huge.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    (tmp_path / "cut.png").write_bytes(content[:-30])
    (tmp_path / "start.png").write_bytes(content[:20])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("missing", "there is no such file"), ("huge", "is too large: it has 65536x32768 pixels"),
        ("cut", "the file is damaged"), ("start", "is damaged"), ("text", "not an image of a known format"),
        ("folder", "can't be opened"),
    ):  # fmt: skip
        with pytest.raises(DatasetError, match=message):
            read_image(tmp_path / f"{name}.png")


def masks(root, splits: dict[str, list[np.ndarray]]) -> None:
    (root / "classes.txt").write_text("background\nthing\n")
    for split, labels in splits.items():
        for i, label in enumerate(labels):
            for kind, pixels in (("images", np.zeros((6, 8, 3))), ("labels", label)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(root / kind / split / f"{i}.png")


def command(root, monkeypatch, capsys, *options: str) -> tuple[int, str, str]:
    monkeypatch.chdir(root)
    arguments = ["folder", "--root", str(root), "--workers", "0", "--device", "cpu", *options]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as end:
        train.main()
    return end.value.code, *capsys.readouterr()


def test_masks_of_0_and_255_are_noticed(tmp_path, monkeypatch, capsys):
    masks(tmp_path, {"train": [(IDS > 1) * 255] * 23, "val": [(IDS > 1) * 255]})
    start = ["--no-pretrained-backbone", "--backbone", "resnet10t"]
    for options in (["--check-data"], start):
        status, out, err = command(tmp_path, monkeypatch, capsys, *options)
        assert status == 2
        assert "'background', none of 'thing', and 50.0% of the pixels are ignored" in err
        assert "masks of 0 and 255" in err
        assert "--label-ids 0=0 255=1" in err
        assert not (tmp_path / "runs").exists()
        if options == ["--check-data"]:
            rows = [line.split() for line in out.splitlines()]
            assert ["background", str(24 * 23), "50.00%"] in rows
            assert ["thing", "0", "0.00%"] in rows
            assert ["(ignored)", str(24 * 23), "50.00%"] in rows
    status, out, err = command(tmp_path, monkeypatch, capsys, "--check-data", "--label-ids", "0=0", "255=thing")
    assert (status, err) == (0, "")
    assert ["thing", str(24 * 23), "50.00%"] in [line.split() for line in out.splitlines()]


def test_labels_that_count_from_1_or_are_ignored(tmp_path, monkeypatch, capsys):
    masks(tmp_path, {"train": [IDS % 2 + 1], "val": [IDS * 0 + 255]})
    status, _, err = command(tmp_path, monkeypatch, capsys, "--check-data")
    assert status == 2
    assert "holds id 2 in 24 pixels" in err
    assert "If ids count from 1, map them: --label-ids 1=0 2=1" in err
    assert "the labels of val have no pixel of any class: all 48 pixels are ignored" in err
    masks(tmp_path, {"train": [IDS % 2 * 128], "val": [IDS % 2]})
    err = command(tmp_path, monkeypatch, capsys, "--check-data")[2]
    assert "holds id 128 in 24 pixels" in err
    assert "the dataset folder maps them: --label-ids 0=0 128=1" in err
    masks(tmp_path, {"train": [IDS % 2] * 3, "val": [np.where(IDS > 0, 255, 0)]})
    status, out, _ = command(tmp_path, monkeypatch, capsys, "--check-data")
    assert status == 0
    assert "warning: the labels of val have pixels of one class only" in out
    assert "warning: 75.0% of the pixels in the labels of val are ignored" in out


def test_a_class_needs_another_beside_it(tmp_path, monkeypatch, capsys):
    """Masks of 0 and 255 fit a list of one class, whose model would be right everywhere."""
    masks(tmp_path, {"train": [(IDS > 1) * 255] * 2, "val": [(IDS > 1) * 255]})
    (tmp_path / "classes.txt").write_text("thing\n")
    for options in (["--check-data"], ["--no-pretrained-backbone", "--backbone", "resnet10t"]):
        status, _, err = command(tmp_path, monkeypatch, capsys, *options)
        assert status == 2
        assert "'thing' is the only class of ImageFolder" in err
    (tmp_path / "classes.txt").write_text("background\nthing\n")
    assert command(tmp_path, monkeypatch, capsys, "--check-data", "--label-ids", "0=0", "255=1")[0] == 0


def test_options_reach_the_dataset(folder):
    root, save = folder
    save(IDS.astype(np.uint8), "a_ids.png")
    dataset = build_dataset("folder", root, label_suffix="_ids", ignore_id=[0], label_ids=["1=0", "2=1", "3=2", "4=3"])
    assert np.array_equal(dataset[0][1].numpy(), np.where(IDS == 0, 255, IDS - 1))
