"""Table 8: memory and multiplications of our network with each attention: `python -m bench.table8`.

One training step at batch 2, 480x480, 150 classes. Memory is counted: the bytes that autograd keeps for the backward
pass, the loss included, weights and optimiser left out, on tensors without contents (`bench.counting`), in float32 and
under bfloat16 autocast. Where there is a GPU, the peak of a real step in float32 is measured too. The paper gives the
memory of its programs of 2021, which kept every attention weight. Here full attention is counted in both ways: as a
fused kernel, which keeps one number per query, and plainly. The last table and the plot show how the network's cost
grows with the area of the image.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from unept.model.attention_variants import ATTENTIONS
from unept.model.loss import UNEPTLoss
from unept.model.network import UNEPT
from unept.pictures.drawing import save_figure
from unept.presets.recipe import DEIT

from .counting import cost, counted, kept_for_backward
from .harness import DEVICE, device_name
from .heads import HeadLoss
from .models import CLASSES
from .table7 import VIT_LARGE, head


@dataclass
class Options:
    """Count Table 8 and draw cost against image area."""

    batch: int = 2
    """Images per step."""
    size: int = 480
    """Height and width of an image."""
    areas: tuple[int, ...] = (240, 360, 480, 600, 720, 960)
    """Heights and widths of the images in the plot."""
    plot: Path = Path("bench/results/table8.png")
    """Where the plot is written."""


@dataclass(frozen=True)
class Row:
    """A network of the table."""

    name: str
    build: Callable[[], nn.Module]
    fused: bool = True
    """Whether scaled_dot_product_attention is a fused kernel."""
    paper_gb: float | None = None


PAPER_GB = {"sparse_sampling": 7.0, "sparse_transformer": 18.6, "longformer": 11.3, "reformer": 15.5}


def ours(attention: str, backbone: str = "resnet50") -> Callable[[], nn.Module]:
    """Our network with this attention."""
    return partial(UNEPT, CLASSES, backbone, attention=attention)


ATTENTION_ROWS = (
    *(Row(name, ours(name), paper_gb=PAPER_GB.get(name)) for name in ATTENTIONS),
    Row("full, plain", ours("full"), fused=False),
)
OTHER_ROWS = (
    Row("sparse_sampling, DeiT-B", ours("sparse_sampling", DEIT), paper_gb=8.5),
    Row("CCNet", head("CCNet", "resnet50"), paper_gb=9.8),
    Row("ANL", head("ANL", "resnet50"), paper_gb=2.0),
    Row("SETR PUP, ViT-L/16", head("SETR PUP", VIT_LARGE), paper_gb=30.0),
)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, amp: bool) -> Tensor:
    """The scalar that a training step differentiates, as `Trainer` computes it."""
    loss = UNEPTLoss() if isinstance(model, UNEPT) else HeadLoss()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        output = model(images)
    return loss.losses(output, loss.targets(labels, boundaries=bool(model.refines)))["loss"]


def kept(row: Row, batch: int, size: int, amp: bool = False) -> int:
    """Bytes kept for the backward pass of one step, counted."""
    with counted(row.build, fused=row.fused) as model:
        images, labels = torch.zeros(batch, 3, size, size), torch.zeros(batch, size, size, dtype=torch.long)
        return kept_for_backward(model.train(), lambda: loss_of(model, images, labels, amp))


def measured_peak(row: Row, batch: int, size: int) -> int | None:
    """Peak bytes of the second of two float32 steps on a GPU, without an optimiser; None on a CPU."""
    if DEVICE != "cuda" or not row.fused:
        return None
    model = row.build().to(DEVICE).train()
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    labels = torch.randint(0, CLASSES, (batch, size, size), device=DEVICE)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss_of(model, images, labels, amp=False).backward()
    peak = torch.cuda.max_memory_allocated()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def table(rows: tuple[Row, ...], batch: int, size: int) -> str:
    """Markdown; multiplications are those of one image."""
    lines = [
        f"| batch {batch}, {size}x{size} | kept GB, float32 | bfloat16 | peak GB measured | paper GB "
        "| GMACs of layers | of attention's products |",
        "|---|" + "---:|" * 6,
    ]
    for row in rows:
        memory = [kept(row, batch, size, amp) / 1e9 for amp in (False, True)]
        peak = measured_peak(row, batch, size)
        found = cost(row.build, (size, size))
        cells = [*(f"{gigabytes:.2f}" for gigabytes in memory), "" if peak is None else f"{peak / 1e9:.2f}"]
        cells += ["" if row.paper_gb is None else f"{row.paper_gb:g}"]
        cells += [f"{found.layer_macs / 1e9:.1f}", f"{found.product_macs / 1e9:.1f}"]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth(sizes: tuple[int, ...], batch: int) -> dict[str, list[tuple[float, float]]]:
    """For each attention (GB kept in float32, GMACs of one image) at each size."""
    return {
        row.name: [
            (kept(row, batch, n) / 1e9, (lambda c: c.layer_macs + c.product_macs)(cost(row.build, (n, n))) / 1e9)
            for n in sizes
        ]
        for row in ATTENTION_ROWS
    }


def growth_table(found: dict[str, list[tuple[float, float]]], sizes: tuple[int, ...]) -> str:
    """Markdown: GB kept and GMACs of each size."""
    lines = ["| GB kept; GMACs | " + " | ".join(f"{n}x{n}" for n in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    lines += [
        f"| {name} | {' | '.join(f'{gb:.1f}; {gmacs:.0f}' for gb, gmacs in row)} |" for name, row in found.items()
    ]
    return "\n".join(lines)


def draw(found: dict[str, list[tuple[float, float]]], sizes: tuple[int, ...], batch: int, file: Path) -> None:
    """Memory and multiplications against image area, a line for each attention."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    titles = (f"kept for the backward pass, batch {batch}, float32 (GB)", "multiplications per image (GMACs)")
    for column, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
        for name, row in found.items():
            # Two pairs coincide: a fused kernel changes no multiplication, and sampling keeps about what fusing does.
            style = "--" if "plain" in name else ":" if name == "full" else "-"
            axes.plot([n * n / 1e6 for n in sizes], [cell[column] for cell in row], style, marker="o", ms=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("image area (megapixels)")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, file, dpi=120)


def main() -> int:
    """Print the tables and write the plot."""
    options = tyro.cli(Options, prog="python -m bench.table8")
    where = f"measured on {device_name()}" if DEVICE == "cuda" else "no GPU here: nothing is measured"
    print(f"{where}\n\n{table(ATTENTION_ROWS + OTHER_ROWS, options.batch, options.size)}\n", flush=True)
    found = growth(options.areas, options.batch)
    print(growth_table(found, options.areas))
    draw(found, options.areas, options.batch, options.plot)
    print(f"\nPlot  {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
