"""Training samples a second and core, from a file to the crop that goes into a batch.

`unept` resamples what a crop shows and leaves colours to the device; `torchvision` is the usual pipeline of its
transforms: resize the whole image, crop, distort the colours. `decoding` reads and checks the files and does no more:
what any loader takes at the least. One thread each. Images are noise at three scales, in files of the sizes and formats
of ADE20K and Cityscapes; and those of CamVid where UNEPT_CAMVID names a folder of its label images (`.../valannot`).
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize, to_pil_image

from unept.data import CamVid, SegmentationDataset, TransformedDataset, train_transform
from unept.data.folder import ImageFolder
from unept.data.transforms import MEAN_COLOR, Span, scaled_crop, scaled_mask_crop

from .harness import Group, Variant

FILES = 4
SCALE = (0.5, 2.0)
VARIANTS = ["unept", "torchvision", "decoding"]
BASELINE = "torchvision"


@dataclass
class Case:
    """One group: files of (height, width), as `suffix`, cropped to a square."""

    source: str
    size: tuple[int, int]
    crop: tuple[int, int]
    suffix: str = ""

    @property
    def name(self) -> str:
        """The group's name in the report, unique to it."""
        height, width = self.size
        return f"loader, {self.source}, {width}x{height} to {self.crop[1]}x{self.crop[0]}"

    @cached_property
    def dataset(self) -> SegmentationDataset:
        """Files on disk; those that are made go with the process."""
        if self.source == "camvid":
            return CamVid(Path(os.environ["UNEPT_CAMVID"]).parent, "val")
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(19)))
        generator = torch.Generator().manual_seed(0)
        for i in range(FILES):
            image, mask = noise(self.size, generator)
            for kind, tensor, suffix in (("images", image, self.suffix), ("labels", mask, "png")):
                folder = root / kind / "train"
                folder.mkdir(parents=True, exist_ok=True)
                to_pil_image(tensor).save(folder / f"{i}.{suffix}")
        return ImageFolder(root)


def noise(size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image uint8 (3, H, W) that compresses like a photograph, and labels uint8 (1, H, W) in segments."""
    height, width = size
    image = torch.zeros(1, 3, height, width)
    for cells, strength in ((4, 80), (32, 40), (height // 2, 15)):
        coarse = torch.randn(1, 3, cells, cells * width // height, generator=generator)
        image += strength * F.interpolate(coarse, size, mode="bilinear")
    coarse = torch.randn(1, 19, 6, 8, generator=generator)
    mask = F.interpolate(coarse, size, mode="bilinear").argmax(1)
    return (image[0] + 128).clamp(0, 255).to(torch.uint8), mask.to(torch.uint8)


def cases(full: bool, device: str) -> list[Case]:
    """The same on every machine."""
    found = [
        Case("jpeg", (512, 683), (480, 480), "jpg"),
        Case("png", (1024, 2048), (768, 768), "png"),
    ]
    return [*found, Case("camvid", (360, 480), (360, 480))] if "UNEPT_CAMVID" in os.environ else found


def torchvision_transform(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """Random scale, crop, flip, colours: the usual pipeline of torchvision's transforms."""
    fill = {tv_tensors.Image: MEAN_COLOR, tv_tensors.Mask: 255}
    return v2.Compose(
        [
            v2.ScaleJitter(case.size, SCALE, antialias=True),
            v2.RandomCrop(case.crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(),
        ]
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def crop_gate(case: Case) -> None:
    """A crop is what the whole image, resized and then cropped, has there; the mask has its nearest pixels."""
    image, mask = case.dataset[0]
    for factor in (0.5, 1.5):
        whole = resize(image, [round(n * factor) for n in case.size], antialias=True).as_subclass(Tensor)
        steps = [length / n for length, n in zip(case.size, whole.shape[1:], strict=True)]
        # Whole pixels of both; of the smaller image everything.
        starts = [0, 0] if factor < 1 else [20, 40]
        sizes = [min(n, crop) for n, crop in zip(whole.shape[1:], case.crop, strict=True)]
        rows, columns = (Span(*axis) for axis in zip(starts, steps, sizes, strict=True))
        top, left = (round(start * factor) for start in starts)
        window = (slice(top, top + sizes[0]), slice(left, left + sizes[1]))
        difference = (
            scaled_crop(image.as_subclass(Tensor), rows, columns) - whole[(slice(None), *window)].float()
        ).abs()
        edge = 0 if factor < 1 else 2  # where a crop does not look at what is before it
        assert difference[:, edge:, edge:].max() <= 2, "a crop differs from the whole image's"
        resized = F.interpolate(mask[None, None].as_subclass(Tensor), whole.shape[1:], mode="nearest-exact")[0, 0]
        same = scaled_mask_crop(mask.as_subclass(Tensor), rows, columns) == resized[window]
        assert same.float().mean() > 0.999, "a mask's crop differs from the whole mask's"


def prepare(case: Case, name: str) -> Variant:
    """The variant `name` of a case."""
    if name == "unept":
        transform: Callable = train_transform(case.crop, scale=SCALE)
    elif name == "torchvision":
        transform = torchvision_transform(case)
    else:
        transform = lambda image, mask: (image, mask)
    samples = TransformedDataset(case.dataset, transform)
    seeds = iter(range(10**9))

    def step() -> list[tuple[Tensor, ...]]:
        return [samples[(i, next(seeds))].tensors for i in range(FILES)]

    def gate() -> None:
        if name == "unept":
            crop_gate(case)
        size = case.size if name == "decoding" else case.crop
        for image, mask, *_ in step():
            assert image.shape == (3, *size)
            assert mask.shape == size
            assert image.dtype == mask.dtype == torch.uint8
            assert (mask != 255).any()

    return Variant(step, gate, one_thread, on_gpu=False)


def test_loader(samples, case, variant):
    height, width = case.size
    group = Group(
        name=case.name,
        prepare=partial(prepare, case),
        baseline=BASELINE,
        info={"shape": f"{FILES}x3x{height}x{width}", "dtype": "uint8"},
        images=FILES,
    )
    samples(group)
