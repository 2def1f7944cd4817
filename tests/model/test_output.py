"""What is read from a prediction: the same from logits of one view as from probabilities of many."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.models import StandIn, missing_members
from unept.model import UNEPT, UNEPTOutput
from unept.model.boundary import Refinement, refinement_offset
from unept.model.output import (
    AveragedOutput,
    SegmentationModel,
    TrainableModel,
    boundary_probability,
    class_ids,
    evaluation_mode,
    padded_size,
    read_offset,
)

SIZE = (29, 43)


def random_output(boundaries: bool = True) -> UNEPTOutput:
    """Maps of images of `SIZE`, with boundary pixels and every direction."""
    logits = 3 * torch.randn(2, 5, 4, 6)
    return UNEPTOutput(logits, *((torch.randn(2, 1, 4, 6), torch.randn(2, 8, 4, 6)) if boundaries else (None, None)))


def averaged(output: UNEPTOutput) -> AveragedOutput:
    """The average over one view."""
    if output.boundary is None:
        return AveragedOutput(output.logits.softmax(1), None, None)
    return AveragedOutput(output.logits.softmax(1), output.boundary.sigmoid(), output.direction.softmax(1))


def test_averaged_probabilities_are_read_like_logits():
    output = random_output()
    padded = padded_size(SIZE)
    offset = read_offset(output, padded, Refinement(scale=2))
    assert offset.any()
    # Boundaries come from logits either way; directions from what was averaged.
    expected = refinement_offset(output.boundary, output.direction.softmax(1), padded, Refinement(scale=2))
    assert torch.equal(read_offset(averaged(output), padded, Refinement(scale=2)), expected)
    assert torch.equal(expected.any(1), offset.any(1))
    torch.testing.assert_close(boundary_probability(averaged(output), SIZE), boundary_probability(output, SIZE))
    mean = Refinement(scale=5, direction="mean")
    one, other = (read_offset(maps, padded, mean) for maps in (output, averaged(output)))
    assert one.any()
    assert (one != other).float().mean() < 0.01  # rounding decides where the mean ends between two pixels


def test_class_ids_are_those_of_the_largest_score():
    output = random_output()
    for maps in (output, averaged(output)):
        full = F.interpolate(maps.scores, padded_size(SIZE), mode="bilinear").argmax(1)
        assert torch.equal(class_ids(maps, SIZE, None), full[:, : SIZE[0], : SIZE[1]])


@pytest.mark.parametrize("shift", [False, True])
def test_confidence_is_the_probability_of_the_class(shift):
    output = random_output()
    size = padded_size(SIZE)
    offset = read_offset(output, size, Refinement()) if shift else None
    ids = torch.randint(0, 5, (2, *size))
    y, x = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    if offset is not None:
        x, y = (x + offset[:, 0]).clamp(0, size[1] - 1), (y + offset[:, 1]).clamp(0, size[0] - 1)
    for maps in (output, averaged(output)):
        full = F.interpolate(maps.scores, size, mode="bilinear")
        probabilities = full.softmax(1) if maps is output else full
        expected = torch.stack(
            [p[i, v, u] for p, i, v, u in zip(probabilities, ids, y.expand_as(ids), x.expand_as(ids), strict=True)]
        )
        torch.testing.assert_close(maps.confidence(ids, offset), expected, atol=2e-6, rtol=0)


def test_without_a_spatial_branch_nothing_is_refined():
    output = random_output(boundaries=False)
    for maps in (output, averaged(output)):
        assert boundary_probability(maps, SIZE) is None
        assert read_offset(maps, padded_size(SIZE), Refinement()) is None
        assert torch.equal(class_ids(maps, SIZE, Refinement()), class_ids(maps, SIZE, None))


def test_models_have_what_the_protocols_ask_for():
    model = UNEPT(3, "resnet10t", d_model=32, num_heads=2, num_points=2, ffn_dim=32)
    assert not missing_members(model, TrainableModel)
    assert not missing_members(StandIn(3), SegmentationModel)
    assert missing_members(StandIn(3), TrainableModel) == ["backbone", "evaluation", "save_pretrained"]
    assert missing_members(torch.nn.Identity(), SegmentationModel) == [
        "classes", "normalized", "num_classes", "palette", "preprocessing", "refines",
    ]  # fmt: skip


def test_evaluation_mode_gives_every_module_its_own_mode_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).train()
    model[1].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == [True, True, False]
