"""What a training step on a CPU spends its time on: `python -m bench.training_step`.

Takes steps of `unept_tiny` with the heads of the preset `camvid`, by default on 8 crops of 256x320 in bfloat16, and
prints the processor seconds of each part of the fastest step, then of the most expensive operators by PyTorch's
profiler. Processor time of one thread is what two runs on a shared machine can be compared by.
"""

import time
from dataclasses import dataclass

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

import unept
from unept.model.loss import UNEPTLoss
from unept.training.depthwise import prepare_for_cpu_bfloat16


@dataclass
class Options:
    """Measure training steps on one thread of a CPU."""

    batch: int = 8
    """Images per step."""
    size: tuple[int, int] = (256, 320)
    """Height and width of the images."""
    steps: int = 5
    """Steps to take; the first one is not counted."""
    bfloat16: bool = True
    """Whether to compute in bfloat16, as --amp auto does where the CPU multiplies in it."""
    logits_stride: int = 2
    """Image pixels per pixel of the logits: 2 as in the preset camvid, or 8."""
    operators: int = 15
    """Number of operators to list; 0 lists none."""


class Step:
    """A training step of `unept_tiny` on images of noise whose labels are a chessboard of 16 pixels."""

    def __init__(self, options: Options):
        torch.manual_seed(0)
        self.amp = options.bfloat16
        self.model = unept.create_model("unept_tiny", num_classes=11, dropout=0.0, logits_stride=options.logits_stride)
        self.model.train()
        if self.amp:
            prepare_for_cpu_bfloat16(self.model)
        self.loss = UNEPTLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        height, width = options.size
        self.images = torch.randint(0, 256, (options.batch, 3, height, width), dtype=torch.uint8)
        rows, columns = torch.arange(height)[:, None] // 16, torch.arange(width) // 16
        self.labels = ((rows + columns) % 11).expand(options.batch, -1, -1)

    def run(self) -> dict[str, float]:
        """Take a step.

        Returns:
            Processor seconds of each part.
        """
        times = [time.process_time()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            output = self.model(self.images)
        times.append(time.process_time())
        loss = self.loss(output, self.labels)["loss"]
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.process_time())
        parts = ("forward", "losses", "backward", "optimizer")
        return {part: end - start for part, start, end in zip(parts, times[:-1], times[1:], strict=True)}


def main() -> None:
    """Print the table of parts and that of operators."""
    options = tyro.cli(Options, prog="python -m bench.training_step")
    torch.set_num_threads(1)
    step = Step(options)
    step.run()
    fastest = min((step.run() for _ in range(max(options.steps - 1, 1))), key=lambda parts: sum(parts.values()))
    for part, seconds in {**fastest, "step": sum(fastest.values())}.items():
        print(f"{part:10} {seconds:.2f} s")
    if options.operators:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step.run()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=options.operators))


if __name__ == "__main__":
    main()
