"""Eq. 7 loss by loss against plain torch at full resolution."""

import pytest
import torch
import torch.nn.functional as F

from unept.kernels import boundary_targets
from unept.model.boundary import DIRECTIONS
from unept.model.loss import LossWeights, UNEPTLoss
from unept.model.output import UNEPTOutput


def random_output(batch=2, classes=5, dtype=torch.float64, logits_stride=8, boundary_stride=8):
    """Maps of images of 32x48 pixels."""
    maps = ((classes, logits_stride), (1, boundary_stride), (8, boundary_stride))
    tensors = [torch.randn(batch, c, 32 // s, 48 // s, dtype=dtype, requires_grad=True) for c, s in maps]
    return UNEPTOutput(*tensors, logits_stride)


def blocks(height, width, classes=5):
    """Labels with segments wide enough to have an inside."""
    coarse = torch.randint(0, classes, (2, 1, 2, 3)).double()
    labels = F.interpolate(coarse, (height, width), mode="nearest")[:, 0].long()
    labels[:, :5, :7] = 255
    return labels


def equation_7(output, labels, weights):
    """The same, written with full-resolution maps."""
    size = labels.shape[1:]
    up = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in output[:3]]
    offsets = torch.tensor(DIRECTIONS)[up[2].argmax(1)] * (up[1][:, 0].sigmoid() > 0.5)[..., None]
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    xs = (x + offsets[..., 0]).clamp(0, size[1] - 1)
    ys = (y + offsets[..., 1]).clamp(0, size[0] - 1)
    refined = torch.stack([up[0][b][:, ys[b], xs[b]] for b in range(len(labels))])
    distance, direction = boundary_targets(labels)
    counted = labels != 255
    boundary = F.binary_cross_entropy_with_logits(up[1][:, 0][counted], (distance <= 5)[counted].double())
    losses = [
        F.cross_entropy(up[0], labels, ignore_index=255),
        F.cross_entropy(refined, labels, ignore_index=255),
        boundary,
        F.cross_entropy(up[2], direction.long(), ignore_index=255),
    ]
    return losses, sum(w * t for w, t in zip(weights, losses, strict=True))


@pytest.mark.parametrize(("logits_stride", "boundary_stride"), [(8, 8), (8, 1), (2, 1), (1, 1)])
@pytest.mark.parametrize("size", [(32, 48), (27, 43)])
def test_equation_7(size, logits_stride, boundary_stride):
    output, labels = random_output(logits_stride=logits_stride, boundary_stride=boundary_stride), blocks(*size)
    losses = UNEPTLoss()(output, labels)
    padded = F.pad(labels, (0, 48 - size[1], 0, 32 - size[0]), value=255)
    expected_losses, expected = equation_7(output, padded, (1, 1.5, 3, 0.7))
    names = ("segmentation", "refined", "boundary", "direction")
    for name, value in zip(names, expected_losses, strict=True):
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(losses["loss"], output[:3])
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, output[:3]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_nothing_counted_is_zero_not_nan():
    output = random_output(dtype=torch.float32)
    losses = UNEPTLoss()(output, torch.full((2, 32, 48), 255))
    assert all(loss == 0 for loss in losses.values())
    losses["loss"].backward()
    assert all((m.grad == 0).all() for m in output[:3])


def test_class_weights_change_the_segmentation_losses_only():
    output, labels = random_output(), blocks(32, 48)
    weights = torch.tensor([1.0, 5.0, 1.0, 1.0, 0.2])
    plain, weighted = UNEPTLoss()(output, labels), UNEPTLoss(class_weights=weights)(output, labels)
    up = F.interpolate(output.logits, (32, 48), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(up, labels, weights.double(), ignore_index=255)
    torch.testing.assert_close(weighted["segmentation"].double(), expected, rtol=1e-5, atol=1e-6)
    assert weighted["boundary"] == plain["boundary"]


def test_labels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"give labels \(B, H, W\) of the size of the images"):
        UNEPTLoss()(random_output(), torch.zeros(2, 64, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"give labels \(B, H, W\)"):
        UNEPTLoss()(random_output(), torch.zeros(32, 48, dtype=torch.int64))
    for stride in (4, 2, 1):  # labels of the size of finer logits, and of the size that logits at 1/8 would have
        output = random_output(logits_stride=stride, boundary_stride=1)
        for size in ((32 // stride, 48 // stride), (8 * 32 // stride, 8 * 48 // stride)):
            if size != (32, 48):
                with pytest.raises(ValueError, match=r"the model saw images of about 32x48: give labels"):
                    UNEPTLoss()(output, torch.zeros(2, *size, dtype=torch.int64))


def test_four_weights():
    with pytest.raises(ValueError, match="the four lambdas"):
        UNEPTLoss((1, 1.5))
    with pytest.raises(ValueError, match=r"no losses edge to weigh; there are segmentation, refined, boundary"):
        LossWeights.read({"edge": 1.0})


@pytest.mark.parametrize("name", ["segmentation", "refined", "boundary", "direction"])
def test_each_weight_belongs_to_the_loss_of_its_name(name):
    output, labels = random_output(), blocks(32, 48)
    alone = LossWeights(**{**dict.fromkeys(("segmentation", "refined", "boundary", "direction"), 0.0), name: 3.0})
    losses = UNEPTLoss(alone)(output, labels)
    torch.testing.assert_close(losses["loss"].double(), 3 * losses[name].double())
    assert losses["loss"] > 0


def test_weights_by_name_and_in_the_order_of_equation_7():
    paper = LossWeights()
    assert paper == LossWeights.read((1.0, 1.5, 3.0, 0.7)) == LossWeights.read([1.0, 1.5, 3.0, 0.7])
    assert LossWeights.read({"direction": 2.0}) == LossWeights(direction=2.0) == LossWeights.read((1.0, 1.5, 3.0, 2.0))
    assert LossWeights.read(paper) is paper
    assert UNEPTLoss((1.0, 1.5, 3.0, 2.0)).weights.direction == 2.0


def test_learns_boundaries_and_directions():
    """Gradient descent on the maps alone drives every loss down: targets and predictions agree in meaning."""
    labels = blocks(32, 48)
    output = UNEPTOutput(*(m.detach().float().requires_grad_() for m in random_output()[:3]))
    optimizer = torch.optim.Adam(output[:3], lr=0.3)
    first = None
    for _ in range(60):
        losses = UNEPTLoss()(output, labels)
        first = first or {name: loss.item() for name, loss in losses.items()}
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    for name, loss in losses.items():
        assert loss.item() < 0.7 * first[name], name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_weights": torch.tensor([1.0, 5.0, 1.0, 1.0, 0.2])},
        {"direction_pixels": "predicted", "boundary_balance": "classes"},
    ],
    ids=["paper", "weights", "released"],
)
def test_losses_of_parts_add_up_to_those_of_the_batch(options):
    """Also where the parts differ in ignored pixels and in boundaries; so do their gradients."""
    output, labels = random_output(), blocks(27, 43)
    labels[1, 9:] = 255
    loss = UNEPTLoss(**options)
    whole = loss(output, labels)
    targets = loss.targets(labels)
    parts = [loss.losses(UNEPTOutput(*(m[i : i + 1] for m in output[:3])), targets.part(i, i + 1)) for i in range(2)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-6, atol=1e-7, msg=name)
    gradients = torch.autograd.grad(sum(part["loss"] for part in parts), output[:3])
    for actual, wanted in zip(gradients, torch.autograd.grad(whole["loss"], output[:3]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


def test_targets_without_boundaries():
    targets = UNEPTLoss().targets(blocks(27, 43), boundaries=False)
    assert targets.distance is None
    assert targets.direction is None
    assert targets.counts.tolist() == [2 * 27 * 43 - 2 * 35, 2 * 27 * 43 - 2 * 35, 0, 2]


def test_directions_on_predicted_boundary_pixels():
    """They are those of SegFix: predicted boundary, not ignored, true or not; the divisor is that of the true ones."""
    output, labels = random_output(), torch.zeros(2, 32, 48, dtype=torch.int64)
    labels[:, :, 24:] = 1
    labels[:, 20:] = 255
    losses = UNEPTLoss(direction_pixels="predicted")(output, labels)
    boundary, directions = (F.interpolate(m, (32, 48), mode="bilinear", align_corners=False) for m in output[1:3])
    target = boundary_targets(labels, radius=32)[1]
    assert torch.equal(
        target[:, 1:19], torch.where(torch.arange(48) < 24, 0, 4).expand(2, 18, 48)
    )  # away from the edge
    chosen = (boundary[:, 0] > 0) & (labels != 255)
    true_pixels = 2 * 20 * 10  # 5 pixels on either side of the edge
    assert (chosen & ((torch.arange(48) - 23.5).abs() > 5)).sum() > 100, "false boundary pixels"
    expected = F.cross_entropy(directions.permute(0, 2, 3, 1)[chosen], target[chosen], reduction="sum") / true_pixels
    torch.testing.assert_close(losses["direction"].double(), expected, rtol=1e-5, atol=1e-6)
    assert losses["direction"] != UNEPTLoss()(output, labels)["direction"]


def test_balanced_boundary_loss_is_that_of_two_weighted_classes():
    """Weights of the two classes as in the released code: the share of the other one."""
    output, labels = random_output(), blocks(32, 48)
    loss = UNEPTLoss(boundary_balance="classes")(output, labels)["boundary"]
    logits = F.interpolate(output.boundary, (32, 48), mode="bilinear", align_corners=False)[:, 0]
    counted, target = labels != 255, (boundary_targets(labels)[0] <= 5).long()
    share = target[counted].double().mean()
    two = torch.stack([torch.zeros_like(logits), logits], dim=1)  # the logits of two classes
    masked = target.masked_fill(~counted, -1)
    expected = F.cross_entropy(two, masked, torch.stack([share, 1 - share]), ignore_index=-1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    none = torch.full((2, 32, 48), 255)
    assert UNEPTLoss(boundary_balance="classes")(output, none)["boundary"] == 0


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="direction_pixels is 'all'; it must be 'true' or 'predicted'"):
        UNEPTLoss(direction_pixels="all")
    with pytest.raises(ValueError, match="boundary_balance is 'focal'; it must be 'none' or 'classes'"):
        UNEPTLoss(boundary_balance="focal")
    with pytest.raises(ValueError, match="the model predicts 8 directions, but the loss has num_directions=16"):
        UNEPTLoss(num_directions=16)(random_output(), blocks(32, 48))
