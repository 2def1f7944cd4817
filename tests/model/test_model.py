"""The network: sizes that the paper reports, any image size, any backbone, Eq. 3-4, saving and loading."""

import concurrent.futures
import itertools
import json
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.runs import small_model
from unept import train
from unept.model.attention import SparseSamplingAttention, ring_offsets
from unept.model.backbone import Backbone
from unept.model.boundary import DIRECTIONS, Refinement, SubpixelConv, mean_direction, refinement_offset
from unept.model.hub import DIGEST
from unept.model.loss import UNEPTLoss
from unept.model.network import UNEPT
from unept.model.transformer import DecoderLayer, EncoderLayer, LayerSize, reference_grid, sine_position_encoding

TINY = {"d_model": 32, "num_heads": 4, "num_points": 2, "ffn_dim": 32}


def tiny_model(num_classes=3, backbone="resnet10t", **options):
    return UNEPT(num_classes, backbone, **{**TINY, **options})


def count_gmacs(model, size):
    """Convolutions and linear layers, as the paper counts; attention's own products are left out."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, *size))
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "convolution" in str(op) or "mm" in str(op)) / 2e9


@pytest.mark.parametrize(
    ("backbone", "megaparameters", "gmacs"),
    [
        ("deit_base_distilled_patch16_384", (93, 95), (90, 99.1)),  # the paper's 94 M and 99.1 (Table 7)
        ("resnet50", (29, 32.36), (120, 140.1)),  # at most the released code's
    ],
)
def test_size_of_the_papers_models(backbone, megaparameters, gmacs):
    model = UNEPT(150, backbone).eval()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    operations = count_gmacs(model, (480, 480))
    print(f"\n{backbone}: {parameters:.1f} M parameters, {operations:.1f} GMACs")
    assert megaparameters[0] <= parameters <= megaparameters[1]
    assert gmacs[0] <= operations <= gmacs[1]


@pytest.mark.parametrize(
    ("backbone", "strides"),
    [
        ("resnet50", [8, 8, 8]),
        ("deit_base_distilled_patch16_384", [16, 16, 16]),
        ("tf_efficientnet_lite0", [8, 16, 32]),
        ("convnext_atto", [8, 16, 32]),
        ("swin_tiny_patch4_window7_224", [8, 16, 32]),
        ("vit_small_patch16_dinov3", [16, 16, 16]),
        ("hrnet_w18_small", [8, 16, 32]),
    ],
)
def test_any_timm_backbone_and_any_image_size(backbone, strides):
    model = tiny_model(backbone=backbone).eval()
    assert model.backbone.strides == strides
    for size in ((33, 47), (64, 96)):
        output = model(torch.randn(1, 3, *size))
        h, w = math.ceil(size[0] / 8), math.ceil(size[1] / 8)
        assert output.logits.shape == (1, 3, h, w)
        assert output.boundary.shape == (1, 1, h, w)
        assert output.direction.shape == (1, 8, h, w)
        assert all(torch.isfinite(m).all() for m in output[:3])
    require_all_gradients(model, output)


def require_all_gradients(model, output, unread=()):
    """What nothing reads is frozen, such as a backbone's last layers: several processes need all other gradients."""
    losses = UNEPTLoss()(output, torch.randint(0, 3, (1, 64, 96)))
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.requires_grad or name.startswith(("backbone", *unread)), name


def test_without_an_encoder():
    model = tiny_model(num_encoder_layers=0).eval()
    require_all_gradients(model, model(torch.randn(1, 3, 64, 96)), unread=("encoder.scale_encoding",))


@pytest.mark.parametrize("backbone", ["coatnet_nano_rw_224", "levit_128s", "visformer_tiny"])
def test_a_backbone_of_one_image_size_is_refused_before_anything_is_written(backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["shapes", "--backbone", backbone, "--no-pretrained-backbone", "--output-stride", "None"]
    monkeypatch.setattr("sys.argv", ["train", *arguments, "--workers", "0", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert f"error: {backbone} cannot be a backbone as it is, since it sees images of one size only" in err
    assert "--backbone-image-size" in err
    assert not list(tmp_path.iterdir())


def test_a_backbone_of_one_size_sees_squares():
    model = tiny_model(backbone="levit_128s", backbone_image_size=64).eval()
    assert model.divisor == 64
    images = torch.randn(2, 3, 128, 192)
    features = model.backbone(images)
    for b, row, column in ((0, 0, 0), (1, 1, 2)):
        y, x = 64 * row, 64 * column
        for whole, square in zip(features, model.backbone(images[b : b + 1, :, y : y + 64, x : x + 64]), strict=True):
            h, w = square.shape[2:]
            part = whole[b : b + 1, :, h * row : h * (row + 1), w * column : w * (column + 1)]
            assert torch.allclose(part, square, atol=1e-5)
    assert model(images[:, :, :90, :100]).logits.shape == (2, 3, 12, 13)
    for options, message in (
        ({"backbone_image_size": 100}, "backbone_image_size is 100; for levit_128s it must be a multiple of 64"),
        ({"backbone_image_size": 4}, "backbone_image_size is 4; it must be from 8"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_model(backbone="levit_128s", **options)


def test_a_backbone_of_windows_gets_images_of_whole_windows():
    model = tiny_model(backbone="maxvit_nano_rw_256").eval()
    assert model.divisor == 256
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 90, 260)).logits.shape == (1, 3, 12, 33)


def test_large_image_of_odd_size():
    assert tiny_model().eval().predict(torch.randint(0, 256, (1, 3, 480, 700), dtype=torch.uint8)).shape == (
        1,
        480,
        700,
    )


def test_vit_blocks_are_evenly_spaced():
    assert Backbone("deit_tiny_distilled_patch16_224").features.out_indices == [3, 7, 11]


def test_padding_does_not_move_the_prediction():
    """A 61x53 image is predicted as its part of the padded 64x64 image."""
    model = tiny_model(output_stride=16).eval()
    image = torch.randn(1, 3, 61, 53)
    padded = torch.nn.functional.pad(image, (0, 11, 0, 3))
    assert torch.equal(model(image).logits, model(padded).logits[:, :, :8, :7])
    # Near its right and lower edges the map of the smaller image has no neighbour to interpolate with.
    assert torch.equal(model.predict(image)[:, :56, :48], model.predict(padded)[:, :56, :48])


def test_uint8_images_are_normalised_inside():
    model = tiny_model(backbone="tf_efficientnet_lite0").eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.allclose(model.normalized(image), image / 127.5 - 1, atol=1e-6)  # its mean and std are 0.5
    torch.testing.assert_close(model(image).logits, model(image / 127.5 - 1).logits, rtol=1e-3, atol=1e-4)


def test_attention_is_equations_3_and_4():
    """A whole layer against the equations written out for one query and head, with bilinear reads by hand."""
    torch.manual_seed(1)
    heads, points, levels, dim = 2, 3, 2, 8
    shapes = [(4, 5), (2, 3)]
    layer = SparseSamplingAttention(dim, heads, levels, points).double().requires_grad_(False)
    torch.nn.init.normal_(layer.sampling_weight, std=0.5)
    query, value = torch.randn(1, 26, dim).double(), torch.randn(1, 26, dim).double()
    reference = reference_grid(shapes, torch.device("cpu")).double()
    output = layer(query, value, shapes, reference)

    q_index, head_dim = 7, dim // heads
    heads_out = []
    for m in range(heads):
        channels = slice(m * head_dim, (m + 1) * head_dim)
        q = (query[0, q_index] @ layer.query_projection.weight.T + layer.query_projection.bias)[channels]
        v = (value[0] @ layer.value_projection.weight.T + layer.value_projection.bias)[:, channels]
        projected = q @ layer.sampling_weight[m] + layer.sampling_bias[m]
        offsets = projected[: 2 * levels * points].view(levels, points, 2)
        weights = projected[2 * levels * points :].softmax(0).view(levels, points)
        total, start = torch.zeros(head_dim).double(), 0
        for level, (height, width) in enumerate(shapes):
            grid = v[start : start + height * width].view(height, width, head_dim)
            start += height * width
            for n in range(points):
                x = reference[0, q_index, 0] * width - 0.5 + offsets[level, n, 0]
                y = reference[0, q_index, 1] * height - 0.5 + offsets[level, n, 1]
                for yi in (math.floor(y), math.floor(y) + 1):
                    for xi in (math.floor(x), math.floor(x) + 1):
                        if 0 <= yi < height and 0 <= xi < width:
                            total += weights[level, n] * (1 - abs(y - yi)) * (1 - abs(x - xi)) * grid[yi, xi]
        heads_out.append(total)
    expected = torch.cat(heads_out) @ layer.output_projection.weight.T + layer.output_projection.bias
    torch.testing.assert_close(output[0, q_index], expected, rtol=1e-9, atol=1e-9)


def test_offsets_start_on_rings():
    offsets = ring_offsets(8, 3, 16)
    assert offsets.shape == (8, 3, 16, 2)
    for n in range(16):
        assert torch.allclose(offsets[:, :, n].abs().amax(-1), torch.tensor(n / 2))
    assert torch.allclose(offsets[2, 0, 5], torch.tensor([0.0, 2.5]), atol=1e-5)  # a quarter turn: straight down (y)


def test_position_encoding_tells_positions_apart():
    points = reference_grid([(30, 40)], torch.device("cpu"))[0]
    encoding = sine_position_encoding(points, 64)
    assert encoding.shape == (1200, 64)
    distance = torch.cdist(encoding, encoding) + torch.eye(1200) * 10
    assert distance.min() > 0.05
    # y first, then x: the first half of the channels is the same along a row.
    rows = encoding.view(30, 40, 64)
    assert torch.equal(rows[:, :1, :32].expand(-1, 40, -1), rows[:, :, :32])


def test_encodings_go_to_the_queries_only():
    """While the sampling ignores the query (as at first), an encoding that reached the values would show."""
    shapes = [(3, 4)]
    points = reference_grid(shapes, torch.device("cpu"))
    x, memory = torch.randn(2, 12, 32), torch.randn(2, 12, 32)
    zeros, encoding = torch.zeros(1, 12, 32), torch.randn(1, 12, 32)
    size = LayerSize(d_model=32, num_heads=4, num_levels=1, num_points=2, ffn_dim=32, dropout=0.0)
    encoder, decoder = EncoderLayer(size), DecoderLayer(size)
    assert torch.equal(encoder(x, zeros, shapes, points), encoder(x, encoding, shapes, points))
    without, with_encoding = (decoder(x, e, shapes[0], points, memory, shapes) for e in (zeros, encoding))
    assert torch.equal(without, with_encoding)
    for attention in (encoder.self_attention, decoder.self_attention, decoder.cross_attention):
        torch.nn.init.normal_(attention.sampling_weight)
    assert not torch.equal(encoder(x, zeros, shapes, points), encoder(x, encoding, shapes, points))
    assert not torch.equal(without, decoder(x, encoding, shapes[0], points, memory, shapes))


def test_refinement_moves_boundary_pixels_one_step_inward():
    boundary = torch.full((1, 1, 4, 4), -9.0)
    boundary[..., :2] = 9.0
    for k, (dx, dy) in enumerate(DIRECTIONS):
        direction = torch.zeros(1, 8, 4, 4)
        direction[:, k] = 5.0
        offset = refinement_offset(boundary, direction, (32, 32), Refinement(scale=2))
        assert offset[0, :, 0, 0].tolist() == [2 * dx, 2 * dy]
        assert offset[0, :, 0, 31].tolist() == [0, 0]
        angle = math.degrees(math.atan2(dy, dx))
        assert math.isclose((angle + 180) % 360, 45 * k % 360, abs_tol=1e-6)


@pytest.mark.parametrize(
    "options", [{"scale": 0}, {"scale": 200}, {"scale": 1.5}, {"steps": 0}, {"direction": "Mean"}], ids=str
)
def test_a_refinement_that_does_not_exist_is_refused(options):
    """A misspelled direction is not the most likely one, and no step is not unrefined."""
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; it must be"):
        Refinement(**options)
    with pytest.raises(ValueError, match=f"{name} is"):
        small_model().predict(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), **{f"refine_{name}": value})


def test_refinement_goes_on_from_where_a_step_ended():
    """Against a walk of every pixel by itself; steps that end outside the image are clamped to its edge."""
    boundary, direction = torch.randn(2, 1, 9, 11) + 0.5, torch.randn(2, 8, 9, 11)
    offset = refinement_offset(boundary, direction, (9, 11), Refinement(scale=2, steps=3))
    for b, y, x in itertools.product(range(2), range(9), range(11)):
        total = [0, 0]
        for _ in range(3):
            here_x, here_y = min(max(x + total[0], 0), 10), min(max(y + total[1], 0), 8)
            if boundary[b, 0, here_y, here_x] > 0:
                dx, dy = DIRECTIONS[direction[b, :, here_y, here_x].argmax()]
                total = [total[0] + 2 * dx, total[1] + 2 * dy]
        assert offset[b, :, y, x].tolist() == total


def test_mean_direction_is_shorter_where_directions_disagree():
    """Against a sum over the directions of each pixel; certain directions give whole steps, opposite ones none."""
    boundary, direction = torch.randn(2, 1, 5, 7), 2 * torch.randn(2, 8, 5, 7)
    direction[0, :, 0, 0], direction[0, 3, 0, 0], boundary[0, 0, 0, 0] = 0.0, 50.0, 1.0
    direction[0, :, 0, 1], boundary[0, 0, 0, 1] = torch.tensor([50.0, 0, 0, 0, 50, 0, 0, 0]), 1.0
    refinement = Refinement(scale=4, direction="mean")
    offset = refinement_offset(boundary, direction, (5, 7), refinement)
    assert offset[0, :, 0, 0].tolist() == [round(4 * math.sqrt(0.5)), -round(4 * math.sqrt(0.5))]
    assert offset[0, :, 0, 1].tolist() == [0, 0]
    for b, y, x in itertools.product(range(2), range(5), range(7)):
        total = torch.zeros(2)
        for k, probability in enumerate(direction[b, :, y, x].softmax(0)):
            angle = math.radians(45 * k - 180)
            total += 4 * probability * torch.tensor([math.cos(angle), math.sin(angle)])
        expected = total.round() if boundary[b, 0, y, x] > 0 else torch.zeros(2)
        assert offset[b, :, y, x].tolist() == expected.tolist()
    coarse = refinement_offset(boundary, direction, (40, 56), refinement)  # up-sampled after the mean
    up = torch.nn.functional.interpolate(mean_direction(direction, (5, 7)), (40, 56), mode="bilinear")
    moved = coarse.any(1)
    assert moved.any()
    assert torch.equal(coarse.movedim(1, -1)[moved], (4 * up).round().short().movedim(1, -1)[moved])


def test_refinement_threshold_is_a_probability():
    """A logit of 0.1 is a probability of 0.52: boundary. Thresholding the logit itself at 0.5 would miss it."""
    direction = torch.zeros(1, 8, 2, 2)
    direction[:, 4] = 5.0
    assert refinement_offset(torch.full((1, 1, 2, 2), 0.1), direction, (16, 16), Refinement()).any()
    assert not refinement_offset(torch.full((1, 1, 2, 2), -0.1), direction, (16, 16), Refinement()).any()


def test_refinement_is_part_of_prediction():
    model = tiny_model().eval()
    torch.nn.init.constant_(model.boundary_head[-1].bias, 20.0)  # everything is boundary
    image = torch.randn(1, 3, 64, 64)
    plain, refined = model.predict(image, refine=False), model.predict(image)
    assert not torch.equal(plain, refined)


def test_subpixel_convolution_fills_blocks_row_by_row():
    conv = SubpixelConv(4, 3, 2)
    features = torch.randn(1, 4, 3, 5)
    first = conv(features)
    assert first.shape == (1, 3, 6, 10)
    for y, x in itertools.product(range(2), range(2)):  # at first, a block is constant
        torch.testing.assert_close(first[..., y::2, x::2], first[..., ::2, ::2])
    torch.nn.init.normal_(conv[0].weight)
    values = conv[0](features).view(3, 2, 2, 3, 5)
    for y, x in itertools.product(range(2), range(2)):
        assert torch.equal(conv(features)[0, :, y::2, x::2], values[:, y, x])


@pytest.mark.parametrize("features", ["spatial", "spatial+decoder"])
@pytest.mark.parametrize("logits_stride", [8, 2, 1])
def test_subpixel_maps_cover_the_image_and_learn(features, logits_stride):
    options = {"boundary_upsampling": "subpixel", "boundary_features": features, "logits_stride": logits_stride}
    model = tiny_model(**options)
    images = torch.randn(2, 3, 50, 70)
    output = model(images)
    assert output.logits_stride == logits_stride
    assert output.logits.shape == (2, 3, 56 // logits_stride, 72 // logits_stride)
    assert output.boundary.shape == (2, 1, 56, 72)
    assert output.direction.shape == (2, 8, 56, 72)
    UNEPTLoss()(output, torch.randint(0, 3, (2, 50, 70)))["loss"].backward()
    for module in (model.classifier, model.boundary_head, model.direction_head):
        assert all(parameter.grad.any() for parameter in module.parameters())
    assert model.predict(images, refine_scale=2, refine_steps=2, refine_direction="mean").shape == (2, 50, 70)


def test_boundaries_see_the_decoder_only_if_asked_to():
    for features, expected in (("spatial", False), ("spatial+decoder", True)):
        model = tiny_model(boundary_features=features)
        output = model(torch.randn(1, 3, 64, 64))
        (output.boundary.sum() + output.direction.sum()).backward()
        assert any(p.grad is not None for p in model.decoder.parameters()) == expected


@pytest.mark.parametrize(
    "options", [{"boundary_upsampling": "nearest"}, {"boundary_features": "decoder"}, {"logits_stride": 3}], ids=str
)
def test_unknown_forms_of_the_heads_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; it must be"):
        tiny_model(**options)


def test_baseline_without_spatial_branch():
    model = tiny_model(context_queries="learned").eval()
    output = model(torch.randn(1, 3, 40, 56))
    assert output.logits.shape == (1, 3, 5, 7)
    assert output.boundary is None
    assert output.direction is None
    losses = UNEPTLoss()(output, torch.randint(0, 3, (1, 40, 56)))
    assert set(losses) == {"loss", "segmentation"}
    assert losses["loss"] == losses["segmentation"]
    assert model.predict(torch.randn(1, 3, 40, 56)).shape == (1, 40, 56)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_compiled_model_and_loss_have_no_graph_break(amp):
    """What unept.train compiles: bytes in, under autocast on a GPU."""
    model, loss = tiny_model(output_stride=32, dropout=0.0), UNEPTLoss()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)

    def step(images, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            output = model(images)
        return loss(output, labels)["loss"]

    expected = step(images, labels)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(images, labels)
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=1e-2 if amp else 1e-5, atol=0)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-6)
        assert error < (0.2 if amp else 1e-3), f"{name}: {error:.2g}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_model_in_another_dtype(dtype):
    model = tiny_model(output_stride=32).eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    expected = model(image).logits
    actual = model.to(dtype)(image).logits
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() < 0.1 * expected.norm()
    assert model.predict(image).shape == (1, 64, 64)


def test_prediction_leaves_the_model_as_it_is():
    """A model in training mode predicts as in evaluation mode, keeps its statistics and trains on."""
    model = tiny_model(output_stride=32).train()
    image = torch.randn(1, 3, 64, 64)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids = model.predict(image)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training
    assert torch.equal(ids, model.eval().predict(image))


def test_threads_predict_at_once_with_a_model_in_training_mode():
    """None of them finds the model in training mode because another one has finished, and all modes come back."""
    model = tiny_model().train()
    model.backbone.eval()
    images = torch.randint(0, 256, (8, 1, 3, 32, 40), dtype=torch.uint8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = [model.predict(image) for image in images]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for ids, wanted in zip(pool.map(model.predict, images.repeat(3, 1, 1, 1, 1)), expected * 3, strict=True):
            assert torch.equal(ids, wanted)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not any(module.training for module in model.backbone.modules())


def test_saved_model_comes_back(tmp_path):
    model = tiny_model(classes=["a", "b", "c"], palette=[[1, 2, 3], [4, 5, 6], [7, 8, 9]]).eval()
    model.save_pretrained(tmp_path / "model")
    again = UNEPT.from_pretrained(str(tmp_path / "model"))
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(image).logits, again.eval()(image).logits)
    assert again.classes == ["a", "b", "c"]
    assert again.palette == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_saved_model_with_missing_weights_is_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder")}
    save_file({name: tensor.clone() for name, tensor in kept.items()}, tmp_path / "model" / "model.safetensors")
    config = tmp_path / "model" / "config.json"
    options = json.loads(config.read_text())
    del options[DIGEST]  # that of other weights is refused before
    config.write_text(json.dumps(options))
    with pytest.raises(RuntimeError, match=r"encoder\.scale_encoding"):
        UNEPT.from_pretrained(str(tmp_path / "model"))


def test_saved_model_needs_no_backbone_weights(tmp_path):
    weights = tmp_path / "backbone.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), weights)
    model = tiny_model(backbone_weights=str(weights)).eval()
    model.save_pretrained(tmp_path / "model")
    weights.unlink()
    assert UNEPT.from_pretrained(str(tmp_path / "model")).num_classes == 3


def test_backbone_weights_from_a_file(tmp_path):
    source = timm.create_model("tf_efficientnet_lite0")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = tiny_model(backbone="tf_efficientnet_lite0", backbone_weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.backbone.features.conv_stem.weight, source.conv_stem.weight)


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="tensors of tf_efficientnet_lite0"):
        tiny_model(backbone="tf_efficientnet_lite0", backbone_weights=str(tmp_path / "w.safetensors"))
    (tmp_path / "garbage.safetensors").write_bytes(b"no weights")
    (tmp_path / "garbage.pth").write_bytes(b"no weights")
    for name in ("garbage.safetensors", "garbage.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            tiny_model(backbone_weights=str(tmp_path / name))
    save_file(timm.create_model("resnet50").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="tensors of wide_resnet50_2"):
        tiny_model(backbone="wide_resnet50_2", backbone_weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(FileNotFoundError, match="which is not a file"):
        tiny_model(backbone_weights=str(tmp_path / "missing.safetensors"))


def test_unreachable_hub_names_the_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"--backbone-weights PATH.*--no-pretrained-backbone"):
        tiny_model(backbone="resnet10t", pretrained_backbone=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet5"}, "close names: resnet"),
        ({"d_model": 30, "num_heads": 3}, "multiple of 8"),
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"context_queries": "none"}, "'spatial.learned' or 'spatial.encoder'"),
        ({"classes": ["a"]}, "classes has 1 entries"),
        ({"num_levels": 9}, "lower num_levels"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_bad_images():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(TypeError, match="uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
