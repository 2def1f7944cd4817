"""The paper's pictures: what they show is computed from planted numbers, and `python -m unept.visualize` draws it."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from unept import visualize
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.inference import InferenceConfig
from unept.model.attention import SparseSamplingAttention
from unept.model.boundary import Refinement
from unept.model.network import UNEPT
from unept.model.output import UNEPTOutput
from unept.model.transformer import reference_grid
from unept.pictures import drawing, recording

SMALL = {"pretrained_backbone": False, "d_model": 32, "num_heads": 2, "num_points": 3, "ffn_dim": 32, "dropout": 0.0}
STRIDES = (8, 8, 8)  # of resnet10t at output stride 8
CLASSES, PALETTE = ["sky", "sea", "sand"], [[90, 160, 230], [10, 40, 120], [220, 200, 120]]


def small_model(backbone: str = "resnet10t", **options) -> UNEPT:
    return UNEPT(3, classes=CLASSES, palette=PALETTE, **ModelConfig(backbone=backbone, **SMALL, **options).options())


@pytest.fixture(scope="module")
def model() -> UNEPT:
    return small_model().eval()


@pytest.fixture(scope="module")
def vit() -> UNEPT:
    return small_model("vit_tiny_patch16_224").eval()


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def recorded(model: UNEPT, image: torch.Tensor, query=(0.0, 0.0), layer=None, **options) -> recording.Recording:
    layer = layer or recording.sampling_layer(model, "decoder", None)
    return recording.record(model, image, InferenceConfig(**options), query, layer)


# Sampled points


@pytest.fixture
def planted(model):
    """A decoder layer that reads, whatever the query, planted points with planted weights: (M, L, N, 2), (M, L, N)."""
    attention = recording.sampling_layer(model, "decoder", None)
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
    assert torch.equal(points.inside, ~outside)


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
        points = recording.points_of_query(
            attention, query, value, shapes, reference, covered=(320, 480), position=position
        )
    assert bool(points.inside.all())
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
        points = recording.points_of_query(
            attention, tokens, tokens, [(4, 6)], reference, covered=(4, 6), position=(2, 1)
        )
    assert points.query == (2, 1)
    assert points.inside.item() is inside
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
    chosen = recording.sampling_layer(model, name, layer)
    assert chosen is model.get_submodule(path)
    points = recorded(model, noise(40, 40), query=(21, 37), layer=chosen).points
    assert points.weights.shape == (2, levels, 3)
    assert points.query == (2 * 8 + 3.5, 4 * 8 + 3.5)


def test_no_such_layer(model):
    with pytest.raises(ValueError, match="layer is 3, but this network's decoder has 2 layers"):
        recording.sampling_layer(model, "decoder-self", 3)


def drawn_points(monkeypatch, tmp_path, points, image) -> list[list[tuple[list, list]]]:
    """Draw; gives by axis and scatter its positions and values."""
    drawn = []

    class Recorder(drawing.Figure):
        def savefig(self, path, **options):
            for axis in (axis for axis in self.axes if axis.images):  # not the colour bar
                drawn.append([(c.get_offsets().tolist(), c.get_array().tolist()) for c in axis.collections])
            super().savefig(path, **options)

    monkeypatch.setattr(drawing, "Figure", Recorder)
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
    assert drawn[5][1][1] == [0, 0, 0, 1, 1, 1]  # the second row's colours: heads


# Features and attention


def test_principal_components():
    features = torch.randn(200, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) @ torch.randn(6, 6) + 100
    scores, components, share = recording.principal_components(features)
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
    colors, share = recording.feature_colors(feature)
    assert colors.shape == (3, 4, 6)
    assert share == pytest.approx(1)
    assert bool((colors[0, :, :3] == 0).all())
    assert bool((colors[0, :, 3:] == 1).all())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colors_of_few_channels_or_of_nothing(channels):
    colors, share = recording.feature_colors(torch.ones(channels, 4, 6))
    assert colors.shape == (3, 4, 6)
    assert bool(colors.isfinite().all())
    assert share == 0


def test_rollout():
    blocks = [torch.rand(5, 5).softmax(dim=1) for _ in range(4)]
    joint = recording.rollout(blocks)
    torch.testing.assert_close(joint.sum(dim=1), torch.ones(5))
    first = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    second = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    # The first gives [[.5, .5], [0, 1]]; the second half of itself, half of what it reads there.
    torch.testing.assert_close(recording.rollout([first, second]), torch.tensor([[0.375, 0.625], [0.25, 0.75]]))


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
    joint = recording.rollout([block[0] for block in recording.attention])
    overall, at_query = recording.joint_attention(vit, recording, (20, 17))  # column 1, row 1 of 2x3 tokens
    assert overall.shape == at_query.shape == (2, 3)
    torch.testing.assert_close(overall.flatten(), joint[0, 1:])
    torch.testing.assert_close(at_query.flatten(), joint[1 + 4, 1:])


def test_joint_attention_without_a_class_token(vit):
    recording = recorded(vit, noise(32, 48))
    joint = recording.rollout([block[0] for block in recording.attention])
    other = copy.deepcopy(vit)
    other.backbone.features.model.cls_token = None  # the prefix is then a register
    overall, _ = recording.joint_attention(other, recording, (0, 0))
    torch.testing.assert_close(overall.flatten(), joint[1:, 1:].mean(0))


@pytest.mark.parametrize(("shape", "message"), [((4, 7, 7), "attends within windows"), (None, "has no attention")])
def test_other_backbones_have_no_joint_attention(vit, shape, message):
    recording = recorded(vit, noise(32, 48))._replace(attention=[] if shape is None else [torch.zeros(shape)])
    with pytest.raises(recording.NotInModel, match=message):
        recording.joint_attention(vit, recording, (0, 0))


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


def test_a_map_lies_on_the_image_where_the_network_saw_it():
    cell = torch.zeros(1, 2, 3)
    cell[0, 1, 2] = 1
    shown = recording.on_image(cell, covered=(16, 24), size=(11, 20), mode="nearest")[0]
    expected = torch.zeros(11, 20)
    expected[8:, 16:] = 1
    assert torch.equal(shown, expected)


# Refinement


def test_the_window_of_most_change():
    first = torch.zeros(40, 80, dtype=torch.int64)
    second = first.clone()
    second[5, 7] = 1
    second[30:34, 60:65] = 2
    top, left, height, width = visualize.most_different(first, second)
    assert (height, width) == (10, 20)
    assert top <= 30
    assert top + height >= 34
    assert left <= 60
    assert left + width >= 65


@pytest.mark.parametrize(("size", "window"), [((40, 80), (15, 30, 10, 20)), ((2, 3), (0, 1, 1, 1))])
def test_the_window_where_nothing_changes(size, window):
    ids = torch.zeros(size, dtype=torch.int64)
    assert visualize.most_different(ids, ids) == window


def edge_at_20() -> UNEPTOutput:
    """Classes change at x = 20 of 16x32 pixels; all is boundary, refined 1 pixel from the left for each `scale`."""
    logits = torch.zeros(1, 3, 2, 4)
    logits[:, 0] = torch.tensor([1.0, 1.0, 0.0, -1.0])
    logits[:, 1] = -logits[:, 0]
    logits[:, 2] = -9
    direction = torch.zeros(1, 8, 2, 4)
    direction[:, 0] = 1
    return UNEPTOutput(logits, torch.full((1, 1, 2, 4), 5.0), direction)


@pytest.mark.parametrize("scale", [1, 3])
def test_refinement_picture(model, tmp_path, monkeypatch, scale):
    drawn = []
    panel = drawing.refinement_panel
    monkeypatch.setattr(drawing, "refinement_panel", lambda *args: (drawn.extend(args[:2]), panel(*args)))
    image = noise(16, 32)
    share = visualize.draw_refinement(model, image, edge_at_20(), Refinement(scale=scale), "a", tmp_path / "a.png")
    assert share == pytest.approx(scale / 32)
    sample, (_, left, _, width) = drawn
    changed = (sample.prediction != sample.refined).any(dim=0).nonzero().flatten()
    assert changed.tolist() == [20 + i for i in range(scale)]
    assert left <= 20
    assert 20 + scale <= left + width
    torch.testing.assert_close(sample.boundary, torch.full((16, 32), 5.0).sigmoid())
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_window_is_framed_and_enlarged(tmp_path, monkeypatch):
    rows = []

    class Recorder(drawing.Figure):
        def savefig(self, path, **options):
            for axis in self.axes:
                frames = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axis.patches]
                rows.append((axis.images[0].get_array(), frames))
            super().savefig(path, **options)

    monkeypatch.setattr(drawing, "Figure", Recorder)
    ids = torch.randint(0, 3, (20, 30))
    sample = drawing.Sample("a", noise(20, 30), None, ids, ids, torch.rand(20, 30))
    drawing.refinement_panel(sample, (3, 12, 5, 7), CLASSES, PALETTE, tmp_path / "a.png")
    for (whole, frames), (window, none) in zip(rows[:4], rows[4:], strict=True):
        assert set(frames) == {(11.5, 2.5, 7, 5)}
        assert none == []
        assert np.array_equal(window, whole[3:8, 12:19])


# Two runs side by side


def save_evaluation(folder, iou, classes=None, split="val") -> None:
    folder.mkdir(parents=True)
    known = [x for x in iou if x is not None]
    record = {"classes": classes or [f"class {i}" for i in range(len(iou))], "iou": iou, "split": split}
    (folder / "evaluation.json").write_text(json.dumps(record | {"mIoU": sum(known) / len(known)}))


def test_comparison_of_classes(tmp_path):
    save_evaluation(tmp_path / "a", [0.5, None, 0.75, 0.25, 0.5])
    save_evaluation(tmp_path / "b", [0.5, 0.5, 0.25, 0.5, None])
    rows, means = visualize.compare_classes(tmp_path / "a", tmp_path / "b")
    assert rows == [("class 2", 0.75, 0.25), ("class 0", 0.5, 0.5), ("class 3", 0.25, 0.5)]
    assert means == (0.5, 0.4375)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["b", "a"]}, "differ in name or order"),
        ({"split": "test"}, "was evaluated on val and .*b on test"),
        ({"iou": [None, 0.5]}, "no class with an IoU in both"),
    ],
    ids=["classes", "split", "nothing in common"],
)
def test_runs_that_can_not_be_compared(tmp_path, change, message):
    save_evaluation(tmp_path / "a", [0.5, None], ["a", "b"])
    save_evaluation(tmp_path / "b", **{"iou": [0.5, 0.5], "classes": ["a", "b"]} | change)
    with pytest.raises(ValueError, match=message):
        visualize.compare_classes(tmp_path / "a", tmp_path / "b")


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model):
    """Run folders: a convolutional backbone, a ViT, and one without a spatial branch."""
    folder = tmp_path_factory.mktemp("runs")
    vit = small_model("vit_tiny_patch16_224")
    learned = small_model(context_queries="learned")
    for name, network in (("conv", model), ("vit", vit), ("learned", learned)):
        (folder / name).mkdir()
        config = TrainConfig(data=DataConfig(dataset="shapes"), eval_every=50)
        (folder / name / "config.json").write_text(config.to_json())
        network.save_pretrained(folder / name / "model")
    return folder


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in a folder with one image, a.png of 70 x 41 pixels; gives status, output and errors."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (41, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visualize", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            visualize.main()
        return end.value.code, *capsys.readouterr()

    return call


def written(folder) -> set[str]:
    return {path.name for path in folder.glob("visualizations/*")}


def test_all_pictures_of_a_vit(runs, command, tmp_path):
    status, out, _ = command("a.png", "--run", runs / "vit", "--query", 50, 9)
    assert status == 0
    assert written(tmp_path) == {f"a_{kind}.png" for kind in ("refinement", "pyramid", "attention", "points")}
    for name in written(tmp_path):
        assert f"visualizations/{name}" in out
        with Image.open(tmp_path / "visualizations" / name) as picture:
            assert picture.width > 800


def test_what_a_network_does_not_have_is_said_once(runs, command, tmp_path):
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    status, out, _ = command("a.png", "b.png", "--run", runs / "learned", "--pictures", "attention", "refinement")
    assert status == 0
    assert written(tmp_path) == set()
    assert out.splitlines()[1:] == [
        "no attention picture: the backbone has no attention; it takes a plain ViT, whose blocks see all tokens",
        "no refinement picture: this network has no spatial branch, so it does not refine",
    ]


@pytest.mark.parametrize(("run", "picture"), [("conv", "attention"), ("learned", "refinement")])
def test_only_what_the_network_does_not_have(runs, command, run, picture):
    status, _, err = command("a.png", "--run", runs / run, "--pictures", picture)
    assert status == 2
    assert err.startswith(f"error: no {picture} picture")
    assert err.count("\n") == 1


def test_a_bad_image_does_not_stop_the_others(runs, command, tmp_path):
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    status, _, err = command("bad.png", "a.png", "--run", runs / "conv", "--pictures", "pyramid")
    assert status == 1
    assert err.startswith("error: bad.png")
    assert err.endswith("error: 1 of 2 images could not be drawn\n")
    assert written(tmp_path) == {"a_pyramid.png"}


@pytest.mark.parametrize("query", [(70, 0), (-1, 0), (0, 41)], ids=str)
def test_a_query_outside_of_the_image(runs, command, tmp_path, query):
    status, _, err = command("a.png", "--run", runs / "conv", "--query", *query)
    assert status == 1
    assert "has 70 x 41 pixels: give --query X Y from 0 0 to 69 40" in err
    assert written(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["a.png", "--layer", "0"], "layer is 0"),
        (["a.png", "--no-refine"], "--no-refine leaves nothing to compare"),
        (["a.png", "--pictures"], "pictures is empty"),
        (["a.png", "--run", "nowhere"], "nowhere does not exist"),
        (["missing.png"], "there is no image or folder missing.png"),
        (["--compare", "x", "y"], "there is no x/evaluation.json: measure the run first"),
    ],
    ids=str,
)
def test_bad_options(command, arguments, message):
    status, out, err = command(*arguments)
    assert status == 2
    assert message in " ".join((out + err).split())


def test_comparison_shows_at_most_20_classes(command, tmp_path, monkeypatch):
    bars = []

    class Recorder(drawing.Figure):
        def savefig(self, path):
            (axis,) = self.axes
            names = [label.get_text() for label in axis.get_yticklabels()]
            first, second = axis.containers
            bars.extend(zip(names, [bar.get_width() for bar in first], strict=True))
            assert [bar.get_width() for bar in second] == [0.5] * len(names)
            super().savefig(path)

    monkeypatch.setattr(drawing, "Figure", Recorder)
    save_evaluation(tmp_path / "a", [i / 30 for i in range(25)])
    save_evaluation(tmp_path / "b", [0.5] * 25)
    status, out, _ = command("--compare", "a", "b")
    assert status == 0
    assert out == "visualizations/class_iou_comparison.png  the first 20 of 25 classes\n"
    assert bars == [(f"class {i}", pytest.approx(i / 30)) for i in range(24, 4, -1)]
    assert written(tmp_path) == {"class_iou_comparison.png"}


def test_a_damaged_evaluation(command, tmp_path):
    for name in ("a", "b"):
        save_evaluation(tmp_path / name, [0.5])
    (tmp_path / "b" / "evaluation.json").write_text('{"classes": ["class 0"], "iou"')
    status, _, err = command("--compare", "a", "b")
    assert status == 2
    assert "b/evaluation.json is damaged" in err


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    assert visualize.run_names(tmp_path / "a", tmp_path / "b") == ("a", "b")
    assert visualize.run_names(tmp_path / "x" / "run", tmp_path / "y" / "run") == (
        f"{tmp_path}/x/run",
        f"{tmp_path}/y/run",
    )
