"""What holds for every size, class count and pattern of ignored pixels, on examples that Hypothesis chooses.

The same ones each time; `pytest tests/kernels/test_properties.py -m "" --hypothesis-profile search` looks for new ones.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from tests.evaluation.test_metrics import loop_boundary_counts, loop_region_scores
from tests.helpers import reference
from tests.helpers.accuracy import assert_accurate
from tests.helpers.attention import attention, check, deformable, make_case
from tests.kernels.test_bilinear_gather import assert_matches_reference as assert_gathers
from tests.kernels.test_boundary_targets import assert_matches_reference as assert_targets
from unept.data import TrainingSampler, train_transform
from unept.data.photometric import distort
from unept.evaluation.boundary_metrics import BoundaryFScore
from unept.evaluation.metrics import ConfusionMatrix
from unept.kernels import upsample_argmax, upsample_cross_entropy, use_backend
from unept.model.loss import UNEPTLoss
from unept.model.output import UNEPTOutput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def label_maps(draw, num_classes, most_images=2, longest_side=13):
    """int64 (B, H, W): noise or blobs, of some of the classes; nothing, some, whole rows or everything is ignored."""
    torch.manual_seed(draw(SEEDS))
    B, H, W = (draw(st.integers(1, most)) for most in (most_images, longest_side, longest_side))
    grain = draw(st.sampled_from([1, 3, 6]))
    present = draw(st.integers(1, num_classes))
    coarse = torch.randint(present, (B, H // grain + 1, W // grain + 1))
    labels = coarse.repeat_interleave(grain, 1).repeat_interleave(grain, 2)[:, :H, :W].clone()
    ignored = draw(st.sampled_from(["nothing", "some", "rows", "an image", "everything"]))
    if ignored == "some":
        labels[torch.rand(labels.shape) < 0.3] = 255
    elif ignored == "rows":
        labels[:, draw(st.integers(0, H - 1)) :] = 255
    elif ignored == "an image":
        labels[0] = 255
    elif ignored == "everything":
        labels.fill_(255)
    return labels


def on_both_backends(interpreted=2, **strategies):
    """Parametrise a test by backend, with few examples and, slow, with as many as it has time for.

    Triton's interpreter takes tens of milliseconds per program: it gets `interpreted` examples, and 3 where slow.
    """
    cases = [("torch", 8), *([("triton", interpreted)] if interpreted else [])]
    slow = [pytest.param(name, count, marks=pytest.mark.slow) for name, count in (("torch", None), ("triton", 3))]

    def decorate(test):
        @pytest.mark.parametrize(("backend", "count"), [*cases, *slow])
        def run(backend, count):
            chosen = settings() if count is None else settings(max_examples=count)
            with use_backend(backend):
                chosen(given(**strategies)(test))()

        return run

    return decorate


# --- operators --------------------------------------------------------------------------------------------------------


@on_both_backends(
    interpreted=0,
    seed=SEEDS,
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    queries=st.integers(1, 9),
    heads=st.integers(1, 3),
    channels=st.integers(1, 9),
    num_points=st.integers(1, 5),
    batch=st.integers(1, 2),
    normalised=st.booleans(),
    dtype=DTYPES,
)
def test_attention(seed, dtype, normalised, **sizes):
    torch.manual_seed(seed)
    if normalised:
        dtype = torch.float32  # rounded locations would lie on pixels, where slopes jump
    check(deformable if normalised else attention, make_case(normalised=normalised, **sizes).to(DEVICE, dtype))


@on_both_backends(
    seed=SEEDS,
    shape=st.tuples(*[st.integers(1, 2), *[st.integers(1, 9)] * 3]),
    count=st.integers(1, 20),
    padding=st.sampled_from(["zeros", "border"]),
)
def test_gather(seed, shape, count, padding):
    torch.manual_seed(seed)
    _, _, height, width = shape
    features = torch.randn(shape, device=DEVICE)
    # Away from whole numbers, where slopes jump.
    points = torch.stack([torch.randint(-2, n + 2, (shape[0], count)) for n in (width, height)], dim=-1)
    points = points + 0.1 + 0.8 * torch.rand(points.shape)
    points[:, 0] = 0.3  # one at least reads something
    assert_gathers(features, points.to(DEVICE), padding)


@on_both_backends(
    data=st.data(),
    num_classes=st.integers(1, 40),
    low=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    step=st.sampled_from([0, 1, 20]),
    weighted=st.booleans(),
)
def test_cross_entropy_and_class_ids(data, num_classes, low, step, weighted):
    target = data.draw(label_maps(num_classes, longest_side=9))
    logits = (3 * torch.randn(len(target), num_classes, *low)).to(DEVICE).requires_grad_()
    size = target.shape[1:]
    offset = torch.randint(-step, step + 1, (len(target), 2, *size)) if step else None
    class_weights = torch.rand(num_classes) + 0.5 if weighted else None

    exact = logits.detach().cpu().double().requires_grad_()
    expected = reference.upsample_cross_entropy(exact, target, offset, class_weights)
    (wanted,) = torch.autograd.grad(expected, exact) if expected.requires_grad else (torch.zeros_like(exact),)
    offset, class_weights = (None if tensor is None else tensor.to(DEVICE) for tensor in (offset, class_weights))
    loss = upsample_cross_entropy(logits, target.to(DEVICE), offset, class_weights=class_weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    if wanted.abs().max() > 1e-6:
        assert_accurate(gradient, wanted, name="gradient")
    else:  # one class, or nothing that counts: what is left is rounding
        assert gradient.abs().max() < 1e-6

    ids = upsample_argmax(logits.detach(), size, offset).cpu()
    z = reference.upsampled(exact.detach(), size, None if offset is None else offset.cpu())
    assert (z.amax(-1) - z.gather(-1, ids[..., None])[..., 0]).max() < 1e-5


@on_both_backends(labels=label_maps(4), radius=st.sampled_from([1, 2.5, 5]))
def test_boundaries(labels, radius):
    assert_targets(labels.to(DEVICE), radius)


# --- the loss ---------------------------------------------------------------------------------------------------------


@st.composite
def outputs_and_labels(draw):
    num_classes = draw(st.integers(1, 30))
    labels = draw(label_maps(num_classes, most_images=3, longest_side=40))
    h, w = (math.ceil(n / 8) for n in labels.shape[1:])
    maps = [torch.randn(len(labels), c, h, w, dtype=torch.float64, requires_grad=True) for c in (num_classes, 1, 8)]
    return UNEPTOutput(*maps), labels


@given(outputs_and_labels(), st.integers(0, 3))
def test_loss_of_parts_and_of_ignored_pixels(case, cut):
    """Terms are finite, those of parts add up to the whole, and an image that is ignored has no gradient."""
    output, labels = case
    loss = UNEPTLoss()
    whole = loss(output, labels)
    gradients = torch.autograd.grad(whole["loss"], output[:3])
    assert all(torch.isfinite(term) and term >= 0 for term in whole.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    targets = loss.targets(labels)
    cut = min(cut, len(labels))
    parts = [
        loss.losses(UNEPTOutput(*(m[start:stop] for m in output[:3])), targets.part(start, stop))
        for start, stop in ((0, cut), (cut, len(labels)))
        if stop > start
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-6, atol=1e-6, msg=name)
    for image, ignored in enumerate((labels == 255).flatten(1).all(1)):
        assert not ignored or all((gradient[image] == 0).all() for gradient in gradients)


# --- data -------------------------------------------------------------------------------------------------------------


@given(
    labels=label_maps(254, most_images=1, longest_side=60),
    crop=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    short_side=st.none() | st.integers(1, 60),
    scale=st.tuples(st.floats(0.1, 1), st.floats(1, 3)),
    cap=st.sampled_from([0.5, 0.75, 1.0]),
)
def test_training_transform(labels, crop, short_side, scale, cap):
    """Any image becomes a crop of exactly that size, without a class that it did not have; image and mask agree."""
    mask = labels[0].to(torch.uint8)
    image = torch.stack([mask, mask, mask])  # which class it shows is its colour
    transform = train_transform(crop, short_side, scale, cap, fill=(255, 255, 255))
    cropped, ids, strengths = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    assert cropped.shape == (3, *crop)
    assert ids.shape == crop
    assert cropped.dtype == ids.dtype == torch.uint8
    assert set(ids.unique().tolist()) <= set(mask.unique().tolist()) | {255}
    height, width = (int(n) for n in strengths[-2:])
    assert (ids[height:] == 255).all()
    assert (ids[:, width:] == 255).all()
    smallest, largest = (factor * (short_side or min(mask.shape)) / min(mask.shape) for factor in scale)
    reach = math.ceil(largest)  # as far as interpolation looks
    if smallest >= 1 and min(height, width) > 2 * reach:
        # Where the mask is flat, the image has its colour.
        inside = ids[None, None, :height, :width].float()
        low, high = (sign * F.max_pool2d(sign * inside, 2 * reach + 1, 1)[0, 0] for sign in (-1, 1))
        colours = cropped[:, reach : height - reach, reach : width - reach].float()
        assert ((colours - low).abs()[:, low == high] <= 1).all()

    distorted = distort(cropped[None].as_subclass(torch.Tensor), strengths[None])[0]
    assert torch.equal(distorted[:, height:], cropped[:, height:])
    assert torch.equal(distorted[:, :, width:], cropped[:, :, width:])


@given(length=st.integers(1, 20), seed=SEEDS, world_size=st.integers(1, 5), start=st.integers(0, 50), data=st.data())
def test_ranks_share_the_samples_of_a_run(length, seed, world_size, start, data):
    """However many ranks there are and wherever a run goes on, sample n is the same, and an epoch draws all of them."""
    alone = TrainingSampler(length, seed)
    first = [key for _, key in zip(range(start + 10 * world_size), alone, strict=False)]
    rank = data.draw(st.integers(0, world_size - 1))
    shared = iter(TrainingSampler(length, seed, start, rank, world_size))
    assert [next(shared) for _ in range(10)] == first[start + rank :: world_size]
    for epoch in range(len(first) // length):
        assert sorted(index for index, _ in first[epoch * length :][:length]) == list(range(length))


# --- metrics ----------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 9), st.sampled_from([0, 1, 1.5, 3]), st.sampled_from([torch.int64, torch.uint8]))
def test_metrics_equal_plain_loops(data, num_classes, tolerance, dtype):
    target = data.draw(label_maps(num_classes))
    prediction = torch.where(torch.rand(target.shape) < 0.6, target, torch.randint(num_classes, target.shape))
    prediction[prediction == 255] = 0
    matrix, boundary = ConfusionMatrix(num_classes), BoundaryFScore(num_classes, tolerance)
    for image in range(len(target)):
        matrix.update(prediction[image].to(dtype), target[image].to(dtype))
        boundary.update(prediction[image : image + 1].to(dtype), target[image : image + 1].to(dtype))
    counts = loop_boundary_counts(prediction.numpy(), target.numpy(), num_classes, tolerance)
    assert boundary.counts.tolist() == counts.tolist()
    if (target == 255).all():
        assert math.isnan(matrix.scores().mean_iou)
        return
    accuracy, iou, _ = loop_region_scores(prediction.numpy(), target.numpy(), num_classes)
    scores = matrix.scores()
    assert scores.pixel_accuracy == pytest.approx(accuracy, abs=1e-9)
    assert scores.iou == pytest.approx(iou, abs=1e-9, nan_ok=True)
    assert scores.mean_iou == pytest.approx(np.nanmean(iou), abs=1e-9)
