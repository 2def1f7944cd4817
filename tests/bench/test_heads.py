"""The heads of the compared networks: sizes of their papers, attention in loops, training steps."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import models, table7
from bench.heads import HEADS, HeadLoss, OCRNetHead, PointRendHead, build_network
from bench.heads.anl import pyramid_pool
from bench.heads.base import HeadOutput, Points
from bench.heads.ccnet import CrissCrossAttention
from bench.heads.dnlnet import DisentangledNonLocal
from bench.heads.encnet import ContextEncoding, Encoding
from bench.heads.ocrnet import ObjectContext
from bench.heads.pointrend import sample, uncertainty
from bench.heads.psanet import PointwiseSpatialAttention
from tests.helpers.models import missing_members
from unept.inference import InferenceConfig, predict_ids
from unept.model.loss import UNEPTLoss
from unept.model.output import TrainableModel, UNEPTOutput

CLASSES = "abcde"
PALETTE = [(0, 0, 0)] * 5
VIT = "vit_tiny_patch16_224"


def small(name):
    return build_network(name, CLASSES, PALETTE, VIT if "SETR" in name else "resnet10t")


@pytest.mark.parametrize("name", HEADS)
def test_prediction_and_a_training_step(name):
    network, loss = small(name), HeadLoss()
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)  # not multiples of 16 or 32
    labels = torch.randint(0, 5, (2, 5, 7)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    network.eval()
    with torch.no_grad():
        output = network(images)
    assert output.logits.shape[:2] == (2, 5)
    assert [n * output.logits_stride for n in output.logits.shape[2:]] == [40, 56]
    assert output.logits_stride <= 8
    assert not missing_members(network, TrainableModel)
    assert predict_ids(network, images[:1], InferenceConfig(flip=True)).shape == (1, 40, 56)

    network.train()
    losses = loss(network(images), labels)
    losses["loss"].backward()
    assert ("points" in losses) == (name == "PointRend")
    assert ("auxiliary" in losses) == (name != "PointRend")
    assert ("presence" in losses) == (name == "EncNet")
    assert all(value.isfinite() for value in losses.values())
    assert not [key for key, p in network.named_parameters() if p.grad is None and "backbone" not in key]
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    optimizer.step()


@pytest.mark.parametrize(
    "row",
    [
        ("CCNet", "ResNet-101"),
        ("OCRNet", "HRNet-W48"),
        ("DNLNet", "ResNet-101"),
        ("PSANet", "ResNet-101"),
        ("EncNet", "ResNet-101"),
        ("PointRend", "ResNet-101"),
        ("Ours", "DeiT-B"),
    ],
    ids=lambda row: row[0],
)
def test_parameters_of_table_7(row):
    """Table 7 rounds up to a whole million: rounded to the nearest one, DNLNet and EncNet would have one less."""
    (found,) = (r for r in table7.ROWS if (r.name, r.backbone) == row)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in found.build().parameters()) / 1e6
    assert math.ceil(parameters) == found.megaparameters


def test_parameters_of_the_widest_setr():
    """The paper does not state the decoder's width; that of ViT-L comes within 1 % of its 401 M."""
    (row,) = (r for r in table7.ROWS if r.name == "SETR PUP, 1024 channels")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in row.build().parameters()) / 1e6
    assert parameters == pytest.approx(row.megaparameters, rel=0.01)


@pytest.mark.parametrize("name", ["SETR PUP, 256 channels", "SETR naive"])
def test_parameters_of_setr(name):
    """SETR's own table has 318.31 M and 305.67 M; here the position table is that of 384x384, 0.3 M smaller."""
    (row,) = (r for r in table7.ROWS if r.name == name)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in row.build().parameters()) / 1e6
    assert parameters == pytest.approx({"SETR naive": 305.67}.get(name, 318.31), rel=0.006)


def test_benchmarks_know_every_head():
    assert {*models.CONVOLUTIONAL_HEADS, *models.VIT_HEADS} == set(HEADS) <= set(models.BUILDERS)


def test_criss_cross_attention_matches_loops():
    block, x = CrissCrossAttention(16, recurrence=1).double(), torch.randn(1, 16, 4, 5, dtype=torch.float64)
    q, k, v = (projection(x)[0] for projection in (block.query, block.key, block.value))
    expected = x.clone()
    for y in range(4):
        for c in range(5):
            seen = [(j, c) for j in range(4) if j != y] + [(y, j) for j in range(5)]
            weights = torch.stack([q[:, y, c] @ k[:, j, i] for j, i in seen]).softmax(0)
            expected[0, :, y, c] += sum(w * v[:, j, i] for w, (j, i) in zip(weights, seen, strict=True))
    torch.testing.assert_close(block(x), expected)


def test_criss_cross_attention_sees_every_pixel_the_second_time():
    x = torch.randn(1, 16, 4, 5, requires_grad=True)
    for recurrence, pixels in ((1, 4 + 5 - 1), (2, 20)):
        block = CrissCrossAttention(16, recurrence)
        (grad,) = torch.autograd.grad(block(x)[0, :, 0, 0].sum(), x)
        assert int((grad.abs().sum(1) > 0).sum()) == pixels


def test_disentangled_attention_is_whitened():
    """A constant added to all queries or keys changes nothing, and the unary term does not depend on the query."""
    block, x = DisentangledNonLocal(8).double(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    before = block(x)
    with torch.no_grad():
        block.query.bias += torch.randn(4)
        block.key.bias += torch.randn(4)
    torch.testing.assert_close(block(x), before)
    with torch.no_grad():
        block.query.weight.zero_()
    rest = block(x) - x
    torch.testing.assert_close(rest, rest[:, :, :1, :1].expand_as(rest))


@pytest.mark.parametrize("distributes", [False, True])
def test_pointwise_spatial_attention_matches_loops(distributes):
    """On 4x5 pixels, of which an extent of 7 leaves out columns that are 4 apart."""
    block = PointwiseSpatialAttention(3, 6, 7, distributes=distributes).double().eval()
    images = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    x = F.interpolate(block.reduce(images), (4, 5), mode="bilinear", align_corners=False)
    weights = block.offsets(x).unflatten(1, (7, 7))  # (B, 7, 7, 4, 5)
    expected = torch.zeros_like(x)
    for y, c, j, i in itertools.product(range(4), range(5), range(4), range(5)):
        dy, dx = j - y, i - c
        if abs(dx) <= 3:
            collected, distributed = weights[:, dy + 3, dx + 3, y, c], weights[:, 3 - dy, 3 - dx, j, i]
            expected[:, :, y, c] += (distributed if distributes else collected)[:, None] * x[:, :, j, i] / 20
    torch.testing.assert_close(block(images), expected)


def test_encoding_matches_loops():
    block, x = Encoding(4, 3), torch.randn(2, 4, 5, 6)
    expected = torch.zeros(2, 3, 4)
    for b, y, c in itertools.product(range(2), range(5), range(6)):
        residuals = x[b, :, y, c] - block.codewords
        expected[b] += (-block.smoothing * residuals.square().sum(1)).softmax(0)[:, None] * residuals
    torch.testing.assert_close(block(x), expected)


def test_context_encoding_scales_channels_of_the_whole_image():
    """Every pixel of a channel is scaled alike, by a factor in (0, 1) that follows from the image."""
    block, x = ContextEncoding(8, 5).eval(), torch.rand(2, 8, 4, 5) + 0.1
    y, presence = block(x)
    factor = y / x
    assert presence.shape == (2, 5)
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor))
    assert 0 < factor.min() < factor.max() < 1
    assert not torch.equal(factor[0], factor[1])


def test_presence_loss_knows_the_classes_of_each_image():
    """Right and certain logits cost nothing; a class that is ignored everywhere is not there. Parts add up."""
    labels = torch.tensor([[[0, 1]], [[1, 255]]]).repeat_interleave(8, 1).repeat_interleave(8, 2)
    right = torch.tensor([[9.0, 9.0, -9.0], [-9.0, 9.0, -9.0]]) * 5
    loss, logits = HeadLoss(), torch.zeros(2, 3, 1, 2)
    assert loss(HeadOutput(logits, presence=right), labels)["presence"] < 1e-9
    wrong = torch.tensor([[45.0, 45.0, -45.0], [45.0, 45.0, -45.0]])
    losses = loss(HeadOutput(logits, presence=wrong), labels)
    torch.testing.assert_close(losses["presence"], torch.tensor(45.0 / 6))
    torch.testing.assert_close(losses["loss"], losses["segmentation"] + 0.2 * losses["presence"])
    targets = loss.targets(labels, boundaries=False)
    parts = [
        loss.losses(HeadOutput(logits[i : i + 1], presence=wrong[i : i + 1]), targets.part(i, i + 1)) for i in (0, 1)
    ]
    torch.testing.assert_close(sum(part["presence"] for part in parts), losses["presence"])


def test_pyramid_pool_has_110_anchors():
    x = torch.randn(2, 3, 24, 24)
    pooled = pyramid_pool(x)
    assert pooled.shape == (2, 3, 110)
    torch.testing.assert_close(pooled[:, :, 0], x.mean((2, 3)))
    torch.testing.assert_close(pooled[:, :, -1], x[:, :, 21:, 21:].mean((2, 3)))


def test_object_context_gathers_one_vector_per_class():
    """With hard regions, each object vector is the mean of its pixels."""
    block, x = ObjectContext(4, 2), torch.randn(1, 4, 3, 4)
    truth = torch.arange(12).view(1, 3, 4) % 3
    seen = []
    block.psi = nn.Sequential(block.psi)
    block.psi.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block.eval()(x, 1000.0 * F.one_hot(truth, 3).permute(0, 3, 1, 2).float())
    for k in range(3):
        torch.testing.assert_close(seen[0][0, :, k, 0], x[0][:, truth[0] == k].mean(1))


def test_ocrnet_on_one_fused_map():
    head = OCRNetHead([24], 5)
    output = head([torch.randn(2, 24, 8, 8)])
    assert output.logits.shape == output.auxiliary[0].shape == (2, 5, 8, 8)


def test_point_samples_are_the_pixels_at_their_centres():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    coordinates = torch.tensor([[[(c + 0.5) / 4, (r + 0.5) / 3] for r in range(3) for c in range(4)]])
    torch.testing.assert_close(sample(x, coordinates)[0, 0], x.flatten())
    assert uncertainty(torch.tensor([[3.0, 1.0, 2.5]])).item() == -0.5


def test_pointrend_changes_the_least_certain_pixels_only():
    head = PointRendHead([8, 8, 8, 8], 3, points=10).eval()
    features = [torch.randn(1, 8, 32 // 2**i, 32 // 2**i) for i in range(4)]
    with torch.no_grad():
        maps = head.pyramid(features)
        coarse = head.coarse(maps)
        refined = head(features).logits
    doubled = F.interpolate(coarse, (64, 64), mode="bilinear")
    plain = F.interpolate(doubled, (128, 128), mode="bilinear")
    assert refined.shape == plain.shape == (1, 3, 128, 128)
    changed = (refined != plain).any(1).sum()
    assert 0 < changed <= 10 + 10 * 36  # ten pixels, and what up-sampling spreads of the ten before


def test_point_loss_is_the_cross_entropy_of_a_pixel():
    """Points at all pixels with the up-sampled logits give the segmentation term. Points outside give nothing."""
    logits, labels = torch.randn(1, 3, 2, 2), torch.randint(0, 3, (1, 16, 16))
    labels[0, 0] = 255
    full = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    y, x = torch.meshgrid((torch.arange(16) + 0.5) / 16, (torch.arange(16) + 0.5) / 16, indexing="ij")
    points = Points(torch.stack([x, y], -1).view(1, -1, 2), full.flatten(2))
    loss = HeadLoss(class_weights=torch.tensor([1.0, 2.0, 0.5]))
    losses = loss(HeadOutput(logits, points=points), labels)
    torch.testing.assert_close(losses["points"], losses["segmentation"])
    outside = Points(points.coordinates + 1, points.logits)
    assert loss(HeadOutput(logits, points=outside), labels)["points"] == 0


def test_compared_networks_learn_by_the_region_losses_of_the_recipe_too():
    pytest.importorskip("segmentation_models_pytorch")
    logits, labels = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randint(0, 3, (2, 16, 16))
    loss = HeadLoss(region_losses={"lovasz": 2.0})
    losses = loss(HeadOutput(logits), labels)
    alone = UNEPTLoss(region_losses={"lovasz": 2.0})(UNEPTOutput(logits, None, None, 8), labels)
    torch.testing.assert_close(losses, alone)
    assert losses["loss"] > losses["segmentation"]


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="there is no head 'FCN'; there are CCNet, "):
        build_network("FCN", CLASSES, PALETTE, "resnet10t")
