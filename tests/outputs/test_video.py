"""Videos written and read again: sizes, rates, ids without loss, and what is not a video."""

from fractions import Fraction

import pytest
import torch

from unept.colors import to_pil
from unept.data import DatasetError
from unept.outputs.video import VideoWriter, open_clip

av = pytest.importorskip("av")


def write_video(path, pictures, rate=Fraction(10)):
    with VideoWriter(path, rate) as video:
        for picture in pictures:
            video.write(picture)
    return path


def test_colors(tmp_path):
    pictures = [torch.full((3, 33, 47), value, dtype=torch.uint8) for value in (20, 120, 220)]
    clip = open_clip(write_video(tmp_path / "a.mp4", pictures, Fraction(30000, 1001)))
    assert clip.rate == Fraction(30000, 1001)
    assert clip.num_frames == 3
    frames = list(clip.frames())
    assert [frame.shape for frame in frames] == [(3, 34, 48)] * 3  # even sizes
    for frame, picture in zip(frames, pictures, strict=True):
        assert (frame.float().mean() - picture.float().mean()).abs() < 4


def test_ids_are_kept_to_the_bit(tmp_path):
    ids = [torch.randint(0, 150, (33, 47)) for _ in range(3)]
    path = write_video(tmp_path / "a.mkv", ids)
    with av.open(str(path)) as container:
        found = [torch.from_numpy(frame.to_ndarray(format="gray")) for frame in container.decode(video=0)]
    assert all(torch.equal(a.long(), b) for a, b in zip(found, ids, strict=True))
    assert len(found) == 3


def test_a_video_is_written_whole_or_not_at_all(tmp_path):
    path = write_video(tmp_path / "a.mkv", [torch.zeros(8, 8)])
    before = path.read_bytes()
    with pytest.raises(FloatingPointError), VideoWriter(path, Fraction(10)) as video:  # noqa: PT012
        video.write(torch.ones(8, 8))
        raise FloatingPointError
    assert path.read_bytes() == before
    with pytest.raises(OSError, match=r"while writing .*no/a.mkv"):
        write_video(tmp_path / "no" / "a.mkv", [torch.zeros(8, 8)])
    assert [file.name for file in tmp_path.iterdir()] == ["a.mkv"]


def test_a_turned_video_is_read_upright(tmp_path):
    picture = torch.zeros(3, 32, 64, dtype=torch.uint8)
    picture[:, :16, :32] = 255  # the upper left
    with VideoWriter(tmp_path / "turned.mp4", Fraction(10)) as video:
        video._stream.width, video._stream.height = 64, 32
        video._stream.set_display_rotation(90)  # counter-clockwise
        video.write(picture)
    (frame,) = open_clip(tmp_path / "turned.mp4").frames()
    assert frame.shape == (3, 64, 32)
    assert frame[0, :32, :16].float().mean() < 10
    assert frame[0, 32:, :16].float().mean() > 240  # now the lower left


def test_a_folder_of_frames(tmp_path):
    for i in (2, 0, 1):
        to_pil(torch.full((3, 16, 24), i, dtype=torch.uint8)).save(tmp_path / f"{i:03}.png")
    clip = open_clip(tmp_path, 12.5)
    assert (clip.rate, clip.num_frames) == (Fraction(25, 2), 3)
    assert [int(frame[0, 0, 0]) for frame in clip.frames()] == [0, 1, 2]
    to_pil(torch.zeros(3, 8, 24, dtype=torch.uint8)).save(tmp_path / "003.png")
    with pytest.raises(DatasetError, match=r"has frames of 24x16 and of 24x8 pixels"):
        list(clip.frames())


def test_what_is_not_a_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no image, video or folder"):
        open_clip(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    with pytest.raises(DatasetError, match=r"text.mp4 can't be read as a video"):
        open_clip(tmp_path / "text.mp4")
    whole = write_video(tmp_path / "whole.mp4", [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 3)
    (tmp_path / "torn.mp4").write_bytes(whole.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"torn.mp4 can't be read as a video"):
        list(open_clip(tmp_path / "torn.mp4").frames())
