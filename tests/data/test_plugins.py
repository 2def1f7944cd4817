"""Datasets and augmentation that users write: found again by training, evaluation and prediction."""

import importlib.metadata
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests.helpers.training import NETWORK
from unept import UNEPT, Segmenter, evaluate, register_dataset, train
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.data import DATASETS, DatasetError, SegmentationDataset, build_dataset
from unept.data.augmentation import CustomTransform, build_transform
from unept.data.loader import read_sample, training_loader
from unept.plugins import load_object
from unept.pretrained import load_run
from unept.training.trainer import Trainer

MODULE = """
import torch
import unept
from torchvision import tv_tensors
from torchvision.transforms import v2
from unept.data import SegmentationDataset


@unept.register_dataset("{name}", title="Stripes", in_memory=True)
class Stripes(SegmentationDataset):
    classes, palette = ("dark", "light"), ((0, 0, 0), (255, 255, 255))

    def __init__(self, root=None, split="train"):
        self.seed = {{"train": 0, "val": 1, "test": 2}}[split]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        mask = (torch.arange(64) // 8 % 2).expand(64, 64).byte()
        noise = torch.randint(40, (5, 64, 64), generator=torch.Generator().manual_seed(4 * self.seed + i))
        return tv_tensors.Image((200 * mask + noise).byte()), tv_tensors.Mask(mask.contiguous())

    def name(self, i):
        return f"stripes_{{i}}"


def augment(image, mask):
    return v2.RandomCrop((64, 64))(*v2.RandomHorizontalFlip()(image, mask))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working folder that registers a dataset of 5 channels; gives its name."""
    name = f"stripes_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    monkeypatch.chdir(tmp_path)
    yield name
    DATASETS.pop(name, None)
    sys.modules.pop(name, None)


def test_a_dataset_of_ones_own(module, tmp_path, capsys):
    """With 5 channels and an augmentation of its own: train, evaluate and the saved options know it."""
    out = tmp_path / "run"
    command = ["shapes", *NETWORK, "--import", module, "--dataset", module, "--augmentation", f"{module}:augment"]
    command += ["--in-chans", "5", "--mean", *["0.5"] * 5, "--std", *["0.25"] * 5, "--no-photometric"]
    command += ["--iterations", "2", "--batch-size", "2", "--workers", "0", "--num-samples", "1", "--out", str(out)]
    with pytest.raises(ValueError, match="the photometric distortion is one of RGB: omit it with --no-photometric"):
        TrainConfig(model=ModelConfig(in_chans=5))
    train.train(command)
    # As in a process of its own, which knows nothing of the dataset yet.
    DATASETS.pop(module)
    sys.modules.pop(module)
    config, _ = load_run(out, torch.device("cpu"))
    assert module not in sys.modules, "options that are only read run no code"
    assert config.data.build("val").classes == ("dark", "light")
    evaluate.evaluate_run(evaluate.EvaluateConfig(out, workers=0))
    assert "dark" in capsys.readouterr().out
    model = UNEPT.from_pretrained(out / "model")
    assert (model.in_chans, model.evaluation["dataset_title"]) == (5, "Stripes")
    image = torch.randint(256, (5, 40, 48), dtype=torch.uint8)
    assert Segmenter(out)(image).overlay().size == (48, 40)
    resumed = train.parse([*command, "--resume", "auto"])[1]
    assert Trainer(resumed, out).train()["images"] == 4


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (torch.zeros(3, 8, 9).byte(), torch.full((8, 9), 2).byte(), "has the id 2 in 72 pixels: ids go from 0 to 1"),
        (torch.zeros(3, 8, 9).byte(), torch.zeros(4, 9).byte(), r"a Tensor of torch.uint8 \(4, 9\); it must be"),
        (torch.zeros(3, 8, 9).byte(), torch.full((8, 9), -1), r"a Tensor of torch.int64 \(8, 9\); it must be"),
        (torch.zeros(3, 8, 9), torch.zeros(8, 9).byte(), r"a Tensor of torch.float32 \(3, 8, 9\) and a Tensor"),
        (torch.zeros(8, 9, 3).numpy(), torch.zeros(8, 9).numpy(), r"a ndarray of float32 \(8, 9, 3\) and a ndarray"),
    ],
)
def test_samples_of_another_form_are_named(image, mask, message):
    """Before a run and by --check-data; those whose form is wrong wherever they are read."""

    class Wrong(SegmentationDataset):
        classes, palette = ("dark", "light"), ((0, 0, 0), (255, 255, 255))

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return image, mask

    message = f"sample 1 of Wrong .*{message}"
    with pytest.raises(DatasetError, match=message):
        Wrong().check()
    if " id " not in message:
        with pytest.raises(DatasetError, match=message):
            read_sample(Wrong(), 1)


def test_samples_may_be_plain_tensors():
    """As docs/extend_training.md says; the transforms tell image and mask by their types."""
    plain = [tuple(tensor.as_subclass(torch.Tensor) for tensor in sample()) for _ in range(2)]
    batch = next(iter(training_loader(plain, build_transform(DataConfig(crop_size=(32, 32)), (0.5,) * 3), 2, seed=0)))
    assert (batch.images.shape, batch.labels.shape) == ((2, 3, 32, 32), (2, 32, 32))


def test_other_processes_find_the_module_in_the_working_folder(module, monkeypatch):
    """As the data set goes to other ranks and to loaders that are not forked, which import the module by its name."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".", str(Path.cwd()))])
    dataset = DataConfig(imports=(module,), dataset=module).build("train")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(len, dataset).result() == 4
    load_object("json:dumps", "augmentation")
    assert sys.path.count(str(Path.cwd())) == 1
    DATASETS.pop(module)
    sys.modules.pop(module)
    monkeypatch.setattr("unept.distributed.run_on_main", Mock(side_effect=[None, InterruptedError]))  # on rank 0
    with pytest.raises(InterruptedError):
        Trainer(TrainConfig(data=DataConfig(imports=(module,), dataset=module)), Path("run"))
    assert module in sys.modules


def test_modules_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="imports names the module no_such_module, which is not found: start"):
        DataConfig(imports=("no_such_module",)).build("train")
    with pytest.raises(ValueError, match="augmentation is 'json'; give module:object"):
        load_object("json", "augmentation")
    with pytest.raises(ValueError, match="but json has no augment"):
        load_object("json:augment", "augmentation")
    (tmp_path / "needs_more.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):
        DataConfig(imports=("needs_more",)).build("train")


def test_entry_points(module, monkeypatch):
    """An installed distribution may declare a dataset, which is then found by its name alone."""
    entry = importlib.metadata.EntryPoint(module, f"{module}:Stripes", "unept.datasets")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, name: [entry] if name == module else [])
    monkeypatch.syspath_prepend(".")
    assert build_dataset(module, split="val").name(1) == "stripes_1"
    with pytest.raises(ValueError, match=r"there is no dataset 'others'.*--import MODULE"):
        build_dataset("others")


def test_a_name_is_given_once(module):
    DataConfig(imports=(module,), dataset=module).build("train")
    with pytest.raises(ValueError, match=f"there is a dataset '{module}' already"):
        register_dataset(module)(TrainConfig)


def sample(size=(40, 60)):
    return tv_tensors.Image(torch.randint(256, (3, *size), dtype=torch.uint8)), tv_tensors.Mask(
        torch.randint(5, size, dtype=torch.uint8)
    )


@pytest.mark.parametrize("kind", ["torchvision", "albumentations"])
def test_augmentation_repeats_with_the_seed_of_the_run(kind):
    if kind == "torchvision":
        custom = v2.Compose([v2.RandomCrop((32, 32)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])
    else:
        albumentations = pytest.importorskip("albumentations")
        custom = albumentations.Compose(
            [albumentations.RandomCrop(32, 32), albumentations.RandomBrightnessContrast(p=1.0)]
        )
    data = [sample() for _ in range(3)]
    transform = build_transform(DataConfig(crop_size=(32, 32)), (0.5,) * 3, custom)

    def batches(start):
        loader = training_loader(data, transform, batch_size=2, seed=3, start_step=start)
        return [batch for batch, _ in zip(loader, range(3 - start), strict=False)]

    whole, resumed = batches(0), batches(1)
    for first, second in zip(whole[1:], resumed, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)
    assert whole[0].images.shape == (2, 3, 32, 32)
    assert len({tuple(batch.images.flatten()[:50].tolist()) for batch in whole}) == 3, "each sample its own numbers"


def test_augmentation_of_another_size():
    with pytest.raises(ValueError, match=r"of crop_size \(32, 32\): end it with a crop"):
        CustomTransform(v2.CenterCrop((32, 31)), (32, 32))(*sample())
    with pytest.raises(ValueError, match=r"an image of torch.float32"):
        CustomTransform(lambda image, mask: (image.float(), mask), (40, 60))(*sample())


def test_augmentation_of_another_form(module, tmp_path):
    with pytest.raises(ValueError, match="the augmentation returned a Image; it must return the image and the mask"):
        CustomTransform(lambda image, mask: image, (40, 60))(*sample())
    with pytest.raises(ValueError, match="the augmentation returned a tuple; it must return the image and the mask"):
        CustomTransform(lambda image, mask: (image, mask, 1), (40, 60))(*sample())
    data = DataConfig(imports=(module,), dataset=module, photometric=False)
    model = ModelConfig(backbone="resnet10t", pretrained_backbone=False, in_chans=5, d_model=32, num_heads=2)
    for name, message in (
        (f"{module}:no_such", "has no no_such"),
        (f"{module}:__name__", "a str, which can't be called"),
    ):
        data.augmentation = name
        with pytest.raises(ValueError, match=message):
            Trainer(TrainConfig(model=model, data=data, batch_size=2), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "what a name means is known before anything is written"
