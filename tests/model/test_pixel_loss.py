"""The losses that may take the place of the cross-entropy of Eq. 7, against formulas in float64 on full-size logits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.runs import small_model
from unept.kernels import use_backend
from unept.model.loss import UNEPTLoss
from unept.model.output import UNEPTOutput
from unept.model.pixel_loss import PixelLoss
from unept.model.region_loss import region_loss

K, IGNORED = 5, 255


@pytest.fixture
def case():
    """Logits (2, K, 3, 4), labels (2, 24, 32) with ignored pixels, class weights and an offset."""
    logits = (3 * torch.randn(2, K, 3, 4)).requires_grad_()
    labels = torch.randint(K, (2, 24, 32), dtype=torch.uint8)
    labels[0, :5] = IGNORED
    return logits, labels, torch.rand(K) + 0.5


def full_size(logits, labels):
    return F.interpolate(logits.double(), labels.shape[1:], mode="bilinear", align_corners=False)


def cross_entropy(logits, labels, weight=None, smoothing=0.0):
    weight = None if weight is None else weight.double()
    return F.cross_entropy(
        full_size(logits, labels),
        labels.long(),
        weight,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=smoothing,
    )


def check(found, expected, logits):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def total(loss, logits, labels, weights, offset=None):
    (summed,) = loss.sums(logits, labels, [offset], ignore_index=IGNORED, class_weights=weights)
    return summed


@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing(case, weighted):
    logits, labels, weights = case
    weights = weights if weighted else None
    expected = cross_entropy(logits, labels, weights, 0.2).sum()
    check(total(PixelLoss(label_smoothing=0.2), logits, labels, weights), expected, logits)


def test_focal(case):
    logits, labels, weights = case
    p = (-cross_entropy(logits, labels)).exp()
    expected = ((1 - p) ** 2 * cross_entropy(logits, labels, weights)).sum()
    check(total(PixelLoss("focal"), logits, labels, weights), expected, logits)


def test_ohem(case):
    """The hardest quarter of the labelled pixels of each image, none of the ignored ones, and their number."""
    logits, labels, weights = case
    expected, count = 0, 0
    for loss, label in zip(cross_entropy(logits, labels, weights), labels, strict=True):
        kept = -(-int((label != IGNORED).sum()) // 4)
        expected, count = expected + loss[label != IGNORED].sort(descending=True).values[:kept].sum(), count + kept
    check(total(PixelLoss("ohem"), logits, labels, weights), expected, logits)
    targets = UNEPTLoss(pixel_loss=PixelLoss("ohem"), class_weights=weights).targets(labels)
    assert targets.counts[0] == count
    nothing = torch.full_like(labels, IGNORED)
    assert total(PixelLoss("ohem"), logits, nothing, weights) == 0


@pytest.mark.parametrize("kind", ["focal", "ohem", "smooth"])
def test_refined_prediction_is_read_where_the_offset_points(case, kind):
    logits, labels, weights = case
    loss = PixelLoss(label_smoothing=0.1) if kind == "smooth" else PixelLoss(kind)
    offset = torch.zeros(2, 2, *labels.shape[1:], dtype=torch.int16)
    assert torch.equal(total(loss, logits, labels, weights, offset), total(loss, logits, labels, weights))
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :, :-1] = labels[:, :, 1:]  # the pixel before asks for what it sees one further to the right
    labels[:, :, 0] = IGNORED
    offset[:, 0] = 1
    torch.testing.assert_close(
        total(loss, logits, shifted, weights, offset), total(loss, logits, labels, weights), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["cross-entropy", "focal", "ohem", "smooth"])
def test_both_terms_at_once_are_the_two_sums(case, kind):
    logits, labels, weights = case
    loss = PixelLoss(label_smoothing=0.1) if kind == "smooth" else PixelLoss(kind)
    offset = torch.randint(-3, 4, (2, 2, *labels.shape[1:]))
    both = loss.sums(logits, labels, [None, offset], ignore_index=IGNORED, class_weights=weights)
    for found, shift in zip(both, (None, offset), strict=True):
        torch.testing.assert_close(found, total(loss, logits, labels, weights, shift))
    assert both[0] != both[1]


@pytest.mark.parametrize("kind", ["ohem", "focal", "regions"])
def test_parts_add_up_to_the_batch(kind):
    """On several processes and with --accumulate the gradient is that of the whole batch."""
    regions = {"dice": 1.0, "lovasz": 2.0} if kind == "regions" else None
    if regions:
        pytest.importorskip("segmentation_models_pytorch")
    loss = UNEPTLoss(pixel_loss=PixelLoss("cross-entropy" if regions else kind), region_losses=regions)
    model = small_model(K).eval()
    labels = torch.randint(K, (3, 8, 12), dtype=torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[1] = IGNORED
    output = model(torch.randint(256, (3, 3, 32, 48), dtype=torch.uint8))
    whole = loss(output, labels)
    targets = loss.targets(labels)
    parts = [
        loss.losses(UNEPTOutput(*(m[start:stop] for m in output[:3])), targets.part(start, stop))
        for start, stop in ((0, 1), (1, 2), (2, 3))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-6)
    assert whole["loss"].isfinite()


@pytest.mark.parametrize("name", ["dice", "lovasz"])
def test_region_losses_compare_every_second_pixel_of_the_up_sampled_prediction(name):
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    logits = torch.randn(2, K, 4, 6, requires_grad=True)
    labels = torch.randint(K, (2, 32, 48))
    labels[:, :, 40:] = IGNORED
    compare = {"dice": losses.DiceLoss, "lovasz": losses.LovaszLoss}[name]("multiclass", ignore_index=IGNORED)
    full = F.interpolate(logits, scale_factor=8, mode="bilinear", align_corners=False)
    expected = sum(compare(full[b : b + 1, :, ::2, ::2], labels[b : b + 1, ::2, ::2]) for b in range(2))
    found = region_loss(name, IGNORED)(logits, labels)
    torch.testing.assert_close(found, expected)
    pair = [torch.autograd.grad(loss, logits, create_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*pair)
    assert pair[0].abs().sum() > 0
    penalties = [torch.autograd.grad((grad**2).sum(), logits)[0] for grad in pair]
    torch.testing.assert_close(*penalties)
    assert penalties[0].abs().sum() > 0
    found = region_loss(name, IGNORED)(logits, labels)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], pair[1])


def test_region_losses_compare_each_image_once(monkeypatch):
    """Also for the gradient: a gradient checkpoint would sort everything a second time."""
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    compared, forward = [], losses.LovaszLoss.forward
    monkeypatch.setattr(losses.LovaszLoss, "forward", lambda *args: compared.append(args) or forward(*args))
    logits, labels = torch.randn(3, K, 4, 6, requires_grad=True), torch.randint(K, (3, 32, 48))
    labels[1] = IGNORED
    loss = region_loss("lovasz", IGNORED)
    loss(logits, labels).backward()
    assert len(compared) == 2
    assert not logits.grad[1].any()
    with torch.no_grad():
        assert not loss(logits, labels).requires_grad
    half = logits.detach().bfloat16().requires_grad_()
    loss(half, labels).backward()
    torch.testing.assert_close(half.grad, logits.grad.bfloat16(), rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("name", ["dice", "lovasz"])
def test_region_losses_find_labels_between_the_compared_rows_and_columns(name):
    """Labels of single points, say: all pixels are compared where none of every second row and column counts."""
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    logits = torch.randn(1, K, 4, 6, requires_grad=True)
    labels = torch.full((1, 32, 48), IGNORED)
    labels[0, 9, 11], labels[0, 21, 30] = 0, 1
    compare = {"dice": losses.DiceLoss, "lovasz": losses.LovaszLoss}[name]("multiclass", ignore_index=IGNORED)
    full = F.interpolate(logits, scale_factor=8, mode="bilinear", align_corners=False)
    found = region_loss(name, IGNORED)(logits, labels)
    torch.testing.assert_close(found, compare(full, labels))
    found.backward()
    assert logits.grad.any()


def test_lovasz_of_one_class_is_refused():
    pytest.importorskip("segmentation_models_pytorch.losses")
    with pytest.raises(ValueError, match="one only: set lovasz_weight to 0"):
        region_loss("lovasz", IGNORED)(torch.randn(1, 1, 4, 6), torch.zeros(1, 32, 48, dtype=torch.int64))


def test_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch.losses", None)
    with pytest.raises(ValueError, match=r'--dice-weight.*not installed: pip install "unept\[losses\]"'):
        UNEPTLoss(region_losses={"dice": 1.0})


def test_gradient_checkpointing_changes_no_gradient():
    """It keeps less for the backward, at the same loss and gradients, dropout included."""
    model = small_model(K, dropout=0.2).train()
    images, labels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), torch.randint(K, (2, 64, 64))

    def step():
        torch.manual_seed(1)
        model.zero_grad()
        kept = []  # holding the tensors keeps their addresses from being used again

        def pack(tensor):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = UNEPTLoss()(model(images), labels)["loss"]
        loss.backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return loss, gradients, sum(size for place, size in sizes.items() if place not in weights)

    loss, gradients, kept = step()
    model.set_grad_checkpointing()
    again, same, fewer = step()
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert fewer < 0.7 * kept


def test_layers_are_computed_again_on_their_backend():
    """In a thread of autograd, which has not chosen; here one that chose kernels which refuse float64."""
    model = small_model().double().train()
    model.set_grad_checkpointing()
    labels = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    with use_backend("torch"):
        loss = UNEPTLoss()(model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)), labels)["loss"]

    def differentiate() -> None:
        with use_backend("triton"):
            loss.backward()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(differentiate).result()
    assert all(p.grad is not None for p in model.encoder.parameters())
