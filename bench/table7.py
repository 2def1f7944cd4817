"""Table 7: parameters and multiplications of the networks, by one counter: `python -m bench.table7`.

Built without weights (`bench.counting`), 150 classes, 480x480. The paper counts multiplications and calls them FLOPs.
Its numbers come from MMSegmentation or from re-implementations; networks of which it does not name the backbone are on
the one that its mIoU belongs to.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from unept.model.network import UNEPT
from unept.presets.recipe import DEIT

from .counting import Cost, cost
from .harness import Unavailable
from .heads import HEADS, HeadNetwork, build_network
from .models import CLASSES
from .smp import create

SIZE = (480, 480)
VIT_LARGE = "vit_large_patch16_384"
NAMES, PALETTE = [f"class {k}" for k in range(CLASSES)], [(0, 0, 0)] * CLASSES


class HRNet(nn.Module):
    """HRNetV2's four maps, 1/4 to 1/32 of the image, without the layers that timm adds for classification."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str = "hrnet_w48"):
        super().__init__()
        options = {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4)}
        self.features = timm.create_model(name, **options)
        self.channels = self.features.feature_info.channels()
        self.strides = self.features.feature_info.reduction()

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to four maps, finest first."""
        return self.features(images)


@dataclass(frozen=True)
class Row:
    """A network of the table."""

    name: str
    backbone: str
    build: Callable[[], nn.Module]
    megaparameters: float | None = None
    """The paper's; None: the network is not in Table 7, but in another one."""
    gmacs: float | None = None


def head(name: str, backbone: str, **options: Any) -> Callable[[], nn.Module]:
    """A head of `bench.heads`, at the output stride of its paper."""
    stride = HEADS[name].output_stride if backbone.startswith("resnet") else None
    return lambda: build_network(name, NAMES, PALETTE, backbone, output_stride=stride, **options)


def smp(architecture: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of segmentation-models-pytorch on its ResNet-101."""
    return partial(create, architecture, "resnet101", CLASSES, **options)


ROWS = (
    Row("PSPNet (smp)", "ResNet-101", smp("PSPNet")),
    Row("DeepLabV3 (smp)", "ResNet-101", smp("DeepLabV3")),
    Row("UPerNet (smp)", "ResNet-101", smp("UPerNet", decoder_channels=512), 86, 226.2),
    Row("PSANet", "ResNet-101", head("PSANet", "resnet101"), 73, 239.5),
    Row("EncNet", "ResNet-101", head("EncNet", "resnet101"), 56, 192.2),
    Row("ANL", "ResNet-101", head("ANL", "resnet101")),
    Row("CCNet", "ResNet-101", head("CCNet", "resnet101"), 69, 244.6),
    Row("PointRend", "ResNet-101", head("PointRend", "resnet101"), 48, 526.5),
    Row("DNLNet", "ResNet-101", head("DNLNet", "resnet101"), 70, 244.1),
    Row("OCRNet", "HRNet-W48", lambda: HeadNetwork(HEADS["OCRNet"], NAMES, PALETTE, HRNet(), fuse=True), 71, 144.8),
    Row("OCRNet", "ResNet-101", head("OCRNet", "resnet101")),
    Row("SETR naive", "ViT-L/16", head("SETR naive", VIT_LARGE)),
    Row("SETR PUP, 256 channels", "ViT-L/16", head("SETR PUP", VIT_LARGE)),
    Row("SETR PUP, 1024 channels", "ViT-L/16", head("SETR PUP", VIT_LARGE, dim=1024), 401),
    Row("Ours", "ResNet-50", lambda: UNEPT(CLASSES, "resnet50")),
    Row("Ours", "DeiT-B", lambda: UNEPT(CLASSES, DEIT), 94, 99.1),
)


def measure(row: Row) -> Cost:
    """Build and count the network without weights."""
    return cost(row.build, SIZE)


def table(rows: tuple[Row, ...] = ROWS) -> str:
    """Markdown."""
    lines = [
        "| network | backbone | M parameters | paper | GMACs of layers | paper | GMACs of attention's products |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        try:
            found = measure(row)
        except Unavailable as error:
            lines.append(f"| {row.name} | {row.backbone} | {error} | | | | |")
            continue
        told = ["" if value is None else f"{value:g}" for value in (row.megaparameters, row.gmacs)]
        numbers = (found.parameters / 1e6, found.layer_macs / 1e9, found.product_macs / 1e9)
        parameters, layers, products = (f"{number:.1f}" for number in numbers)
        lines.append(f"| {row.name} | {row.backbone} | {parameters} | {told[0]} | {layers} | {told[1]} | {products} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
