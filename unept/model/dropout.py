"""Dropout whose random numbers a CPU draws four at a time."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, which on a CPU draws a number of 53 bits for each element, most of the time that it takes.

    Here each element has 16 bits of a word of 64, from PyTorch's generator likewise. The probability is p rounded to a
    multiple of 1/65536, and what is kept is scaled by the rounded one, so that the mean stays. On other devices, and
    under `torch.compile`, it is PyTorch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zero elements of a tensor of any shape in training, and scale the others."""
        if not (self.training and input.device.type == "cpu" and 0 < self.p < 1) or torch.compiler.is_compiling():
            return super().forward(input)
        count, dropped = input.numel(), min(round(self.p * 65536), 65535)
        words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
        numbers = words.view(torch.int16)[:count].view(input.shape)
        return input * (numbers >= dropped - 32768).to(input.dtype).mul_(65536 / (65536 - dropped))
