"""Models of transformers, random and small, on this project's operator: outputs and gradients are what theirs are."""

import copy

import pytest
import torch
import transformers
from torch import Tensor

from unept.integrations.transformers import patch, unpatch
from unept.kernels import use_backend

SIZE = 64


def resnet(kind):
    return kind(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def detr_options():
    """What Deformable DETR and Grounding DINO have in common."""
    return {
        "use_timm_backbone": False,
        "backbone": None,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_queries": 7,
    }


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        **detr_options(),
        use_pretrained_backbone=False,
        backbone_config=resnet(transformers.ResNetConfig),
        num_labels=5,
        with_box_refine=True,
        two_stage=True,
        two_stage_num_proposals=7,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr_options(backbone):
    return {
        "backbone_config": backbone,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [8, 16, 24],
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "d_model": 32,
        "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "num_queries": 7,
        "num_denoising": 0,
        "num_labels": 5,
        "hidden_expansion": 0.5,
    }


def rt_detr():
    backbone = resnet(transformers.RTDetrResNetConfig)
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**rt_detr_options(backbone)))


def rt_detr_v2():
    backbone = resnet(transformers.RTDetrResNetConfig)
    return transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**rt_detr_options(backbone)))


def d_fine():
    backbone = transformers.HGNetV2Config(
        hidden_sizes=[8, 8, 16, 24],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 24],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    options = {**rt_detr_options(backbone), "decoder_n_points": [3, 6, 3]}
    return transformers.DFineForObjectDetection(transformers.DFineConfig(**options))


def grounding_dino():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.GroundingDinoConfig(
        **detr_options(),
        backbone_config=swin(["stage2", "stage3", "stage4"]),
        text_config=transformers.BertConfig(vocab_size=50, **text),
        max_text_len=8,
    )
    return transformers.GroundingDinoForObjectDetection(config)


def swin(out_features):
    return transformers.SwinConfig(
        image_size=SIZE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=out_features,
    )


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=7,
        num_labels=5,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


MODELS = {
    "Deformable DETR": (deformable_detr, 3),
    "RT-DETR": (rt_detr, 2),
    "RT-DETRv2": (rt_detr_v2, 2),
    "D-FINE": (d_fine, 2),
    "Grounding DINO": (grounding_dino, 3),
    "Mask2Former": (mask2former, 2),
}


def inputs(name: str, dtype=torch.float32, size: int = SIZE) -> dict[str, Tensor]:
    arguments = {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)}
    if name == "Grounding DINO":
        ids = torch.tensor([[2, 7, 9, 3], [2, 11, 8, 3]])
        arguments |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return arguments


def results(model, name: str, dtype: torch.dtype, size: int = SIZE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by name, and the gradients of the parameters by a sum of squares of them."""
    output = model(**inputs(name, dtype, size))
    maps = {key: value for key, value in output.items() if isinstance(value, Tensor) and value.requires_grad}
    maps = {key: torch.where(value.isfinite(), value, 0) for key, value in maps.items()}  # masked logits are -inf
    loss = sum(value.to(torch.promote_types(dtype, torch.float32)).square().mean() for value in maps.values())
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    used = {key: grad for key, grad in zip(parameters, gradients, strict=True) if grad is not None}
    return maps, used


def build(name: str, dtype=torch.float32):
    """A model, twice."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for module in model.modules():  # at the start offsets are a fixed pattern and scores are equal
        if hasattr(module, "sampling_offsets"):
            torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
            torch.nn.init.normal_(module.attention_weights.weight, std=0.3)
    model.to(dtype)
    return model, copy.deepcopy(model)


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Over all tensors, the RMS of the difference relative to that of the exact ones."""
    assert set(found) == set(exact)
    both = [torch.cat([tensors[key].double().flatten() for key in exact]) for tensors in (found, exact)]
    return ((both[0] - both[1]).norm() / both[1].norm()).item()


def reads_at_points(gradients: dict[str, Tensor]) -> bool:
    """Whether the operator's own gradients are there: a test of anything else would pass without it."""
    named = [grad for key, grad in gradients.items() if "sampling_offsets" in key]
    return bool(named) and all(grad.abs().max() > 0 for grad in named)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_theirs(name):
    theirs, ours = build(name, torch.float64)
    exact = results(theirs, name, torch.float64)
    assert reads_at_points(exact[1])
    assert patch(ours) == MODELS[name][1]
    for mine, their in zip(results(ours, name, torch.float64), exact, strict=True):
        assert error(mine, their) < 1e-10
    assert unpatch(ours) == MODELS[name][1]


DTYPES = (torch.float32, torch.bfloat16)
IN_EVERY_DTYPE = [
    *((name, "torch", dtype, SIZE) for name in ("Deformable DETR", "Mask2Former") for dtype in DTYPES),
    # Triton's interpreter takes half a minute to a minute for each of these.
    pytest.param("Deformable DETR", "triton", torch.float32, SIZE // 2, marks=pytest.mark.slow),
    *(
        pytest.param(name, "triton", dtype, SIZE, marks=pytest.mark.exhaustive)
        for name in ("Deformable DETR", "Mask2Former")
        for dtype in DTYPES
    ),
]


@pytest.mark.parametrize(("name", "backend", "dtype", "size"), IN_EVERY_DTYPE, ids=str)
def test_as_exact_as_theirs_in_every_dtype(name, backend, dtype, size):
    exact = results(build(name, torch.float64)[0], name, torch.float64, size)
    theirs, ours = build(name, dtype)
    patch(ours)
    with use_backend(backend):
        found = results(ours, name, dtype, size)
    for mine, their, truth in zip(found, results(theirs, name, dtype, size), exact, strict=True):
        assert error(mine, truth) <= 2 * error(their, truth)


# One for each of the three operators.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Deformable DETR", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("Mask2Former", "RT-DETRv2")),
    ],
)
def test_compiled(name):
    theirs, ours = build(name)
    patch(ours)
    with torch.no_grad():
        wanted = theirs(**inputs(name))
        found = torch.compile(ours, backend="eager" if name == "RT-DETRv2" else "aot_eager")(**inputs(name))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-4)


def test_unpatched_is_as_before():
    _, ours = build("D-FINE")
    before = {key: vars(module).copy() for key, module in ours.named_modules()}
    assert patch(ours) == patch(ours) == 2
    assert unpatch(ours) == 2
    assert unpatch(ours) == 0
    for key, module in ours.named_modules():
        assert vars(module).keys() == before[key].keys()
        assert all(value is vars(module)[name] for name, value in before[key].items() if callable(value))


def test_a_copy_of_a_patched_model_is_patched():
    theirs, ours = build("Mask2Former")
    patch(ours)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for module in ours.modules():
            if hasattr(module, "value_proj"):
                module.value_proj.weight.zero_()  # the copy must not read these
        torch.testing.assert_close(copied(**inputs("Mask2Former"))[0], theirs(**inputs("Mask2Former"))[0])
    assert unpatch(copied) == 2


def test_discrete_sampling_is_left_alone():
    torch.manual_seed(0)
    backbone = resnet(transformers.RTDetrResNetConfig)
    options = {**rt_detr_options(backbone), "decoder_method": "discrete"}
    model = transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**options))
    with pytest.raises(ValueError, match="has no deformable attention that can be replaced"):
        patch(model)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear has no deformable attention that can be replaced: give a model"):
        patch(torch.nn.Linear(2, 2))
