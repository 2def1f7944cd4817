"""Bad samples are raised or skipped, as asked for; batches say how long they took."""

import itertools
import time

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from tests.helpers.models import StandIn
from unept import evaluate
from unept.data import DatasetError, SegmentationDataset, evaluation_loader, train_transform
from unept.data.loader import TrainingSampler, read_sample
from unept.data.loader import training_loader as make_training_loader
from unept.inference import InferenceConfig
from unept.model.output import UNEPTOutput

SIZE = 16


class Numbered(SegmentationDataset):
    """Image i is filled with i, and its label is class 0 left and class 1 right; samples in `bad` can't be read."""

    classes = ("left", "right")
    palette = ((255, 0, 0), (0, 255, 0))

    def __init__(self, length: int, bad: set[int], where: object, delay: float = 0.0):
        self.length = length
        self.bad = bad
        self.where = where  # a different name in each test: a file is reported once per process
        self.delay = delay

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        time.sleep(self.delay)
        if i in self.bad:
            raise DatasetError(f"{self.where}/{i}.png can't be read (torn)")
        mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
        mask[:, SIZE // 2 :] = 1
        return tv_tensors.Image(torch.full((3, SIZE, SIZE), i, dtype=torch.uint8)), tv_tensors.Mask(mask)

    def name(self, i: int) -> str:
        return f"image{i}"


class Left(StandIn):
    """Predicts class 0 everywhere."""

    def __init__(self):
        super().__init__(Numbered.classes, refines=False)

    def forward(self, images: Tensor) -> UNEPTOutput:
        logits = torch.zeros(len(images), 2, SIZE // 8, SIZE // 8)
        logits[:, 0] = 1
        return UNEPTOutput(logits, None, None)


def training_loader(dataset: SegmentationDataset, **options):
    return make_training_loader(dataset, train_transform(SIZE, scale=(1.0, 1.0)), batch_size=4, seed=3, **options)


def numbers(batches) -> list[int]:
    """Which images the batches hold."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch.images]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_by_the_next_readable_one(workers, tmp_path, capsys):
    dataset = Numbered(10, {3, 4, 9}, tmp_path)
    drawn = [index for index, _ in itertools.islice(TrainingSampler(10, seed=3), 32)]
    loader = training_loader(dataset, workers=workers, on_bad_sample="skip")
    batches = list(itertools.islice(loader, 8))
    assert numbers(batches) == [{3: 5, 4: 5, 9: 0}.get(index, index) for index in drawn]
    # One error for a draw of 4 and of 9, two for a draw of 3.
    expected = sum({3: 2, 4: 1, 9: 1}.get(index, 0) for index in drawn)
    assert loader.skipped == sum(len(batch.skipped) for batch in batches) == expected > 6
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [f"skipped: {tmp_path}/{i}.png can't be read (torn)" for i in (3, 4, 9)]


def test_replacements_do_not_depend_on_workers_or_resume(tmp_path):
    dataset = Numbered(10, {0, 1, 2, 7}, tmp_path)
    whole = list(itertools.islice(training_loader(dataset, on_bad_sample="skip"), 6))
    resumed = list(itertools.islice(training_loader(dataset, start_step=2, workers=1, on_bad_sample="skip"), 4))
    for one, other in zip(whole[2:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        assert one.skipped == other.skipped
    shares = [
        next(iter(training_loader(dataset, on_bad_sample="skip", rank=rank, world_size=2))).images for rank in (0, 1)
    ]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), torch.cat([batch.images for batch in whole[:2]]))


@pytest.mark.parametrize("workers", [0, 1])
def test_without_skip_a_bad_sample_is_an_error(workers, tmp_path):
    loader = training_loader(Numbered(4, {2}, tmp_path), workers=workers)
    with pytest.raises(DatasetError) as raised:
        next(iter(loader))
    assert str(raised.value) == f"{tmp_path}/2.png can't be read (torn)"
    assert loader.skipped == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error(workers, tmp_path):
    loader = training_loader(Numbered(5, set(range(5)), tmp_path), workers=workers, on_bad_sample="skip")
    with pytest.raises(DatasetError, match=r"none of the dataset's 5 samples can be read\. .*torn"):
        next(iter(loader))


def test_the_first_sample_follows_the_last(tmp_path):
    dataset = Numbered(4, {0, 3}, tmp_path)
    index, (image, _), errors = read_sample(dataset, 3, "skip")
    assert index == int(image[0, 0, 0]) == 1
    assert [error.split("/")[-1][:5] for error in errors] == ["3.png", "0.png"]
    with pytest.raises(DatasetError, match=r"3\.png can't be read"):
        read_sample(dataset, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_a_bad_sample_out(workers, tmp_path, capsys):
    dataset = Numbered(6, {0, 4}, tmp_path)
    for _ in range(2):
        loader = evaluation_loader(dataset, workers=workers, on_bad_sample="skip")
        assert [int(image[0, 0, 0, 0]) for image, _ in loader] == [1, 2, 3, 5]
        assert loader.skipped == 2
    assert capsys.readouterr().err.count("skipped: ") == 2, "each file once"
    with pytest.raises(DatasetError, match=r"0\.png"):
        list(evaluation_loader(dataset, workers=workers))


def scores(dataset: SegmentationDataset, **options):
    return evaluate.evaluate_model(Left(), dataset, InferenceConfig(), torch.device("cpu"), 1, **options)


def test_scores_say_how_many_images_were_left_out(tmp_path):
    whole = scores(Numbered(3, set(), tmp_path))
    some = scores(Numbered(5, {0, 3}, tmp_path), on_bad_sample="skip")
    assert (whole["images"], whole["skipped"]) == (some["images"], 3 - some["images"]) == (3, 0)
    assert some["skipped"] == 2
    assert some["pixAcc"] == whole["pixAcc"] == 0.5
    last_line = evaluate.format_table(some, Numbered.classes).splitlines()[-1]
    assert "; 3 images (2 more left out because they cannot be read), " in last_line
    assert "; 3 images, " in evaluate.format_table(whole, Numbered.classes).splitlines()[-1]
    with pytest.raises(DatasetError, match=r"0\.png can't be read"):
        scores(Numbered(5, {0, 3}, tmp_path))
    with pytest.raises(DatasetError, match="none of the 2 images can be read"):
        scores(Numbered(2, {0, 1}, tmp_path), on_bad_sample="skip")


def test_samples_are_drawn_of_images_that_can_be_read(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate.drawing, "sample_panel", lambda samples, *_: drawn.extend(samples))
    arguments = (Left(), Numbered(4, {2}, tmp_path), 2, InferenceConfig(), torch.device("cpu"), tmp_path / "x.png")
    evaluate.draw_samples(*arguments, on_bad_sample="skip")
    assert [sample.name for sample in drawn] == ["image0", "image3"]
    with pytest.raises(DatasetError, match=r"2\.png"):
        evaluate.draw_samples(*arguments)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_say_how_long_a_sample_took(workers, tmp_path):
    batches = itertools.islice(training_loader(Numbered(8, set(), tmp_path, delay=0.02), workers=workers), 2)
    for batch in batches:
        assert 0.02 <= batch.seconds < 0.06
