"""What is recorded of the network: computed from planted numbers, and compared with the network's own."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers.figures import on_save
from tests.helpers.runs import small_model
from unept.inference import InferenceConfig, infer
from unept.model.attention import SparseSamplingAttention
from unept.model.network import UNEPT
from unept.model.transformer import reference_grid
from unept.pictures import drawing
from unept.pictures.recording import (
    NotInModel,
    Recording,
    feature_colors,
    joint_attention,
    on_image,
    points_of_query,
    principal_components,
    record,
    rollout,
    sampling_layer,
)

STRIDES = (8, 8, 8)  # of resnet10t at output stride 8


@pytest.fixture(scope="module")
def model() -> UNEPT:
    return small_model(num_points=3)


@pytest.fixture(scope="module")
def vit() -> UNEPT:
    return small_model(backbone="vit_tiny_patch16_224")


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def recorded(model: UNEPT, image: torch.Tensor, query=(0.0, 0.0), layer=None, **options) -> Recording:
    layer = layer or sampling_layer(model, "decoder", None)
    return record(model, image, InferenceConfig(**options), query, layer)


# Sampled points


@pytest.fixture
def planted(model):
    """A decoder layer that reads, whatever the query, planted points with planted weights: (M, L, N, 2), (M, L, N)."""
    attention = sampling_layer(model, "decoder", None)
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    offsets = torch.zeros(2, 3, 3, 2)
    offsets[1, 2, 0] = torch.tensor([2.0, -1.0])  # 2 to the right, 1 up, in pixels of level 3
    offsets[0, 0, 1] = torch.tensor([-500.0, 0.0])
    offsets[0, 0, 2] = torch.tensor([0.5, 0.25])
    weights = torch.rand(2, 3, 3) + 0.1
    weights /= weights.sum(dim=(1, 2), keepdim=True)
    with torch.no_grad():
        attention.sampling_weight.zero_()
        attention.sampling_bias.copy_(torch.cat([offsets.flatten(1), weights.log().flatten(1)], dim=1))
    yield offsets, weights
    attention.load_state_dict(before)


def test_planted_points_lie_at_known_pixels(model, planted):
    offsets, weights = planted
    points = recorded(model, noise(50, 90), query=(61, 20)).points
    # 8x8 cells: the one of (61, 20) has its centre at column 7, row 2.
    assert points.query == (7 * 8 + 3.5, 2 * 8 + 3.5)
    assert points.covered == (56, 96)
    assert points.shapes == [(7, 12)] * 3
    expected = torch.tensor(points.query) + offsets * torch.tensor(STRIDES)[:, None, None]
    torch.testing.assert_close(points.xy, expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(points.xy[1, 2, 0], torch.tensor([59.5 + 16, 19.5 - 8]))
    torch.testing.assert_close(points.weights, weights)
    outside = torch.zeros(2, 3, 3, dtype=torch.bool)
    outside[0, 0, 1] = True
    assert torch.equal(points.in_bounds, ~outside)


def test_planted_points_in_a_resized_view(model, planted):
    """At a short side of 100 the network sees the image (56x96 with its padding) twice as large."""
    points = recorded(model, noise(50, 90), query=(61, 20), short_side=100, scales=(0.5, 2.0), flip=True).points
    assert points.covered == (56, 96)
    assert points.shapes == [(14, 24)] * 3
    assert points.query == (15 * 4 + 1.5, 5 * 4 + 1.5)
    torch.testing.assert_close(points.xy[1, 2, 0], torch.tensor([61.5 + 8, 21.5 - 4]))


def coordinates(shapes) -> torch.Tensor:
    """(S, 2): (x, y) in [0, 1] of the pixels of maps."""
    return reference_grid(shapes, torch.device("cpu"))[0]


def test_points_are_where_the_operator_reads():
    """On maps that hold their own coordinates, an attention's output is the weighted mean of its points'."""
    shapes = [(40, 60), (20, 30)]
    attention = SparseSamplingAttention(d_model=8, num_heads=2, num_levels=2, num_points=3)
    with torch.no_grad():
        attention.sampling_weight.normal_(0, 0.3)
        for projection in (attention.value_projection, attention.output_projection):
            projection.weight.copy_(torch.eye(8))
    size = sum(h * w for h, w in shapes)
    query, value = torch.randn(1, size, 8), coordinates(shapes).repeat(1, 4)[None]
    reference = reference_grid(shapes, torch.device("cpu"))
    output = attention(query, value, shapes, reference)
    row, column = 22, 31
    position = (31 * 8, 22 * 8 + 7)  # in that cell of the first level, yet nearer to a centre of the second
    with torch.no_grad():
        points = points_of_query(attention, query, value, shapes, reference, covered=(320, 480), position=position)
    assert bool(points.in_bounds.all())
    mean = (points.weights[..., None] * (points.xy + 0.5) / torch.tensor([480, 320])).sum(dim=(1, 2))  # (M, 2)
    torch.testing.assert_close(mean, output[0, row * 60 + column].view(2, 4)[:, :2].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("shift", "inside"), [(-0.9, True), (-1.1, False), (5.9, True), (6.1, False)])
def test_points_that_touch_the_map_are_inside(shift, inside):
    """On 6 columns a bilinear read at -0.9 or 5.9 still has a share of the outer column."""
    attention = SparseSamplingAttention(d_model=8, num_heads=1, num_levels=1, num_points=1)
    with torch.no_grad():
        attention.sampling_bias.copy_(torch.tensor([[shift - 2, 0.0, 0.0]]))  # from column 2
        tokens, reference = torch.ones(1, 24, 8), reference_grid([(4, 6)], torch.device("cpu"))
        output = attention(tokens, tokens, [(4, 6)], reference)[0, 8]
        points = points_of_query(attention, tokens, tokens, [(4, 6)], reference, covered=(4, 6), position=(2, 1))
    assert points.query == (2, 1)
    assert points.in_bounds.item() is inside
    assert bool((output.abs().sum() > 1e-6) == inside)


@pytest.mark.parametrize(
    ("name", "layer", "path", "levels"),
    [
        ("decoder", None, "decoder.layers.1.cross_attention", 3),
        ("decoder-self", 1, "decoder.layers.0.self_attention", 1),
        ("encoder", 2, "encoder.layers.1.self_attention", 3),
    ],
)
def test_layers(model, name, layer, path, levels):
    chosen = sampling_layer(model, name, layer)
    assert chosen is model.get_submodule(path)
    points = recorded(model, noise(40, 40), query=(21, 37), layer=chosen).points
    assert points.weights.shape == (2, levels, 3)
    assert points.query == (2 * 8 + 3.5, 4 * 8 + 3.5)


def test_no_such_layer(model):
    with pytest.raises(ValueError, match="layer is 3, but this network's decoder has 2 layers"):
        sampling_layer(model, "decoder-self", 3)


def drawn_points(monkeypatch, tmp_path, points, image) -> list[list[tuple[list, list]]]:
    """Draw; gives by axis and scatter its positions and values."""
    drawn = []

    def look(figure):
        for axis in (axis for axis in figure.axes if axis.images):  # not the color bar
            drawn.append([(c.get_offsets().tolist(), c.get_array().tolist()) for c in axis.collections])

    on_save(monkeypatch, look)
    drawing.sampled_points(points, image, "caption", tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 5000
    return drawn


def test_what_is_drawn_of_the_points(model, planted, monkeypatch, tmp_path):
    _, weights = planted
    image = noise(50, 90)
    points = recorded(model, image, query=(61, 20)).points
    drawn = drawn_points(monkeypatch, tmp_path, points, image)
    (outside, outside_weight), (inside, inside_weight) = drawn[0]
    assert outside == [[-0.5, 19.5]]  # at the frame
    assert outside_weight == pytest.approx([weights[0, 0, 1].item()])
    assert len(inside) == len(inside_weight) == 5
    third, third_weight = drawn[2][1]
    assert third[3] == pytest.approx([75.5, 11.5])
    assert third_weight == pytest.approx(weights[:, 2].flatten().tolist())
    assert drawn[5][1][1] == [0, 0, 0, 1, 1, 1]  # the second row's colors: heads


# Features and attention


def test_principal_components():
    features = torch.randn(200, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) @ torch.randn(6, 6) + 100
    scores, components, share = principal_components(features)
    torch.testing.assert_close(components.T @ components, torch.eye(3), atol=1e-5, rtol=0)
    centred = (features - features.mean(0)).double()
    singular = torch.linalg.svdvals(centred)
    torch.testing.assert_close(share.double(), singular[:3].square() / singular.square().sum(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.double().norm(dim=0), singular[:3], atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(scores, (centred @ components.double()).float(), atol=1e-3, rtol=1e-3)
    assert bool((components.gather(0, components.abs().argmax(0, keepdim=True)) > 0).all())


def test_colors_show_what_varies():
    feature = torch.zeros(5, 4, 6)
    feature[2, :, 3:] = 7  # the right half differs in a single channel
    colors, share = feature_colors(feature)
    assert colors.shape == (3, 4, 6)
    assert share == pytest.approx(1)
    assert bool((colors[0, :, :3] == 0).all())
    assert bool((colors[0, :, 3:] == 1).all())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colors_of_few_channels_or_of_nothing(channels):
    colors, share = feature_colors(torch.ones(channels, 4, 6))
    assert colors.shape == (3, 4, 6)
    assert bool(colors.isfinite().all())
    assert share == 0


def test_rollout():
    blocks = [torch.rand(5, 5).softmax(dim=1) for _ in range(4)]
    joint = rollout(blocks)
    torch.testing.assert_close(joint.sum(dim=1), torch.ones(5))
    first = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    second = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    # The first gives [[.5, .5], [0, 1]]; the second half of itself, half of what it reads there.
    torch.testing.assert_close(rollout([first, second]), torch.tensor([[0.375, 0.625], [0.25, 0.75]]))


def test_attention_maps_are_those_of_the_network(vit):
    block = vit.backbone.features.model.blocks[0].attn
    inputs = []
    with block.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        recording = recorded(vit, noise(32, 48))
    with torch.inference_mode():
        q, k = block.qkv(inputs[0]).view(1, 7, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4)[:2]
        expected = (q @ k.transpose(-1, -2) * block.scale).softmax(dim=-1).mean(dim=1)
    assert len(recording.attention) == 12
    assert expected.std() > 1e-4  # not even
    torch.testing.assert_close(recording.attention[0], expected, atol=1e-6, rtol=1e-5)


def test_joint_attention_of_the_query(vit):
    recording = recorded(vit, noise(30, 48))
    joint = rollout([block[0] for block in recording.attention])
    overall, at_query = joint_attention(vit, recording, (20, 17))  # column 1, row 1 of 2x3 tokens
    assert overall.shape == at_query.shape == (2, 3)
    torch.testing.assert_close(overall.flatten(), joint[0, 1:])
    torch.testing.assert_close(at_query.flatten(), joint[1 + 4, 1:])


def test_joint_attention_without_a_class_token(vit):
    recording = recorded(vit, noise(32, 48))
    joint = rollout([block[0] for block in recording.attention])
    other = copy.deepcopy(vit)
    other.backbone.features.model.cls_token = None  # the prefix is then a register
    overall, _ = joint_attention(other, recording, (0, 0))
    torch.testing.assert_close(overall.flatten(), joint[1:, 1:].mean(0))


@pytest.mark.parametrize(("shape", "message"), [((4, 7, 7), "attends within windows"), (None, "has no attention")])
def test_other_backbones_have_no_joint_attention(vit, shape, message):
    recording = recorded(vit, noise(32, 48))._replace(attention=[] if shape is None else [torch.zeros(shape)])
    with pytest.raises(NotInModel, match=message):
        joint_attention(vit, recording, (0, 0))


def test_recording_leaves_the_network_as_it_was(vit):
    image = noise(32, 48)
    before = vit.train()(image[None]).logits
    blocks = vit.backbone.features.model.blocks
    for block in blocks:
        block.attn.fused_attn = True
    recorded(vit, image)
    assert vit.training
    assert all(block.attn.fused_attn for block in blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())
    torch.testing.assert_close(vit(image[None]).logits, before)
    vit.eval()


def test_other_threads_may_use_the_network_meanwhile(vit):
    """They are not recorded, nor does a recording break them; two recordings do not mix."""
    vit.eval()
    image, other, config = noise(48, 64), noise(32, 32), InferenceConfig(amp="off")
    expected, logits = recorded(vit, image, (40.0, 30.0)), infer(vit, other, config).scores
    blocks, done = vit.backbone.features.model.blocks, threading.Event()
    fused = [block.attn.fused_attn for block in blocks]

    def use() -> int:
        count = 0
        while not (done.is_set() and count):
            torch.testing.assert_close(infer(vit, other, config).scores, logits)
            recorded(vit, other)
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(use)
        try:
            for _ in range(4):
                found = recorded(vit, image, (40.0, 30.0))
                assert found.points.query == expected.points.query
                assert found.points.shapes == expected.points.shapes
                assert [m.shape for m in found.attention] == [m.shape for m in expected.attention]
        finally:
            done.set()
        assert used.result()
    assert [block.attn.fused_attn for block in blocks] == fused


def test_one_recording_at_a_time(vit, monkeypatch):
    """Each changes how the backbone's attention computes, and back."""
    inside = []

    def slow(*args):
        inside.append(None)
        time.sleep(0.02)
        assert len(inside) == 1
        found = infer(*args)
        inside.pop()
        return found

    monkeypatch.setattr("unept.pictures.recording.infer", slow)
    vit.eval()
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: recorded(vit, noise(32, 32)), range(6)):
            assert len(found.attention) == len(vit.backbone.features.model.blocks)


def test_a_map_lies_on_the_image_where_the_network_saw_it():
    cell = torch.zeros(1, 2, 3)
    cell[0, 1, 2] = 1
    shown = on_image(cell, covered=(16, 24), size=(11, 20), mode="nearest")[0]
    expected = torch.zeros(11, 20)
    expected[8:, 16:] = 1
    assert torch.equal(shown, expected)
