"""The named sizes side by side: `python -m bench.named_sizes` prints parameters, multiplications and images per second.

Speed is the rate at which a network with random weights turns images of CamVid's size into refined class ids, one at a
time, in float32 and in bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

import unept
from unept.inference import InferenceConfig, predict_ids

from .counting import cost
from .harness import DEVICE, device_name, seconds_in_turn


@dataclass
class Options:
    """Count and time named sizes."""

    names: tyro.conf.Positional[tuple[str, ...]] = ("unept_tiny", "unept_small", "unept_lite0", "unept_resnet50")
    """Names that unept.create_model takes."""
    size: tuple[int, int] = (360, 480)
    """Height and width of the images that are timed."""
    classes: int = 11
    """Number of classes of the networks that are timed."""
    rounds: int = 10
    """Predictions of each network; one more, before, is not counted."""
    threads: int | None = None
    """Threads of PyTorch on a CPU. None: its default."""


def count(name: str) -> tuple[float, float]:
    """Return the parameters in millions and the GMACs of a named size, at 480x480 with 150 classes."""
    counted = cost(lambda: unept.create_model(name, num_classes=150), (480, 480))
    return counted.parameters / 1e6, counted.layer_macs / 1e9


def predictor(name: str, amp: str, options: Options) -> Callable[[], None]:
    """Return a function that predicts one image, and waits for the result."""
    torch.manual_seed(0)
    model = unept.create_model(name, num_classes=options.classes).to(DEVICE).eval()
    image = torch.randint(0, 256, (1, 3, *options.size), dtype=torch.uint8, device=DEVICE)
    config = InferenceConfig(amp=amp)

    def predict() -> None:
        predict_ids(model, image, config).sum().item()

    return predict


def main() -> None:
    """Print a table in Markdown."""
    options = tyro.cli(Options, prog="python -m bench.named_sizes")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keys = [(name, amp) for name in options.names for amp in ("off", "bf16")]
    seconds = seconds_in_turn({key: predictor(*key, options) for key in keys}, options.rounds)
    height, width = options.size
    print(f"{device_name()}; images of {height}x{width}, {options.classes} classes\n")
    print("| name | M parameters | GMACs | images/s, float32 | bfloat16 |")
    print("|---|---:|---:|---:|---:|")
    for name in options.names:
        parameters, gmacs = count(name)
        rates = [1 / seconds[name, amp] for amp in ("off", "bf16")]
        print(f"| `{name}` | {parameters:.1f} | {gmacs:.1f} | {rates[0]:.1f} | {rates[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
