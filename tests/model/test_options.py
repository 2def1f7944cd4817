"""Options of the network that other readings of the paper need: directions, spatial branch, queries, encodings."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors

from tests.helpers.runs import small_model
from unept.config import DataConfig, ModelConfig, TrainConfig
from unept.data.augmentation import build_transform
from unept.inference import InferenceConfig, InferenceOptions, infer, resolve
from unept.model.attention_variants import FullAttention
from unept.model.backbone import Backbone
from unept.model.boundary import DIRECTIONS, direction_steps, mirrored_directions
from unept.model.loss import UNEPTLoss
from unept.model.pixel_loss import PixelLoss
from unept.recipe import RecipeConfig
from unept.training.losses import build_loss
from unept.training.optimizer import describe_schedule, learning_rate_factor

RELEASED = {
    "decoder_self_attention": "full",
    "context_queries": "spatial+learned",
    "spatial_widths": (16, 24),
    "spatial_last_relu": False,
    "level_norm": False,
    "scale_encoding_std": 1.0,
}


def test_the_released_form_of_the_network():
    torch.manual_seed(0)
    model, plain = small_model(**RELEASED), small_model()
    assert [m.out_channels for m in model.queries.modules() if isinstance(m, torch.nn.Conv2d)] == [16, 24, 32]
    images = torch.randn(2, 3, 40, 56)
    assert (model.queries(images) < 0).any()
    assert not (plain.queries(images) < 0).any()
    assert all(isinstance(layer.self_attention, FullAttention) for layer in model.decoder.layers)
    assert type(model.decoder.layers[0].cross_attention) is type(plain.decoder.layers[0].cross_attention)
    assert not [m for m in model.pyramid.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert model.encoder.scale_encoding.std() > 0.5 > 5 * plain.encoder.scale_encoding.std()
    losses = UNEPTLoss()(model.train()(images), torch.randint(0, 3, (2, 40, 56)))
    losses["loss"].backward()
    assert model.query_table.table.grad.abs().sum() > 0
    assert not [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("backbone")]


def test_the_table_is_added_to_what_the_decoder_sees_and_not_to_what_the_heads_see():
    model, images = small_model(context_queries="spatial+learned"), torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        before = model(images)
        model.query_table.table.add_(1.0)
        after = model(images)
    assert torch.equal(after.boundary, before.boundary)
    assert not torch.equal(after.logits, before.logits)


def test_the_encoders_output_is_added_to_what_the_decoder_sees_and_not_to_what_the_heads_see():
    model, images = small_model(context_queries="spatial+encoder"), torch.randn(1, 3, 64, 96)
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        output = model.eval()(images)
    queries, memory, shapes = seen[0]
    details = model.queries(images)
    assert torch.equal(output.boundary, model.boundary_head(details))
    added, start = torch.zeros_like(details), 0
    for h, w in shapes:
        level = memory[:, start : start + h * w].transpose(1, 2).reshape(1, -1, h, w)
        added += F.interpolate(level, (8, 12), mode="bilinear", align_corners=False)
        start += h * w
    torch.testing.assert_close(queries - details, added, atol=1e-5, rtol=1e-5)
    assert sum(h * w for h, w in shapes) == start == memory.shape[1]


@pytest.mark.parametrize("count", [4, 8, 12, 16, 32])
def test_steps_of_any_number_of_directions(count):
    steps = direction_steps(torch.arange(count).view(1, 1, count), count)[0, :, 0].T.tolist()
    assert len({tuple(step) for step in steps}) == count
    for k, (dx, dy) in enumerate(steps):
        error = math.remainder(math.atan2(dy, dx) - (2 * math.pi * k / count - math.pi), 2 * math.pi)
        assert abs(error) < math.pi / 8
        assert max(abs(dx), abs(dy)) == math.ceil(count / 8)
        assert steps[mirrored_directions(count)[k]] == [-dx, dy]
    if count == 8:
        assert [tuple(step) for step in steps] == list(DIRECTIONS)


def test_sixteen_directions_from_training_to_inference():
    model, images = small_model(num_directions=16), torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    with torch.no_grad():
        output = model(images)
    assert output.direction.shape == (1, 16, 5, 7)
    labels = torch.zeros(1, 40, 56, dtype=torch.int64)
    labels[:, 20:, 28:] = 1
    assert UNEPTLoss(num_directions=16)(output, labels)["loss"].isfinite()
    flipped = infer(model, images, InferenceConfig(flip=True))
    assert flipped.direction.shape[1] == 16
    torch.testing.assert_close(flipped.direction.sum(1), torch.ones_like(flipped.direction[:, 0]))
    with pytest.raises(ValueError, match="num_directions is 7; it must be an even number from 4 to 254"):
        small_model(num_directions=7)


def test_position_embeddings_are_resized_bilinearly():
    name, size = "vit_tiny_patch16_224", (48, 80)
    torch.manual_seed(0)
    plain, ours = (Backbone(name, position_resize=how).eval() for how in ("bicubic", "bilinear"))
    ours.load_state_dict(plain.state_dict())
    images, vit = torch.randn(1, 3, *size), plain.features.model
    with torch.no_grad():
        own = torch.randn(1, 224, 224, 3).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(own), plain(own))  # nothing to resize
        grid = vit.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (3, 5), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        tokens = torch.cat([vit.cls_token, vit.patch_embed.proj(images).flatten(2).transpose(1, 2)], dim=1)
        expected = vit.blocks(tokens + torch.cat([vit.pos_embed[:, :1], grid], dim=1))
        found = ours(images)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected[:, 1:], rtol=1e-4, atol=1e-4)
    ours(images)[-1].sum().backward()
    assert ours.features.model.pos_embed.grad.abs().sum() > 0
    assert ours.features.model.patch_embed.grid_size == (14, 14)
    with pytest.raises(ValueError, match="resnet10t has no position embedding to resize: omit position_resize"):
        Backbone("resnet10t", position_resize="bilinear")


def test_position_embeddings_are_resized_bilinearly_for_squares_too():
    """Squares are seen one by one (`image_size`); timm is not left to resize the embedding for them."""
    options = {"position_resize": "bilinear", "num_levels": 1}
    whole, squares = (Backbone("vit_tiny_patch16_224", image_size=n, **options).eval() for n in (None, 64))
    squares.load_state_dict(whole.state_dict())
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        expected = torch.cat([whole(half)[0] for half in images.split(64, dim=3)], dim=3)
        torch.testing.assert_close(squares(images)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_run_has_its_options():
    config = TrainConfig(
        model=ModelConfig(num_directions=16),
        recipe=RecipeConfig(segmentation_loss="focal"),
        direction_pixels="predicted",
        boundary_balance="classes",
    )
    loss = build_loss(config, config.data.build("val"))
    assert (loss.num_directions, loss.direction_pixels, loss.boundary_balance) == (16, "predicted", "classes")
    assert loss.pixel_loss == PixelLoss("focal")


def test_training_images_are_resized_to_their_long_side():
    data = DataConfig(long_side=32, crop_size=(32, 32), scale=(1, 1), photometric=False)
    image, mask = torch.zeros(3, 64, 128, dtype=torch.uint8), torch.zeros(64, 128, dtype=torch.uint8)
    _, mask = build_transform(data, (0.5,) * 3)(tv_tensors.Image(image), tv_tensors.Mask(mask))
    assert (mask == 0).sum() == 16 * 32
    assert (mask[16:] == 255).all()


def test_images_are_seen_at_their_long_side():
    config = TrainConfig(data=DataConfig(long_side=80))
    model = small_model()
    model.preprocessing = config.inference().protocol()
    resolved = resolve(InferenceOptions(), model)
    assert (resolved.long_side, resolved.short_side) == (80, 0)
    assert "long side 80" in resolved.describe()
    assert infer(model, torch.randn(1, 3, 40, 60), resolved).probabilities.shape[2:] == (7, 11)  # 53 x 85 pixels
    other = resolve(InferenceOptions(short_side=64), model)
    assert (other.long_side, other.short_side) == (0, 64)
    with pytest.raises(ValueError, match="short_side is 64 and long_side 80; give one of them"):
        InferenceConfig(short_side=64, long_side=80)
    with pytest.raises(ValueError, match="short_side is 64 and long_side 80; give one of them"):
        DataConfig(short_side=64, long_side=80)


def test_the_step_of_the_learning_rate_can_be_elsewhere():
    config = TrainConfig(iterations=160, lr_drop=126 / 160)
    assert [learning_rate_factor(config, step) for step in (0, 125, 126, 159)] == [1.0, 1.0, 0.1, 0.1]
    assert [learning_rate_factor(TrainConfig(iterations=300), step) for step in (199, 200)] == [1.0, 0.1]
    assert "falls to 1.0e-05 at step 126" in describe_schedule(config, 3)
    with pytest.raises(ValueError, match=r"lr_drop is 0; it must be in \(0, 1\]"):
        TrainConfig(lr_drop=0)


def test_residual_branches_may_start_at_zero():
    """At first a layer only normalises what it is given, and every weight of it learns within three steps."""
    model = small_model(context_queries="spatial+encoder", zero_init_residual=True).train()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    with torch.no_grad():
        tokens, shapes = model.pyramid(model.backbone(images))
        expected = F.layer_norm(tokens, tokens.shape[-1:])
        torch.testing.assert_close(model.encoder(tokens, shapes), expected, atol=1e-4, rtol=1e-4)
    optimizer, before = torch.optim.SGD(model.parameters(), 0.1), {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        UNEPTLoss()(model(images), labels)["loss"].backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) and not n.startswith("backbone")]
    assert not still
    assert small_model().encoder.layers[0].self_attention.output_projection.weight.any(), "not by default"
