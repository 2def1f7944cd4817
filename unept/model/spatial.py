"""The spatial branch, which makes the context queries (Sec. 3.2), and the learned queries of the baseline."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias and with "same" padding, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class SpatialBranch(nn.Sequential):
    """Three 3x3 convolutions of stride 2: images (B, C, H, W) to image details (B, d_model, H / 8, W / 8).

    The paper gives no widths. At 480x480 and d_model 256, (32, 256) cost 3.24 GMACs and 0.67 M parameters; (64, 128),
    as in the released code, cost 2.22 GMACs and 0.37 M. With the former, DeiT's network has the 99.1 GMACs of Table 7.
    In small, on CamVid, the two segment equally well (`bench/results/README.md`).

    Args:
        d_model: channels of the result.
        in_chans: channels of the images, C.
        widths: channels of the first two convolutions; None means (32, d_model).
        last_relu: whether a ReLU follows the last batch normalisation, as in the paper; the released code has none.
    """

    def __init__(
        self, d_model: int = 256, in_chans: int = 3, widths: Sequence[int] | None = None, last_relu: bool = True
    ):
        channels = (in_chans, *(widths or (32, d_model)), d_model)
        if len(channels) != 4:
            raise ValueError(f"widths are {widths}; give the channels of the first two of the three convolutions")
        super().__init__(*(conv_bn_relu(channels[i], channels[i + 1], 3, stride=2) for i in range(3)))
        if not last_relu:
            del self[2][2]


class LearnedQueries(nn.Module):
    """The same context queries for every image, interpolated to its size (Table 5, baseline).

    Args:
        d_model: channels of the queries.
        size: (h, w) of the table; by default that of a 480x480 image at 1/8.
    """

    def __init__(self, d_model: int = 256, size: tuple[int, int] = (60, 60)):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, d_model, *size) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Queries (B, d_model, H / 8, W / 8) for images (B, 3, H, W), of which only the size counts."""
        size = (images.shape[2] // 8, images.shape[3] // 8)
        table = F.interpolate(self.table, size, mode="bilinear", align_corners=False)
        return table.expand(images.shape[0], -1, -1, -1)
