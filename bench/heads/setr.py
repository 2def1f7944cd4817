"""SETR: a ViT and a simple decoder (Zheng et al. 2021)."""

from collections.abc import Sequence

from torch import Tensor, nn

from unept.model.spatial import conv_bn_relu

from .base import Head, HeadOutput


def decode(decoders: nn.ModuleList, features: list[Tensor], training: bool) -> HeadOutput:
    """The last block's logits; in training those of the earlier blocks as well."""
    first = 0 if training else len(features) - 1
    *earlier, last = (decoder(x) for decoder, x in zip(list(decoders)[first:], features[first:], strict=True))
    return HeadOutput(last, auxiliary=tuple(earlier))


class SETRNaiveHead(Head):
    """Two 1x1 convolutions on the last block's tokens; three earlier blocks are supervised in the same way."""

    num_levels = 4
    output_stride = 16

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 256):
        super().__init__(channels, num_classes)
        self.decoders = nn.ModuleList(
            nn.Sequential(conv_bn_relu(c, dim, 1), nn.Conv2d(dim, num_classes, 1)) for c in channels
        )

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`; logits have the tokens' resolution, 1/16."""
        return decode(self.decoders, features, self.training)


class SETRProgressiveHead(Head):
    """Progressive up-sampling (PUP): four times a 3x3 convolution and bilinear up-sampling by 2.

    Logits are given before the last up-sampling, with which the classifier, a 1x1 convolution, commutes: at 1/2 of the
    image for tokens at 1/16. The three earlier blocks have a decoder of two steps each.

    Args:
        channels, num_classes: see `Head`.
        dim: channels of the convolutions, which the paper does not state. 256 gives the parameters of SETR's own table
            (318.31 M with ViT-L), the width of ViT-L, 1024, the 401 M of UN-EPT's Table 7.
    """

    num_levels = 4
    output_stride = 16

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 256):
        super().__init__(channels, num_classes)
        steps = [2] * (len(channels) - 1) + [4]
        self.decoders = nn.ModuleList(
            self._decoder(c, dim, num_classes, n) for c, n in zip(channels, steps, strict=True)
        )

    @staticmethod
    def _decoder(in_channels: int, dim: int, num_classes: int, steps: int) -> nn.Sequential:
        layers: list[nn.Module] = [conv_bn_relu(in_channels, dim, 3)]
        for _ in range(steps - 1):
            layers += [
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                conv_bn_relu(dim, dim, 3),
            ]
        return nn.Sequential(*layers, nn.Conv2d(dim, num_classes, 1))

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`."""
        return decode(self.decoders, features, self.training)
