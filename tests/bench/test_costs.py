"""What networks cost, counted without running them; Tables 7 and 8."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import table7, table8
from bench.counting import cost, counted, kept_for_backward
from bench.heads import CCNetHead
from unept.kernels import use_backend
from unept.model.attention_variants import ATTENTIONS
from unept.model.network import UNEPT


def tiny(attention):
    options = {"d_model": 32, "num_heads": 4, "num_points": 4, "ffn_dim": 64}
    return UNEPT(5, "resnet10t", output_stride=32, attention=attention, **options)


FAST = ("full", "longformer")


@pytest.mark.parametrize(
    "attention", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTIONS]
)
def test_counted_memory_is_that_of_a_cpu(attention):
    row = table8.Row(attention, lambda: tiny(attention))
    images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    model = tiny(attention).train()
    with use_backend("torch"):
        real = kept_for_backward(model, lambda: table8.loss_of(model, images, labels, amp=False))
    assert table8.kept(row, 2, 64) == real


def test_plain_attention_keeps_its_weights():
    """Per layer B M Q S float32 weights more than a fused one; softmax's result is kept once."""
    fused, plain = (table8.kept(table8.Row("full", lambda: tiny("full"), fused=f), 2, 128) for f in (True, False))
    encoder, queries = 3 * 4 * 4, 16 * 16  # tokens of three levels at 1/32, context queries at 1/8
    weights = 4 * 2 * 4 * 2 * (encoder * encoder + queries * queries + queries * encoder)
    assert plain - fused > 0.95 * weights


def test_heads_of_full_resolution_cost_little_at_the_papers_size():
    """The numbers of docs/sharper_boundaries.md and docs/read_the_benchmark.md; 2.6 GB is the limit of a step."""
    heads = {"boundary_upsampling": "subpixel", "boundary_features": "spatial+decoder", "logits_stride": 2}
    plain, fine = (lambda: UNEPT(150, "resnet50"), lambda: UNEPT(150, "resnet50", **heads))
    macs = [cost(build, (480, 480)).layer_macs / 1e9 for build in (plain, fine)]
    assert macs == pytest.approx([134.1, 137.2], abs=0.1)
    kept = [table8.kept(table8.Row("", build), 2, 480, amp=True) / 1e9 for build in (plain, fine)]
    assert kept == pytest.approx([2.20, 2.26], abs=0.01)
    assert max(kept) <= 2.6


def test_finer_heads_on_a_narrower_branch_keep_the_multiplications_of_the_paper():
    heads = {"boundary_upsampling": "subpixel", "boundary_features": "spatial+decoder", "spatial_widths": (64, 128)}
    build = lambda: UNEPT(150, "deit_base_distilled_patch16_384", **heads)
    assert cost(build, (480, 480)).layer_macs <= 99.1e9


def test_multiplications_of_one_attention_are_counted():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 8)

        def forward(self, images):
            x = self.linear(images.flatten(2).transpose(1, 2))[:, None]
            return F.scaled_dot_product_attention(x, x, x)

    found = cost(Attend, (4, 6))
    assert (found.layer_macs, found.product_macs) == (24 * 3 * 8, 2 * 24 * 24 * 8)
    assert found.parameters == 32


def test_networks_have_no_contents_while_counted():
    with counted(lambda: CCNetHead([1 << 14, 1 << 15], 5)) as head:
        assert sum(p.numel() for p in head.parameters()) > 1e8
        assert math.prod(head([torch.zeros(1, 1 << 14, 8, 8), torch.zeros(1, 1 << 15, 8, 8)]).logits.shape) == 320


def test_tables_are_printed(tmp_path):
    """Multiplications agree within 1 % with Table 7 for CCNet, OCRNet, DNLNet and ours; CCNet stands for them."""
    rows = [row for row in table7.ROWS if row.name == "CCNet"]
    assert "| CCNet | ResNet-101 | 68.9 | 69 | 243.4 | 244.6 | 0.5 |" in table7.table(tuple(rows))
    found = {"sparse_sampling": [(1.0, 2.0), (2.0, 4.0)], "full": [(1.0, 3.0), (4.0, 9.0)]}
    table8.draw(found, (64, 128), 2, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert "| full | 1.0; 3 | 4.0; 9 |" in table8.growth_table(found, (64, 128))
