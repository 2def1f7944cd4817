import math

import numpy as np
import pytest
import reference
import torch
from scipy.ndimage import distance_transform_edt
from unept.kernels import boundary_targets, upsample_cross_entropy

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


def assert_matches_reference(labels, radius, num_directions=8):
    distance, direction = boundary_targets(labels, radius=radius, num_directions=num_directions)
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


@pytest.mark.parametrize("kind", ["blobs", "noise"])
@pytest.mark.parametrize("radius", [1, 2.5])
def test_matches_loops(backend, kind, radius):
    assert assert_matches_reference(make_labels(backend[1], kind=kind), radius) > 50


def test_default_radius(backend):
    assert assert_matches_reference(make_labels(backend[1], (1, 19, 23)), 5) > 200


@pytest.mark.parametrize("num_directions", [1, 2, 3, 4, 5, 16])
def test_any_number_of_directions(backend, num_directions):
    assert_matches_reference(make_labels(backend[1], (1, 9, 11)), 1, num_directions)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 17), (3, 13, 1), (1, 2, 2), (2, 7, 37)], ids=str)
def test_odd_sizes_into_poisoned_buffers(backend, deterministic, shape):
    assert_matches_reference(make_labels(backend[1], shape, kind="noise"), 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_any_integer_dtype_and_stride(backend, dtype):
    labels = make_labels(backend[1])
    want = boundary_targets(labels, radius=1)
    strided = labels.to(dtype).repeat_interleave(2, -1)[..., ::2]
    for other in (labels.to(dtype), strided, labels.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)):
        for actual, expected in zip(boundary_targets(other, radius=1), want, strict=True):
            assert torch.equal(actual, expected)


def test_ignore_index_of_another_sign(backend):
    labels = make_labels(backend[1])
    want = boundary_targets(labels, radius=1)
    labels[labels == 255] = -100
    for actual, expected in zip(boundary_targets(labels, radius=1, ignore_index=-100), want, strict=True):
        assert torch.equal(actual, expected)
    # -100 is 156 as uint8: a class may have that id.
    pair = torch.tensor([[[156, 0, 0]]], dtype=torch.uint8, device=backend[1])
    assert boundary_targets(pair, radius=1, ignore_index=-100)[0][0, 0].tolist()[:2] == [1, 1]


def test_distance_equals_scipy(backend):
    labels = make_labels("cpu", (1, 40, 50))
    image = labels[0].numpy()
    want = np.full(image.shape, np.inf)
    for label in np.unique(image[image != 255]):
        other = (image != label) & (image != 255)
        want = np.where(image == label, distance_transform_edt(~other) if other.any() else np.inf, want)
    distance, _ = boundary_targets(labels.to(backend[1]), radius=1)
    np.testing.assert_allclose(distance[0].cpu().numpy(), np.minimum(want, math.sqrt(15)), rtol=1e-6)


@pytest.mark.parametrize("k", range(8))
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


def test_void_and_the_border_make_no_boundary(backend):
    labels = torch.full((1, 9, 9), 4, device=backend[1])
    labels[:, 3:6, 3:6] = 255
    distance, direction = boundary_targets(labels, radius=1)
    assert (distance == math.sqrt(15)).all()
    assert (direction == 255).all()


def test_a_vanishing_gradient_has_the_angle_zero(backend):
    labels = torch.zeros(1, 9, 9, dtype=torch.int64, device=backend[1])
    labels[0, 4, :] = 1  # a line: both sides are equally near
    labels[0, :, 4] = 1
    _, direction = boundary_targets(labels, radius=2)
    assert direction[0, 4, 4] == 4


def test_direction_is_a_target_of_the_cross_entropy(backend):
    _, direction = boundary_targets(make_labels(backend[1]), radius=1)
    loss = upsample_cross_entropy(torch.zeros(2, 8, 3, 3, device=backend[1]), direction)
    assert loss.item() == pytest.approx(math.log(8))


def test_no_images(backend):
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        distance, direction = boundary_targets(torch.zeros(shape, dtype=torch.long, device=backend[1]))
        assert distance.shape == direction.shape == shape


def test_custom_op_is_well_formed_and_compiles(backend):
    labels = make_labels(backend[1], (1, 7, 9))
    torch.library.opcheck(torch.ops.unept.boundary_targets.default, (labels, 1.0, 8, 255))
    compiled = torch.compile(boundary_targets, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(labels, radius=1), boundary_targets(labels, radius=1), strict=True):
        assert torch.equal(traced, eager)


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
