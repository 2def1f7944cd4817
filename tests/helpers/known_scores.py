"""A data set and a model whose scores are known from counting columns."""

import torch
from torch import Tensor
from torchvision import tv_tensors

from tests.helpers.models import StandIn
from unept.data import SegmentationDataset
from unept.model.output import UNEPTOutput


class Halves(SegmentationDataset):
    """Left of x = 16 lies class 0, right of it class 1; the first column is ignored; class 2 never occurs."""

    classes = ("left", "right", "nowhere")
    palette = ((255, 0, 0), (0, 255, 0), (0, 0, 255))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        mask = torch.zeros(16, 32, dtype=torch.uint8)
        mask[:, 16:] = 1
        mask[:, 0] = 255
        return tv_tensors.Image(torch.full((3, 16, 32), i, dtype=torch.uint8)), tv_tensors.Mask(mask)

    def name(self, i: int) -> str:
        return f"half{i}"


class Unlike(Halves):
    """The edge lies at x = 17, 20 and 29: any two of the images score other than all three."""

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = super().__getitem__(i)
        mask[:, 16 : 17 + 3 * i * i] = 0
        return image, mask


class Shifted(StandIn):
    """Predicts the edge at x = 20 and that all is boundary, whose refinement reads 1 pixel to the left."""

    def __init__(self):
        super().__init__(Halves.classes)
        self.calls = 0

    def forward(self, images: Tensor) -> UNEPTOutput:
        self.calls += 1
        logits = torch.full((1, 3, 2, 4), -100.0)
        logits[:, 0] = torch.tensor([1.0, 1.0, 0.0, -1.0])  # 0 is passed at x = 20, the centre of the third column
        logits[:, 1] = -logits[:, 0]
        direction = torch.zeros(1, 8, 2, 4)
        direction[:, 0] = 1  # (-1, 0)
        return UNEPTOutput(logits, torch.full((1, 1, 2, 4), 5.0), direction)
