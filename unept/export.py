"""`python -m unept.export RUN`: a trained network for other runtimes: ONNX, torch.export or AOTInductor.

What is exported is one view of a whole image at its own size (no scales, no mirroring, no windows), for batches and
images of any size, refinement included. In it the operators of this project are replaced by PyTorch's own (bilinear
`grid_sample`, `interpolate`), so that the file needs nothing of `unept`: it runs wherever the format does, but without
the Triton kernels.
"""

import contextlib
import copy
import functools
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from timm.layers import Conv2dSame
from torch import Tensor, nn

from . import cli
from .inference import InferenceOptions, resolve
from .model.boundary import ONE_STEP, Refinement, read_at_offset
from .model.network import UNEPT
from .model.output import STRIDE, UNEPTOutput, class_ids, read_offset

Format = Literal["onnx", "torch-export", "aoti"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".aoti.pt2"}
# Of the logits, relative to the largest; of class ids, the share of pixels, since rounding decides between equals.
TOLERANCE = {"logits": 1e-4, "ids": 1e-3}
MINUTES = 10  # that the export may take
# Of the checks: (B, H, W) in multiples of the smallest size that can be exported, and pixels more.
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
    size: tuple[int, int] | None = None
    """Height and width, if all images have the same: for a backbone that can't be exported for any size, or a runtime
    that wants one. None: any."""
    out: Path | None = None
    """The file. None: model.onnx, model.pt2 or model.aoti.pt2 in the run folder, or here if the model is of the hub."""
    device: cli.Device = "auto"
    """auto: CUDA where there is a device."""


# --- what is exported -------------------------------------------------------------------------------------------------


class WholeImage(nn.Module):
    """A model from an image of any size to its prediction, without a branch that depends on the size.

    Args:
        model: in evaluation mode.
        output: `"ids"` or `"logits"`.
        refinement: how boundary pixels are refined; None does not refine.
    """

    def __init__(self, model: UNEPT, output: str = "ids", refinement: Refinement | None = ONE_STEP):
        super().__init__()
        self.model, self.output, self.refinement = model, output, refinement

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W), RGB, to ids (B, H, W) or logits (B, K, H, W)."""
        height, width = images.shape[2:]
        divisor = self.model.divisor
        padded = self.model.normalized(images)
        padded = _padded(padded, 2, (height + divisor - 1) // divisor * divisor)
        padded = _padded(padded, 3, (width + divisor - 1) // divisor * divisor)
        h, w = ((size + STRIDE - 1) // STRIDE for size in (height, width))
        size = (STRIDE * h, STRIDE * w)
        logits, boundary, direction, logits_stride = self.model(padded)
        finer = STRIDE // logits_stride
        logits = _cropped(logits, finer * h, finer * w)
        if boundary is not None and direction is not None:
            finer = STRIDE // self.model.boundary_stride
            boundary, direction = (_cropped(m, finer * h, finer * w) for m in (boundary, direction))
        output = UNEPTOutput(logits, boundary, direction, logits_stride)
        if self.output == "ids":
            return _cropped(class_ids(output, size, self.refinement), height, width)
        logits = F.interpolate(output.logits.float(), size, mode="bilinear", align_corners=False)
        offset = read_offset(output, size, self.refinement)
        return _cropped(logits if offset is None else read_at_offset(logits, offset), height, width)


def _padded(images: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind the end of an axis, up to `size`. `F.pad` would tell "nothing to pad" apart."""
    index = torch.arange(size, device=images.device)
    inside = (index < images.shape[axis]).view([-1 if a == axis else 1 for a in range(images.dim())])
    return images.index_select(axis, index.clamp(max=images.shape[axis] - 1)) * inside


def _cropped(maps: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of the last two axes, contiguous whether that is all of them or not."""
    rows, columns = (torch.arange(size, device=maps.device) for size in (height, width))
    return maps.index_select(-2, rows).index_select(-1, columns)


# --- the operators in PyTorch's own -----------------------------------------------------------------------------------


def _sparse_sampling(
    value: Tensor, shapes: Sequence[int], points: Tensor, scores: Tensor, reference: Tensor | None
) -> Tensor:
    """`unept::sparse_sampling`; see `unept.kernels.sparse_attention` for the letters."""
    batch, queries, heads, num_levels, num_points = points.shape[:5]
    # Heads first, as the network computes them: of another order the exporter would ask how it lies in memory.
    points, scores = points.permute(2, 0, 1, 3, 4, 5).float(), scores.permute(2, 0, 1, 3, 4)
    if reference is not None:
        scores = scores.flatten(3).softmax(-1).unflatten(-1, (num_levels, num_points))
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    maps = value.float().permute(2, 0, 3, 1).split([height * width for height, width in pairs], dim=3)
    out: Any = 0
    for level, (height, width) in enumerate(pairs):
        image = maps[level].reshape(heads * batch, -1, height, width)
        locations = points[:, :, :, level]  # (M, B, Q, N, 2)
        if reference is not None:
            offsets = torch.stack([locations[..., 0] / width, locations[..., 1] / height], dim=-1)
            locations = reference[None, :, :, None] + offsets
        grid = (2 * locations - 1).reshape(heads * batch, queries, num_points, 2)
        samples = F.grid_sample(image, grid, align_corners=False)  # (M * B, D, Q, N)
        shares = scores[:, :, :, level].reshape(heads * batch, 1, queries, num_points)
        out = out + (samples * shares).sum(-1)
    out = out.reshape(heads, batch, -1, queries).permute(1, 3, 0, 2).reshape(batch, queries, -1)
    return out.to(value.dtype)


def _upsample_argmax(logits: Tensor, height: int, width: int, offset: Tensor | None) -> Tensor:
    """`unept::upsample_argmax`, for offsets in whole pixels."""
    ids = F.interpolate(logits.float(), (height, width), mode="bilinear", align_corners=False).argmax(1)
    return ids if offset is None else read_at_offset(ids[:, None], offset)[:, 0]


DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.unept.sparse_sampling.default: _sparse_sampling,
    torch.ops.unept.upsample_argmax.default: _upsample_argmax,
}


# --- the formats ------------------------------------------------------------------------------------------------------


def export_program(network: WholeImage, size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """The program of a network, of batches of any size, in PyTorch's own operators.

    Args:
        network: what to export.
        size: (H, W) of all images; None: any.

    Raises:
        ValueError: the network can't be exported; the message has the reason.
    """
    divisor = network.model.divisor
    network = _with_fixed_padding(network)
    # No side is a multiple of the divisor, none is as long as another: nothing is taken for a constant.
    height, width = size or (2 * divisor + 6, 3 * divisor - 6)
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8, device=network.model.mean.device)
    axes = dict.fromkeys((0,) if size else (0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad(), _reasons("exported" if size else "exported for any size; --size H W is simpler"):
        program = torch.export.export(network, (images,), dynamic_shapes=(axes,))
        return program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS})


def _with_fixed_padding(network: WholeImage) -> WholeImage:
    """A copy whose convolutions with "same" padding, which depends on the size, have the padding of all sizes that they
    are given: multiples of their stride, since the padded image is one of the largest."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, Conv2dSame):
            reach = zip(module.kernel_size, module.dilation, module.stride, strict=True)
            totals = [max(0, (size - 1) * dilation + 1 - stride) for size, dilation, stride in reach]
            sides = [(total // 2, total - total // 2) for total in reversed(totals)]  # the last axis first
            fixed = functools.partial(_fixed_convolution, module, sides[0] + sides[1])
            module.forward = fixed  # type: ignore[method-assign]
    return network


def _fixed_convolution(module: Conv2dSame, padding: tuple[int, ...], x: Tensor) -> Tensor:
    stride, dilation, groups = module.stride, module.dilation, module.groups
    return F.conv2d(F.pad(x, padding), module.weight, module.bias, stride, 0, dilation, groups)


def write(program: torch.export.ExportedProgram, format: Format, path: Path) -> None:
    """Write a program as a file.

    Raises:
        ValueError: a package is missing, and the message has the command that installs it; or the format has no
            counterpart of what the network does, and it has the reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "torch-export":
        torch.export.save(program, path)
    elif format == "aoti":
        with torch.no_grad(), _reasons("compiled by AOTInductor"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        _require("onnx", "onnxscript")
        with torch.no_grad(), _reasons("exported to ONNX; --format torch-export may do"):
            names = {"input_names": ["images"], "output_names": ["prediction"]}
            torch.onnx.export(program, (), str(path), **names, external_data=False, verbose=False)


def load(format: Format, path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function of a file that `write` wrote: images uint8 (B, 3, H, W) to the prediction, on the images' device.

    Raises:
        ValueError: a package is missing; the message has the command to install it.
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
        function: see `load`.
        size: (H, W) of all images, where there is only one.

    Returns:
        The largest difference: of logits relative to the largest logit, of ids the share of pixels that differ.

    Raises:
        ValueError: it is over TOLERANCE, or shapes or dtypes differ.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    divisor, device = network.model.divisor, network.model.mean.device
    for batch, rows, columns, *more in CHECKED:
        height, width = size or (divisor * rows + more[0], divisor * columns + more[1])
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator).to(device)
        with torch.no_grad():
            wanted, found = network(images), function(images)
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ValueError(
                f"the exported file gives {found.dtype} {tuple(found.shape)} for {batch}x3x{height}x{width}, not "
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


@contextlib.contextmanager
def _reasons(what: str) -> Iterator[None]:
    """Turn whatever an exporter raises into a ValueError that has its first line."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ValueError(f"this network can't be {what}. The reason given: {reason[:300]}") from error


@contextlib.contextmanager
def _time_limit(minutes: int) -> Iterator[None]:
    """End what takes longer with a TimeoutError: sizes that depend on sizes can keep the exporter busy for ever."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {minutes} minutes")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, 60 * minutes), 5)  # again, if somebody catches it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _require(*packages: str) -> None:
    missing = [name for name in packages if not _installed(name)]
    if missing:
        raise ValueError(f"this format needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# --- the command ------------------------------------------------------------------------------------------------------


def export(options: ExportConfig) -> None:
    """Export, check and say where the file is.

    Raises:
        FileNotFoundError, ValueError: see `unept.cli.load`, `export_program`, `write` and `check`.
    """
    device = cli.choose_device(options.device)
    model = cli.load(options.run, device)
    chosen = {name: getattr(options, name) for name in ("refine", "refine_scale", "refine_steps")}
    config = resolve(InferenceOptions(**chosen), model)
    network = WholeImage(model, options.output, config.refinement).eval()
    folder = options.run if options.run.is_dir() else Path()
    path = options.out or folder / f"model{SUFFIX[options.format]}"
    with _time_limit(MINUTES):
        program = export_program(network, options.size)
    write(program, options.format, path)
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    sizes = f"with H and W over {model.divisor}" if options.size is None else "of {} x {}".format(*options.size)
    print(f"takes images, uint8 (B, 3, H, W), RGB, {sizes}; gives {_described(network)}")
    left_out = [f"{name} {value}" for name in ("short_side", "window") if (value := getattr(config, name))]
    if left_out:
        print(f"not in it, though the model was validated so: {', '.join(left_out)}")
    if options.format == "onnx" and not _installed("onnxruntime"):
        print("not checked: pip install onnxruntime", file=sys.stderr)
        return
    worst = check(network, load(options.format, path, device), options.size)
    kind = "of the pixels differ" if options.output == "ids" else "of the largest logit"
    print(f"checked against the model at {len(CHECKED)} sizes: {worst:.1e} {kind}")


def _described(network: WholeImage) -> str:
    refined = "not refined"
    if (refinement := network.refinement) is not None:
        steps = f"{refinement.steps} times " if refinement.steps > 1 else ""
        refined = f"refined {steps}by {refinement.scale} px"
    classes = network.model.num_classes
    kind = "class ids, int64 (B, H, W)" if network.output == "ids" else f"logits, float32 (B, {classes}, H, W)"
    return f"{kind}, {refined}"


def main() -> None:
    """The command line."""
    cli.run(lambda: export(tyro.cli(ExportConfig, prog="python -m unept.export")))


if __name__ == "__main__":
    main()
