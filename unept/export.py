"""`python -m unept.export RUN`: a trained network for other runtimes: ONNX, torch.export or AOTInductor.

What is exported is one view of a whole image at its own size (no scales, no mirroring, no windows), for batches and
images of any size, refinement included (`unept.model.exportable`). In it the operators of this project are replaced by
PyTorch's own, so that the file needs nothing of `unept`: it runs wherever the format does, but without the Triton
kernels.
"""

import contextlib
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from . import cli
from .files import create_folder, temporary_file
from .inference import InferenceOptions, resolve
from .model.boundary import StepDirection
from .model.exportable import WholeImage, explain_failure, export_program
from .validation import check_range

Format = Literal["onnx", "torch-export", "aoti"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".aoti.pt2"}
# The largest difference of logits, relative to the largest logit; the share of pixels whose ids differ, since rounding
# decides between equals.
TOLERANCE = {"logits": 1e-4, "ids": 1e-3}
REFINEMENT = ("refine", "refine_scale", "refine_steps", "refine_direction")
TIME_LIMIT = 10  # minutes that the export may take
# What is checked: B, the multiples of the smallest size that can be exported in H and W, and the pixels beyond these.
CHECKED = ((1, 2, 3, 1, 0), (2, 3, 2, -5, 7), (3, 2, 2, 0, 0))


@dataclass
class ExportConfig:
    """Export a trained model, and check the file against the model at three sizes of batch and image."""

    run: tyro.conf.Positional[Path]
    """Run folder that unept.train wrote, folder that save_pretrained wrote, or ORG/NAME of a repository on the Hugging
    Face hub."""
    format: Format = "onnx"
    """onnx: for ONNX Runtime and what else reads it. torch-export: a program for torch.export.load. aoti: machine code
    for this device (AOTInductor), for torch._inductor.aoti_load_package from Python or for C++."""
    output: Literal["ids", "logits"] = "ids"
    """ids: class ids, int64 (B, H, W). logits: float32 (B, K, H, W), whose argmax they are."""
    refine: tyro.conf.DisallowNone[bool | None] = None
    """Refine at boundaries (Sec. 3.2). None: as the run was validated, else yes."""
    refine_scale: int | None = None
    """Length of a step in pixels. None: as the run was validated, else 1."""
    refine_steps: int | None = None
    """Number of steps, each from where the one before ended. None: as the run was validated, else 1."""
    refine_direction: StepDirection | None = None
    """best: in the most likely direction. mean: in the mean of all. None: as the run was validated, else best."""
    size: tuple[int, int] | None = None
    """Height and width, if all images have the same: for a backbone that can't be exported for any size, or a runtime
    that wants one. None: any."""
    out: Path | None = None
    """The file, which ends in .onnx or .pt2 as its format. None: model.onnx, model.pt2 or model.aoti.pt2 in the run
    folder, or here if the model is of the hub."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""

    def __post_init__(self) -> None:
        for side in self.size or ():
            check_range("size", side, 1, 1 << 16)
        ending = ".onnx" if self.format == "onnx" else ".pt2"  # what reads .pt2 asks for it
        if self.out is not None and self.out.suffix != ending:
            raise ValueError(f"out is {self.out}; give a file whose name ends in {ending}, such as model{ending}")


# --- the formats ------------------------------------------------------------------------------------------------------


def write(program: torch.export.ExportedProgram, format: Format, path: Path) -> None:
    """Write a program as a file.

    Raises:
        ValueError: a package is missing, and the message gives the command that installs it; or the format has no
            counterpart of what the network does, and the message gives the reason.
        OSError: the disk is full or not writable; the file that was there before, if any, is intact.
    """
    create_folder(path.parent)
    with temporary_file(path) as temporary:
        _write(program, format, temporary)


def _write(program: torch.export.ExportedProgram, format: Format, path: Path) -> None:
    if format == "torch-export":
        with explain_failure("saved; --size H W or --format onnx may do"):
            torch.export.save(program, path)
    elif format == "aoti":
        with torch.no_grad(), explain_failure("compiled by AOTInductor"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        _require("onnx", "onnxscript")
        with torch.no_grad(), explain_failure("exported to ONNX; --format torch-export may do"):
            names = {"input_names": ["images"], "output_names": ["prediction"]}
            torch.onnx.export(program, (), str(path), **names, external_data=False, verbose=False)


def load(format: Format, path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load a file that `write` wrote, as a function of images (B, C, H, W), uint8, that gives the prediction.

    Args:
        format: the format in which it was written.
        path: the file.
        device: where the images are and the prediction is to be.

    Raises:
        ValueError: a package is missing; the message gives the command that installs it.
    """
    if format == "torch-export":
        return torch.export.load(path).module()
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0]).to(device)


def check(network: WholeImage, function: Callable[[Tensor], Tensor], size: tuple[int, int] | None = None) -> float:
    """Compare an exported function with its network on noise, at three sizes of batch and image.

    Args:
        network: what was exported.
        function: what `load` returned.
        size: (H, W) of all images; None means any.

    Returns:
        The largest difference of logits, relative to the largest logit, or the share of pixels whose ids differ.

    Raises:
        ValueError: the difference is over TOLERANCE, or shapes or dtypes differ.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    divisor, device = network.model.divisor, network.model.mean.device
    for batch, rows, columns, *more in CHECKED:
        height, width = size or (divisor * rows + more[0], divisor * columns + more[1])
        shape = (batch, network.model.in_chans, height, width)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        with torch.no_grad():
            wanted, found = network(images), function(images)
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ValueError(
                f"the exported file gives {found.dtype} {tuple(found.shape)} for {'x'.join(map(str, shape))}, not "
                f"{wanted.dtype} {tuple(wanted.shape)}"
            )
        if network.output == "ids":
            difference = float((found != wanted).double().mean())
        else:
            difference = float((found - wanted).abs().max() / wanted.abs().max())
        if not difference <= TOLERANCE[network.output]:  # so that NaN fails
            raise ValueError(f"the exported file differs from the model by {difference:.2g}: do not use it, report it")
        worst = max(worst, difference)
    return worst


def _require(*packages: str) -> None:
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise ValueError(f"this format needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


# --- the command ------------------------------------------------------------------------------------------------------


def export(options: ExportConfig) -> None:
    """Export, check and say where the file is.

    Raises:
        FileNotFoundError, ValueError: see `unept.cli.load`, `export_program`, `write` and `check`.
    """
    if options.format == "onnx":
        _require("onnx", "onnxscript")  # before minutes of work
    device = cli.choose_device(options.device)
    model = cli.load(options.run, device)
    chosen = {name: getattr(options, name) for name in REFINEMENT}
    config = resolve(InferenceOptions(**chosen), model)
    network = WholeImage(model, options.output, config.refinement).eval()
    folder = options.run if options.run.is_dir() else Path()
    path = options.out or folder / f"model{SUFFIX[options.format]}"
    with time_limit(TIME_LIMIT):
        program = export_program(network, options.size)
    write(program, options.format, path)
    cli.say(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    sizes = f"with H and W over {model.divisor}" if options.size is None else "of {} x {}".format(*options.size)
    channels = "3, H, W), RGB" if model.in_chans == 3 else f"{model.in_chans}, H, W)"
    cli.say(f"takes images, uint8 (B, {channels}, {sizes}; gives {_described(network)}")
    left_out = [f"{name} {value}" for name in ("short_side", "long_side", "window") if (value := getattr(config, name))]
    if left_out:
        cli.say(f"not in it, though the model was validated so: {', '.join(left_out)}")
    if options.format == "onnx" and not is_installed("onnxruntime"):
        cli.say("not checked: pip install onnxruntime", sys.stderr)
        return
    worst = check(network, load(options.format, path, device), options.size)
    kind = "of the pixels differ" if options.output == "ids" else "of the largest logit"
    cli.say(f"checked against the model at {len(CHECKED)} sizes: {worst:.1e} {kind}")


@contextlib.contextmanager
def time_limit(minutes: int) -> Iterator[None]:
    """Raise a TimeoutError in what takes longer: sizes that depend on sizes can keep the exporter busy for ever."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {minutes} minutes")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, 60 * minutes), 5)  # again, if somebody catches it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _described(network: WholeImage) -> str:
    refined = "not refined"
    if (refinement := network.refinement) is not None:
        steps = f"{refinement.steps} times " if refinement.steps > 1 else ""
        at_most = "up to " if refinement.direction == "mean" else ""
        refined = f"refined {steps}by {at_most}{refinement.scale} px"
    classes = network.model.num_classes
    kind = "class ids, int64 (B, H, W)" if network.output == "ids" else f"logits, float32 (B, {classes}, H, W)"
    return f"{kind}, {refined}"


def main() -> None:
    """The command line."""
    cli.run(lambda: export(tyro.cli(ExportConfig, prog="python -m unept.export")))


if __name__ == "__main__":
    main()
