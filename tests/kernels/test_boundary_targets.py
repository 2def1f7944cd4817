import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from tests.helpers import reference
from tests.helpers.marks import slow
from unept.data.shapes import Shapes
from unept.kernels import boundary_targets, upsample_cross_entropy, use_backend

# (dx, dy) of the 8 directions, as the refinement reads them.
DIRECTIONS = [(-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1)]


def make_labels(device, shape=(2, 11, 13), classes=3, kind="blobs", dtype=torch.int64):
    if kind == "noise":
        labels = torch.randint(0, classes, shape)
        labels[torch.rand(shape) < 0.3] = 255
    else:
        coarse = torch.randn(shape[0], classes, 1 + shape[1] // 4, 1 + shape[2] // 4)
        labels = torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear").argmax(1)
        labels[:, 1:3, shape[2] // 2 :] = 255
    return labels.to(device, dtype)


def assert_matches_reference(labels, radius, num_directions=8, function=boundary_targets):
    """Compare with plain loops; returns how many directions were compared, those that rounding does not decide."""
    distance, direction = function(labels, radius=radius, num_directions=num_directions)
    assert distance.dtype == torch.float32
    assert direction.dtype == torch.int64
    compared = 0
    for image, found, bins in zip(labels.cpu(), distance.cpu(), direction.cpu(), strict=True):
        squared = reference.squared_distance(image, radius)
        assert torch.equal(found, squared.double().sqrt().float())

        nowhere = (squared > radius**2) | (image == 255)
        assert torch.equal(bins == 255, nowhere)
        # Position in bins: 0.0 is the lower edge of bin 0, which is centred on -180 degrees.
        angle = reference.direction_angle(image, squared.double().sqrt())
        position = (angle + math.pi) / (2 * math.pi) * num_directions + 0.5
        margin = (position - position.round()).abs() * (2 * math.pi / num_directions)
        clear = ~nowhere & (margin > 1e-4)  # not NaN: no gradient, no direction
        assert torch.equal(bins[clear], position[clear].floor().long() % num_directions)
        compared += int(clear.sum())
    return compared


@pytest.mark.parametrize("kind", [slow("blobs"), "noise"])
@pytest.mark.parametrize("radius", [slow(1), 2.5])
def test_matches_loops(backend, kind, radius):
    assert assert_matches_reference(make_labels(backend[1], kind=kind), radius) > 50


@pytest.mark.slow_interpreted
def test_default_radius(backend):
    assert assert_matches_reference(make_labels(backend[1], (1, 19, 23)), 5) > 200


@pytest.mark.parametrize("num_directions", [1, 3, slow(2), slow(4), slow(5), slow(16), 255])
def test_any_number_of_directions(backend, num_directions):
    assert_matches_reference(make_labels(backend[1], (1, 9, 11)), 1, num_directions)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 17), slow((3, 13, 1)), (1, 2, 2), (2, 7, 37)], ids=str)
def test_odd_sizes_into_poisoned_buffers(backend, deterministic, shape):
    assert_matches_reference(make_labels(backend[1], shape, kind="noise"), 1)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, slow(torch.int16), slow(torch.int32), slow(torch.uint16)],
    ids=str,
)
def test_any_integer_dtype_and_stride(backend, dtype):
    labels = make_labels(backend[1], (1, 7, 13))
    want = boundary_targets(labels, radius=1)
    strided = labels.to(dtype).repeat_interleave(2, -1)[..., ::2]
    for other in (labels.to(dtype), strided, labels.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)):
        for actual, expected in zip(boundary_targets(other, radius=1), want, strict=True):
            assert torch.equal(actual, expected)


def test_ignore_index_of_another_sign(backend):
    labels = make_labels(backend[1], (1, 7, 13))
    want = boundary_targets(labels, radius=1)
    labels[labels == 255] = -100
    for actual, expected in zip(boundary_targets(labels, radius=1, ignore_index=-100), want, strict=True):
        assert torch.equal(actual, expected)
    # -100 is 156 as uint8: a class may have that id.
    pair = torch.tensor([[[156, 0, 0]]], dtype=torch.uint8, device=backend[1])
    assert boundary_targets(pair, radius=1, ignore_index=-100)[0][0, 0].tolist()[:2] == [1, 1]


def scipy_distance(image):
    """Distance of (H, W) labels to the nearest other class, unlimited: one distance transform a class."""
    image = image.cpu().numpy()
    distance = np.full(image.shape, np.inf)
    for label in np.unique(image[image != 255]):
        other = (image != label) & (image != 255)
        distance = np.where(image == label, distance_transform_edt(~other) if other.any() else np.inf, distance)
    return distance


@pytest.mark.parametrize("radius", [0.1, 5, *map(slow, [1, 3, 8, 9, 16, 32, 57.5, 100])])
def test_distance_equals_scipy(backend, radius):
    labels = make_labels(backend[1], (1, 16, 128))
    labels[..., 16:] = 1  # far from most edges
    distance, direction = boundary_targets(labels, radius=radius)
    want = np.stack([scipy_distance(image) for image in labels])
    saturated = math.sqrt(math.floor((radius + 2 * math.sqrt(2)) ** 2) + 1)
    assert (want > saturated).any()
    np.testing.assert_allclose(distance.cpu().numpy(), np.minimum(want, saturated), rtol=1e-6)
    np.testing.assert_array_equal((direction == 255).cpu().numpy(), want > radius)


def test_radius_is_compared_as_a_distance(backend):
    """The square of sqrt(13) is below 13 in floating point, yet pixels 2 and 3 off are within sqrt(13)."""
    labels = torch.zeros(1, 9, 9, dtype=torch.int64, device=backend[1])
    labels[0, 4, 4] = 1
    distance, direction = boundary_targets(labels, radius=math.sqrt(13))
    assert distance[0, 2, 1].item() == pytest.approx(math.sqrt(13))
    assert direction[0, 2, 1] != 255
    assert direction[0, 0, 4] == 255  # 4 off


MAPS = ["shapes", "noise", "lines", "every pixel a class", "one row", "one column"]
QUICK = [("noise", 5), ("lines", 2), ("every pixel a class", 2), ("one row", 12)]


@pytest.mark.parametrize(
    ("labels", "radius"),
    [
        *QUICK,
        *[
            pytest.param(labels, radius, marks=pytest.mark.slow)
            for labels in MAPS
            for radius in (2, 5, 12)
            if (labels, radius) not in QUICK
        ],
    ],
)
def test_backends_agree_to_the_bit(labels, radius):
    """Ties between two bins too, which rounding decides: these maps have many."""
    if labels == "shapes":
        maps = torch.stack([Shapes(size=48)[i][1] for i in range(2)])
    elif labels == "lines":
        maps = torch.zeros(1, 20, 60, dtype=torch.uint8)
        maps[:, ::7, :] = 1
        maps[:, :, ::9] = 2
    elif labels == "every pixel a class":
        maps = torch.arange(9 * 131).view(1, 9, 131)
    else:
        shape = {"noise": (2, 11, 41), "one row": (1, 1, 150), "one column": (1, 50, 1)}[labels]
        maps = make_labels("cpu", shape, classes=4, kind="noise")
    with use_backend("torch"):
        want = boundary_targets(maps, radius=radius)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with use_backend("triton"):
        found = boundary_targets(maps.to(device), radius=radius)
    assert (want[1] != 255).any()
    for actual, expected in zip(found, want, strict=True):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("radius", [slow(0.1), 1, slow(9)])
def test_images_do_not_see_each_other(backend, radius):
    labels = torch.arange(12, device=backend[1]).view(3, 2, 2).repeat_interleave(3, 1).repeat_interleave(3, 2)
    together = boundary_targets(labels, radius=radius)
    for i in range(3):
        for actual, alone in zip(together, boundary_targets(labels[i : i + 1], radius=radius), strict=True):
            assert torch.equal(actual[i], alone[0])


@pytest.mark.parametrize("shift", [slow(-3), slow(250), slow(300), 40_000])
def test_ids_beyond_a_byte(backend, shift):
    """The torch backend keeps labels in the smallest integers that hold them."""
    labels = make_labels(backend[1], (1, 7, 13), kind="noise")
    want = boundary_targets(labels, radius=1)
    shifted = boundary_targets(labels + shift, radius=1, ignore_index=255 + shift)
    for actual, expected in zip(shifted, want, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("k", [1, 6, *map(slow, [0, 2, 3, 4, 5, 7])])
def test_direction_points_into_the_segment(backend, k):
    """On a straight edge of each orientation, as the refinement will follow it."""
    dx, dy = DIRECTIONS[k]
    y, x = torch.meshgrid(torch.arange(-6, 7), torch.arange(-6, 7), indexing="ij")
    inside = (dx * x + dy * y >= 0).long()[None].to(backend[1])
    _, direction = boundary_targets(inside, radius=2)
    middle = direction[0, 6, 6].item()
    assert middle == k
    across = direction[0, 6 - dy, 6 - dx].item()
    assert across == (k + 4) % 8


@pytest.mark.parametrize("fill", [slow("one class"), "one class and void", slow("void")])
def test_void_and_the_border_make_no_boundary(backend, fill):
    labels = torch.full((1, 9, 9), 255 if fill == "void" else 4, device=backend[1])
    if fill == "one class and void":
        labels[:, 3:6, 3:6] = 255
    distance, direction = boundary_targets(labels, radius=1)
    assert (distance == math.sqrt(15)).all()
    assert (direction == 255).all()


def test_void_hides_no_boundary(backend):
    """Void of 3 pixels between two classes: each sees the other at 4 pixels, and the void neither."""
    labels = torch.tensor([[[0, 0, 255, 255, 255, 1, 1]]], device=backend[1])
    for shown in (labels, labels.transpose(1, 2)):
        distance, direction = boundary_targets(shown, radius=4)
        far = math.sqrt(math.floor((4 + 2 * math.sqrt(2)) ** 2) + 1)
        np.testing.assert_allclose(distance.flatten().tolist(), [5, 4, far, far, far, 4, 5], rtol=1e-6)
        assert (direction != 255).flatten().tolist() == [False, True, False, False, False, True, False]


def test_a_vanishing_gradient_has_the_angle_zero(backend):
    labels = torch.zeros(1, 9, 9, dtype=torch.int64, device=backend[1])
    labels[0, 4, :] = 1  # a line: both sides are equally near
    labels[0, :, 4] = 1
    _, direction = boundary_targets(labels, radius=2)
    assert direction[0, 4, 4] == 4


def test_direction_is_a_target_of_the_cross_entropy(backend):
    _, direction = boundary_targets(make_labels(backend[1], (2, 4, 5), kind="noise"), radius=1)
    loss = upsample_cross_entropy(torch.zeros(2, 8, 3, 3, device=backend[1]), direction)
    assert loss.item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("layout", ["odd", "gap", "transposed", "offset"])
@pytest.mark.parametrize(("dtype", "ignored"), [(torch.uint8, 255), (torch.uint8, -100), (torch.int64, -1)], ids=str)
def test_rows_of_any_layout_and_an_id_that_the_dtype_cannot_hold(backend, layout, dtype, ignored):
    labels = make_labels(backend[1], (2, 18, 48)).to(dtype)
    views = {
        "odd": labels[:, :, :17],
        "gap": labels[:, :, ::3],
        "transposed": labels.mT[:, :16],
        "offset": labels[:, 1:17, 5:21],  # rows of 16 pixels that begin at any address
    }
    found = boundary_targets(views[layout], ignore_index=ignored)
    with use_backend("torch"):
        wanted = boundary_targets(views[layout].cpu().contiguous(), ignore_index=ignored)
    for tensor, want in zip(found, wanted, strict=True):
        assert tensor.is_contiguous()
        assert torch.equal(tensor.cpu(), want)


def test_no_images(backend):
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        distance, direction = boundary_targets(torch.zeros(shape, dtype=torch.long, device=backend[1]))
        assert distance.shape == direction.shape == shape


@pytest.mark.slow_interpreted
def test_custom_op_is_well_formed_and_compiles(backend):
    labels = make_labels(backend[1], (1, 7, 9))
    torch.library.opcheck(torch.ops.unept.boundary_targets.default, (labels, 1.0, 8, 255))
    compiled = torch.compile(boundary_targets, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(labels, radius=1), boundary_targets(labels, radius=1), strict=True):
        assert torch.equal(traced, eager)


def test_ids_that_do_not_fit_are_noticed():
    """As int32, 2**32 would be the same class as 0."""
    with pytest.raises(ValueError, match="ids from 0 to 4294967296; they must fit int32"):
        boundary_targets(torch.tensor([[[0, 2**32]]]))


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (torch.zeros(4, 5).long(), {}, ValueError, r"labels has shape \(4, 5\); it must be \(B, H, W\): add a batch"),
        (torch.zeros(1, 4, 5), {}, TypeError, r"labels has dtype torch.float32.*labels.long\(\)"),
        (torch.zeros(1, 4, 5).long(), {"radius": 0}, ValueError, "radius is 0; it must be above 0"),
        (torch.zeros(1, 4, 5).long(), {"radius": math.nan}, ValueError, "radius is nan"),
        (torch.zeros(1, 4, 5).long(), {"radius": 100.5}, ValueError, "radius is 100.5; .* at most 100 pixels"),
        (torch.zeros(1, 1, 1).long().expand(1, 2**15, 2**16), {}, ValueError, "2147483648 pixels in labels"),
        (torch.zeros(1, 4, 5).long(), {"num_directions": 0}, ValueError, "num_directions is 0; it must be 1 to 255"),
        (torch.zeros(1, 4, 5).long(), {"num_directions": 256}, ValueError, "num_directions is 256"),
    ],
)
def test_wrong_arguments(labels, options, error, message):
    with pytest.raises(error, match=message):
        boundary_targets(labels, **options)
