"""OCRNet: object-contextual representations (Yuan et al. 2020)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unept.model.spatial import conv_bn_relu

from ..compared import resize
from .base import AuxiliaryClassifier, Head, HeadOutput


class ObjectContext(nn.Module):
    """Gather one vector per class, let each pixel attend to these K vectors, and mix both.

        f_k = sum_i softmax_i(m_ki) x_i                       object regions (m: soft segmentation)
        w_ik = softmax_k(phi(x_i)^T psi(f_k))                 relation of pixel and region
        z_i = g([rho(sum_k w_ik delta(f_k)); x_i])            augmented pixel

    Args:
        dim: channels of x and z.
        hidden: of phi, psi and delta.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.phi, self.psi, self.delta = (conv_bn_relu(dim, hidden, 1) for _ in range(3))
        self.rho = conv_bn_relu(hidden, dim, 1)
        self.g = nn.Sequential(conv_bn_relu(2 * dim, dim, 1), nn.Dropout2d(0.05))

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        """(B, dim, H, W) and soft segmentation (B, K, H, W), logits, to (B, dim, H, W)."""
        share = regions.flatten(2).softmax(dim=-1)  # (B, K, HW), over the pixels
        objects = torch.einsum("bki,bci->bck", share, x.flatten(2))[..., None]  # (B, dim, K, 1)
        q, k, v = self.phi(x).flatten(2), self.psi(objects)[..., 0], self.delta(objects)[..., 0]
        relation = (torch.einsum("bci,bck->bik", q, k) * q.shape[1] ** -0.5).softmax(dim=-1)
        context = torch.einsum("bik,bck->bci", relation, v).unflatten(2, x.shape[2:])
        return self.g(torch.cat([self.rho(context), x], dim=1))


class OCRNetHead(Head):
    """Soft segmentation from C4, object context on C5.

    With one feature map only, such as HRNet's four levels concatenated (`HeadNetwork(fuse=True)`), both take that one,
    and the soft segmentation is made by 1x1 convolutions, as in the paper.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, dim: int = 512, hidden: int = 256):
        super().__init__(channels, num_classes)
        if len(channels) > 1:
            self.auxiliary: nn.Sequential = AuxiliaryClassifier(channels[-2], num_classes)
        else:
            self.auxiliary = nn.Sequential(
                conv_bn_relu(channels[0], channels[0], 1), nn.Conv2d(channels[0], num_classes, 1)
            )
        self.reduce = conv_bn_relu(channels[-1], dim, 3)
        self.context = ObjectContext(dim, hidden)
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, features: list[Tensor]) -> HeadOutput:
        """See `Head`."""
        x = self.reduce(features[-1])
        regions = self.auxiliary(features[max(len(features) - 2, 0)])
        logits = self.classifier(self.context(x, resize(regions, x.shape[2:])))
        return HeadOutput(logits, auxiliary=(regions,) if self.training else ())
