"""Videos, read and written by PyAV: files, or folders of frames. Letters: H, W height and width of a frame."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import DatasetError
from ..data.files import list_images, read_image
from ..files import temporary_file
from ..optional import require

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")


def is_video(path: Path) -> bool:
    """Whether the name of a file is that of a video."""
    return path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Clip:
    """A video to be read."""

    path: Path
    """The file, or the folder of frames."""
    rate: Fraction
    """Frames per second."""
    num_frames: int | None
    """How many frames it has; None where the file does not say."""

    def frames(self) -> Iterator[Tensor]:
        """Read the frames, uint8 (3, H, W), RGB, one after another.

        Raises:
            DatasetError: a frame cannot be read, or has another size than the first.
        """
        size = None
        for frame in _frames_of_folder(self.path) if self.path.is_dir() else _frames_of_file(self.path):
            size = size or frame.shape[1:]
            if frame.shape[1:] != size:
                raise DatasetError(
                    f"{self.path} has frames of {size[1]}x{size[0]} and of {frame.shape[2]}x{frame.shape[1]} pixels: "
                    "the frames of a video must have one size; without --fps a folder is read as single images"
                )
            yield frame


def open_clip(path: Path, fps: float | None = None) -> Clip:
    """Open a video.

    Args:
        path: a video file, or a folder whose images, by name, are the frames.
        fps: frames per second of a folder; a file has its own.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: the file cannot be read, or the folder holds no image.
        ValueError: PyAV is not installed.
    """
    av = require("av", "a video")
    if path.is_dir():
        return Clip(path, Fraction(fps or 25).limit_denominator(1001), len(list_images(path)))
    if not path.exists():
        raise FileNotFoundError(f"there is no image, video or folder {path}: check the path")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return Clip(path, stream.average_rate or Fraction(25), stream.frames or None)
    except (av.FFmpegError, IndexError) as error:
        raise DatasetError(_unreadable(path, error)) from error


def _frames_of_folder(folder: Path) -> Iterator[Tensor]:
    yield from map(read_image, list_images(folder))


def _frames_of_file(path: Path) -> Iterator[Tensor]:
    """The frames of a video file, turned upright as its metadata says."""
    av = require("av", "a video")
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                yield torch.rot90(pixels, round(frame.rotation / 90), (1, 2)).contiguous()
    except av.FFmpegError as error:
        raise DatasetError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} can't be read as a video ({error}): the file is damaged or has no video; convert or remove it"


class VideoWriter:
    """Write frames of one size to a video file; a context manager. The file is there when the block has ended.

    Where an error ends the block, the file that was there before, if any, is intact.

    Args:
        path: the file. Colors are compressed as H.264 (.mp4), class ids without loss as FFV1 (.mkv).
        rate: frames per second.

    Raises:
        ValueError: PyAV is not installed.
        OSError: the disk is full or not writable.

    Example:
        >>> with VideoWriter(Path("street.mp4"), Fraction(25)) as video:
        ...     video.write(frame)
    """

    def __init__(self, path: Path, rate: Fraction):
        self._av = require("av", "a video")
        self._lossless = path.suffix == ".mkv"
        with ExitStack() as stack:
            temporary = stack.enter_context(temporary_file(path))
            self._container: Any = stack.enter_context(self._av.open(str(temporary), "w"))
            self._stream: Any = self._container.add_stream("ffv1" if self._lossless else "libx264", rate=rate)
            self._stream.pix_fmt = "gray" if self._lossless else "yuv420p"
            self._files = stack.pop_all()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.push(self._flush)  # before the file is closed
        self._files.__exit__(kind, error, trace)

    def _flush(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self._stream.codec_context.is_open:
            self._container.mux(self._stream.encode(None))

    def write(self, picture: Tensor) -> None:
        """Append a frame: a picture, uint8 (3, H, W), to a file of colors; class ids (H, W) to one without loss.

        H.264 has even sizes only: an odd height or width grows by a pixel, the last one repeated.
        """
        if self._lossless:
            pixels, layout = picture.to(torch.uint8), "gray"
        else:
            odd = (0, picture.shape[2] % 2, 0, picture.shape[1] % 2)
            pixels, layout = F.pad(picture.float()[None], odd, mode="replicate")[0].byte().permute(1, 2, 0), "rgb24"
        if not self._stream.codec_context.is_open:
            self._stream.height, self._stream.width = pixels.shape[:2]
        frame = self._av.VideoFrame.from_ndarray(pixels.contiguous().numpy(), format=layout)
        self._container.mux(self._stream.encode(frame))
