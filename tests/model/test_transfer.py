"""Other classes, other channels, other dtypes: what a network keeps when it is loaded for another purpose."""

import pytest
import torch

import unept
from tests.helpers.runs import CLASSES, PALETTE, SMALL, small_model
from unept import UNEPT
from unept.model.transfer import load_fitting

IMAGES = torch.randint(256, (1, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> UNEPT:
    torch.manual_seed(0)
    return small_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def test_other_classes(model, saved):
    """Everything but the classifier is taken, and the names of the old classes and their scores are gone."""
    folder = saved
    with pytest.warns(UserWarning, match=r"of another shape: classifier\.bias \(3,\) instead of \(5,\)"):
        other = UNEPT.from_pretrained(folder, num_classes=5, ignore_mismatched_sizes=True)
    assert other.classes == [f"class {k}" for k in range(5)]
    assert other(IMAGES).logits.shape[1] == len(other.palette) == 5
    assert torch.equal(other(IMAGES).boundary, model(IMAGES).boundary)
    with pytest.raises(RuntimeError, match="size mismatch"):
        UNEPT.from_pretrained(folder, num_classes=5)
    options = {key: value for key, value in SMALL.items() if key not in ("backbone", "pretrained_backbone")}
    with pytest.raises(ValueError, match=r"holds 3 classes\): give .*, or ignore_mismatched_sizes=True"):
        unept.create_model("unept_resnet10t", num_classes=5, checkpoint_path=folder, **options)
    with pytest.warns(UserWarning, match="tensors taken"):
        other = unept.create_model(
            "unept_resnet10t", num_classes=5, checkpoint_path=folder, ignore_mismatched_sizes=True, **options
        ).eval()
    assert torch.equal(other(IMAGES).boundary, model(IMAGES).boundary)
    with pytest.raises(ValueError, match="none of its 1 tensors fits the network"):
        load_fitting(other, {"classifier.weight": torch.zeros(3, 32, 1, 1)})


@pytest.mark.parametrize("stride", [8, 2])
def test_reset_classifier_is_saved(tmp_path, stride):
    network = small_model(logits_stride=stride).half()
    network.evaluation = {"mIoU": 0.5}
    boundary = network(IMAGES).boundary
    network.reset_classifier(2, classes=["road", "rest"])
    assert network(IMAGES).logits.dtype == torch.float16
    network.save_pretrained(tmp_path)
    again = UNEPT.from_pretrained(tmp_path, dtype="float16")
    assert (again.classes, again.num_classes, again.evaluation) == (["road", "rest"], 2, {})
    assert torch.equal(again(IMAGES).boundary, boundary)
    with pytest.raises(ValueError, match="num_classes is 2, but classes has 1 entries"):
        network.reset_classifier(2, classes=["road"])


def test_names_and_colors_that_were_set_are_saved(tmp_path):
    network = small_model()
    network.classes, network.palette = ["a", "b", "c"], [(1, 2, 3)] * 3
    network.save_pretrained(tmp_path)
    again = UNEPT.from_pretrained(tmp_path)
    assert (again.classes, again.palette) == (["a", "b", "c"], [[1, 2, 3]] * 3)
    with pytest.raises(ValueError, match="num_classes is 3, but classes has 2 entries"):
        network.classes = CLASSES[:2]
    with pytest.raises(ValueError, match="num_classes is 3, but palette has 1 entries"):
        network.palette = PALETTE[:1]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float64])
def test_weights_of_another_dtype(model, saved, dtype):
    """Images are normalised in float32 whatever the weights are, and a normalised image of float32 is taken too."""
    other = UNEPT.from_pretrained(saved, **{"torch_dtype" if dtype == "bfloat16" else "dtype": dtype})
    assert other.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    assert other.normalized(IMAGES).dtype == torch.promote_types(other.dtype, torch.float32)
    torch.testing.assert_close(other.normalized(IMAGES).float(), model.normalized(IMAGES))
    logits = other(IMAGES).logits
    assert logits.dtype == other.dtype
    assert torch.equal(logits, other(model.normalized(IMAGES)).logits) == (dtype != torch.float64)
    assert (logits - model(IMAGES).logits).abs().max() < 0.1
    back = other.float()
    assert torch.equal(back.mean, model.mean)


def test_dtype_that_is_none(saved):
    with pytest.raises(ValueError, match="dtype is 'half16'; give float32, float16, bfloat16"):
        UNEPT.from_pretrained(saved, dtype="half16")


def test_built_without_memory(model):
    """On the meta device, then given memory and weights, it normalises as before."""
    with torch.device("meta"):
        empty = UNEPT(3, **SMALL)
    assert all(p.is_meta for p in empty.parameters())
    full = empty.to_empty(device="cpu").eval()
    full.load_state_dict(model.state_dict())
    assert torch.equal(full(IMAGES).logits, model(IMAGES).logits)


def test_other_numbers_of_channels(tmp_path):
    options = {"in_chans": 5, "mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.5, 0.4, 0.3, 0.2, 0.1]}
    network = UNEPT(3, **SMALL, **options).eval()
    images = torch.randint(256, (1, 5, 40, 48), dtype=torch.uint8)
    assert network(images).logits.shape == (1, 3, 5, 6)
    torch.testing.assert_close(
        network.normalized(torch.full((5, 1, 1), 255, dtype=torch.uint8)).flatten(),
        torch.tensor([1.8, 2.0, 7 / 3, 3.0, 5.0]),
    )
    network.save_pretrained(tmp_path)
    again = UNEPT.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, network(images).logits)
    with pytest.raises(ValueError, match=r"images have shape \(1, 3, 40, 56\); they must have 5 channels"):
        network(IMAGES)
    with pytest.raises(ValueError, match=r"in_chans is 5, but mean has 3 numbers: give mean and std"):
        UNEPT(3, **SMALL, in_chans=5, mean=[0.5] * 3)
    plain = UNEPT(3, **SMALL, in_chans=5)
    assert plain.preprocessing["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * 5), "the backbone's average"
    assert plain.preprocessing["std"] == pytest.approx([(0.229 + 0.224 + 0.225) / 3] * 5)


def test_lists_of_models():
    assert unept.list_models(["*lite0", "*tiny"]) == ["unept_lite0", "unept_tiny"]
    assert "unept_deit_base" not in unept.list_models(exclude_filters=["*deit*"])
    assert "unept_resnet50" in unept.list_models(pretrained=True)
    every, trained = (unept.list_models("unept_vit_base_*", all_backbones=True, pretrained=p) for p in (False, True))
    assert set(trained) < set(every)


def test_the_demo_model_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"of another shape: classifier"):
        network = UNEPT.from_pretrained("camvid_tiny", num_classes=2, ignore_mismatched_sizes=True)
    assert (network.num_classes, network.backbone.name) == (2, "tf_efficientnet_lite0")
    (tmp_path / "camvid_tiny").mkdir()  # what is there comes first
    with pytest.raises(FileNotFoundError, match="camvid_tiny has no config"):
        UNEPT.from_pretrained("camvid_tiny")


@pytest.mark.parametrize("source", ["nowhere", "a/b/c"])
def test_a_path_that_does_not_exist(source):
    with pytest.raises(FileNotFoundError, match=f"^{source} does not exist: give a folder"):
        UNEPT.from_pretrained(source)
