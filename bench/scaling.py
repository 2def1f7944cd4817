"""What more GPUs would do to a training step, by arithmetic from what is measured here: `python -m bench.scaling`.

Measured: the bytes of gradients that every process sends, the layers of synchronised batch normalisation, and the time
of one process's step on this machine's device. Assumed, and settable: bandwidths and latencies between GPUs. A ring
all-reduce moves 2 (W - 1) / W of the gradients through each of W processes' links; DistributedDataParallel hides it
behind the backward, which is taken as 2/3 of the step. Batch normalisation (`unept.sync_batch_norm`) waits for one
collective a layer in each direction, of 2 C + 1 and 2 C numbers: that is not hidden, and the host does not wait for it.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from .harness import DEVICE, device_name
from .models import AMP, CLASSES, autocast, unept

BACKWARD = 2 / 3  # of a step
PROCESSES = (1, 8, 64)


@dataclass(frozen=True)
class Machine:
    """What connects the GPUs; assumptions, not measurements."""

    gpus: int = 8
    """In one machine."""
    link: float = 300e9
    """Bytes/s through each GPU within a machine (NVLink of an H100, as an all-reduce reaches it)."""
    network: float = 25e9
    """Bytes/s through each GPU between machines (a 200 Gbit/s card a GPU)."""
    latency: tuple[float, float] = (20e-6, 50e-6)
    """Seconds of a small collective within a machine and between machines."""


@dataclass(frozen=True)
class Step:
    """One process's training step."""

    images: int
    seconds: float
    gradient_bytes: int
    norms: int
    """Layers of batch normalisation."""


@dataclass(frozen=True)
class Scaled:
    """The same on W processes."""

    processes: int
    all_reduce: float
    """Seconds to send the gradients."""
    norms: float
    """Seconds to wait for batch normalisation."""
    seconds: float
    """Of a step."""
    efficiency: float
    """Share of the time that a process alone would need."""


def scaled(step: Step, processes: int, machine: Machine) -> Scaled:
    """A step of `processes` processes, each with a batch of its own."""
    one_machine = processes <= machine.gpus
    bandwidth = machine.link if one_machine else machine.network
    latency = 0.0 if processes == 1 else machine.latency[0 if one_machine else 1]
    all_reduce = 2 * (processes - 1) / processes * step.gradient_bytes / bandwidth
    norms = 2 * step.norms * latency
    seconds = step.seconds + norms + max(0.0, all_reduce - BACKWARD * step.seconds)
    return Scaled(processes, all_reduce, norms, seconds, step.seconds / seconds)


def measured(backbone: str, batch: int, size: int, rounds: int = 5) -> Step:
    """A training step of this machine's device: forward, loss, backward, AdamW."""
    network = unept(backbone)
    model = network.module.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = torch.compile(network.loss) if DEVICE == "cuda" else network.loss
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    labels = torch.randint(0, CLASSES, (batch, size, size), device=DEVICE)
    times = []
    for _ in range(rounds + 2):  # the first two compile and tune
        start = time.perf_counter()
        with autocast(AMP):
            value = loss(images, labels, AMP)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    sent = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return Step(batch, statistics.median(times[2:]), sent, norms)


def table(step: Step, machine: Machine) -> str:
    """Markdown: one row for each of `PROCESSES`."""
    lines = [
        "| GPUs | images a step | all-reduce | waiting in batch norm | step | efficiency | images/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for processes in PROCESSES:
        result = scaled(step, processes, machine)
        images = processes * step.images
        lines.append(
            f"| {processes} | {images} | {1e3 * result.all_reduce:.2f} ms | {1e3 * result.norms:.2f} ms "
            f"| {1e3 * result.seconds:.1f} ms | {result.efficiency:.0%} | {images / result.seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    cuda, assumed = DEVICE == "cuda", Machine()
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, default=16 if cuda else 2, help="images of one process")
    parser.add_argument("--size", type=int, default=480 if cuda else 128, help="height and width of an image")
    parser.add_argument("--seconds", type=float, help="of a step, measured elsewhere")
    parser.add_argument("--link", type=float, default=assumed.link / 1e9, help="GB/s of a GPU within a machine")
    parser.add_argument("--network", type=float, default=assumed.network / 1e9, help="GB/s of a GPU between machines")
    options = parser.parse_args()
    step = measured(options.backbone, options.batch, options.size)
    where = f"measured on {device_name()}"
    if options.seconds is not None:
        step, where = Step(options.batch, options.seconds, step.gradient_bytes, step.norms), "given"
    machine = Machine(link=options.link * 1e9, network=options.network * 1e9)
    print(
        f"{options.backbone}, {options.batch}x3x{options.size}x{options.size}: step {1e3 * step.seconds:.1f} ms, "
        f"{where}; gradients {step.gradient_bytes / 1e6:.0f} MB, {step.norms} layers of batch normalisation.\n"
        f"Assumed: {options.link:g} GB/s within a machine of {machine.gpus}, {options.network:g} GB/s between, "
        f"{1e6 * machine.latency[0]:.0f} and {1e6 * machine.latency[1]:.0f} us a small collective.\n"
    )
    print(table(step, machine))
    print(
        "\nThe all-reduce is hidden while it takes less than the backward: for this model from a step of "
        + " and ".join(
            f"{1e3 * scaled(step, n, machine).all_reduce / BACKWARD:.2f} ms on {n} GPUs" for n in PROCESSES[1:]
        )
        + "."
    )


if __name__ == "__main__":
    main()
