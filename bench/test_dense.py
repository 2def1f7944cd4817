"""bilinear_gather, upsample_cross_entropy and upsample_argmax against PyTorch's own ops, eager and compiled.

The unfused forms up-sample the logits in float32 and hold them: (B, K, 480, 480). The refined term reads them at whole
pixels by an index, which is cheaper than grid_sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unept.kernels import bilinear_gather, upsample_argmax, upsample_cross_entropy, use_backend

from .baselines import needs_cuda
from .harness import DEVICE, Group, Unavailable, Variant, assert_close

VARIANTS = ["unept triton", "unept torch", "unfused", "unfused, compiled"]
BASELINE = "unfused"
SIZE, FULL = 60, 480  # of the logits and of the labels
IGNORED = 255
LAMBDAS = (1.0, 1.5)  # Eq. 7's weights of its two segmentation terms


@dataclass(frozen=True)
class Case:
    """One group. `op`: bilinear_gather, argmax, or which terms of the loss: plain, refined, both."""

    op: str
    channels: int
    batch: int
    dtype: torch.dtype
    backward: bool
    compiled: bool = True

    @property
    def name(self) -> str:
        """The group's name in the report, unique to it."""
        titles = {"bilinear_gather": "bilinear_gather", "argmax": "upsample_argmax x8"}
        title = titles.get(self.op, f"upsample_cross_entropy x8, {self.op}")
        letter = "C" if self.op == "bilinear_gather" else "K"
        direction = "forward+backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{title}, B={self.batch} {letter}={self.channels} {dtype}, {direction}"


def cases(full: bool, device: str) -> list[Case]:
    """Batch 16 in bfloat16, the largest also in float32; reduced: batch 1, float32, and few of the compiled forms."""
    batch, dtype = (16, torch.bfloat16) if full else (1, torch.float32)
    listed = [Case("bilinear_gather", 256, batch, dtype, backward, full) for backward in (False, True)]
    for classes in (19, 150):
        listed += [Case("plain", classes, batch, dtype, backward, full) for backward in (False, True)]
        listed += [Case("both", classes, batch, dtype, True)]
        listed += [
            Case("refined", classes, batch, dtype, True, full),
            Case("argmax", classes, batch, dtype, False, full),
        ]
    if full:
        listed += [Case("both", 150, batch, torch.float32, True)]
    return listed


# --- the ops, fused and not: functions of (logits, target, offset) or of (features, points) ---------------------------


def _upsampled(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(wide, (FULL, FULL), mode="bilinear", align_corners=False)


def _shifted(upsampled: Tensor, offset: Tensor) -> Tensor:
    """The map read at p + offset(p), clamped to the border; offset (B, 2, H, W) in whole pixels."""
    steps = torch.arange(FULL, device=offset.device)
    x = (steps + offset[:, 0]).clamp(0, FULL - 1)
    y = (steps[:, None] + offset[:, 1]).clamp(0, FULL - 1)
    index = (y * FULL + x).flatten(1)[:, None].expand(-1, upsampled.shape[1], -1)
    return upsampled.flatten(2).gather(2, index).view(upsampled.shape)


def unfused(op: str) -> Callable[..., Tensor]:
    """By PyTorch's own ops; in float64 for float64 inputs."""
    cross_entropy = partial(F.cross_entropy, ignore_index=IGNORED)

    def gather(features: Tensor, points: Tensor) -> Tensor:
        grid = (points * 2 / (SIZE - 1) - 1)[:, None].to(torch.promote_types(features.dtype, points.dtype))
        out = F.grid_sample(features.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        return out[:, :, 0].to(features.dtype)

    def plain(logits: Tensor, target: Tensor, offset: Tensor) -> Tensor:
        return cross_entropy(_upsampled(logits), target)

    def refined(logits: Tensor, target: Tensor, offset: Tensor) -> Tensor:
        return cross_entropy(_shifted(_upsampled(logits), offset), target)

    def both(logits: Tensor, target: Tensor, offset: Tensor) -> Tensor:
        upsampled = _upsampled(logits)
        refined_term = cross_entropy(_shifted(upsampled, offset), target)
        return LAMBDAS[0] * cross_entropy(upsampled, target) + LAMBDAS[1] * refined_term

    def argmax(logits: Tensor, target: Tensor, offset: Tensor) -> Tensor:
        return _upsampled(logits).argmax(1)

    functions = {"bilinear_gather": gather, "plain": plain, "refined": refined, "both": both, "argmax": argmax}
    return functions[op]


def fused(op: str) -> Callable[..., Tensor]:
    """By this project's ops."""

    def both(logits: Tensor, target: Tensor, offset: Tensor) -> Tensor:
        plain_term = upsample_cross_entropy(logits, target, ignore_index=IGNORED)
        return LAMBDAS[0] * plain_term + LAMBDAS[1] * upsample_cross_entropy(
            logits, target, offset, ignore_index=IGNORED
        )

    functions: dict[str, Callable[..., Tensor]] = {
        "bilinear_gather": bilinear_gather,
        "plain": lambda logits, target, offset: upsample_cross_entropy(logits, target, ignore_index=IGNORED),
        "refined": lambda logits, target, offset: upsample_cross_entropy(logits, target, offset, ignore_index=IGNORED),
        "both": both,
        "argmax": lambda logits, target, offset: upsample_argmax(logits, (FULL, FULL)),
    }
    return functions[op]


# --- a case's inputs and its gate -------------------------------------------------------------------------------------


def make_step(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor | None) -> list[Tensor]:
    """What is timed: the result, and the gradients of logits, or of features and points, if a gradient comes in."""
    if grad_out is None:
        with torch.no_grad():
            return [run(*inputs)]
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad_out)]


class Problem:
    """A case's inputs; its gate looks at the last image, at the size that is timed."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        first = torch.randn(case.batch, case.channels, SIZE, SIZE, device=DEVICE).to(case.dtype)
        self.grad_out = torch.ones((), device=DEVICE) if case.backward else None
        if case.op == "bilinear_gather":
            # One point a pixel, a few pixels away; away from whole pixels, where slopes jump.
            points = torch.rand(case.batch, SIZE * SIZE, 2, device=DEVICE) * SIZE
            self.inputs: tuple[Tensor, ...] = (first, points.floor() + (points - points.floor()) * 0.8 + 0.1)
            if case.backward:
                shape = (case.batch, case.channels, SIZE * SIZE)
                self.grad_out = torch.randn(shape, device=DEVICE).to(case.dtype)
            return
        target = torch.randint(0, case.channels, (case.batch, FULL, FULL), device=DEVICE)
        target[torch.rand(target.shape, device=DEVICE) < 0.05] = IGNORED
        # One pixel away on the tenth that lies on boundaries, as the refinement does.
        offset = torch.randint(-1, 2, (case.batch, 2, FULL, FULL), device=DEVICE, dtype=torch.int16)
        self.inputs = (first, target, offset * (torch.rand(target.shape, device=DEVICE) < 0.1)[:, None])

    def gate(self, run: Callable[..., Tensor]) -> None:
        """Against the unfused form in float64 on the last image; in a loss the other images are ignored."""
        inputs, grad_out = list(self.inputs), self.grad_out
        if self.case.op == "bilinear_gather":
            if grad_out is not None:
                grad_out = torch.zeros_like(grad_out)
                grad_out[-1] = self.grad_out[-1]
        else:
            inputs[1] = inputs[1].clone()
            inputs[1][:-1] = IGNORED
        last = tuple(t[-1:].double() if t.is_floating_point() else t[-1:] for t in inputs)
        actual = make_step(run, tuple(inputs), grad_out)
        if self.case.op == "argmax":
            scores = _upsampled(last[0])
            chosen = scores.gather(1, actual[0][-1:, None])[:, 0]
            assert_close(chosen, scores.amax(1), "score of the chosen class")  # equals the largest, up to rounding
            return
        last_grad = None if grad_out is None else (grad_out if grad_out.dim() == 0 else grad_out[-1:]).double()
        exact = make_step(unfused(self.case.op), last, last_grad)
        for name, tensor, expected in zip(("output", "gradient", "gradient of points"), actual, exact, strict=False):
            assert_close(tensor if tensor.dim() == 0 else tensor[-1:], expected, name)
            if name != "output":
                assert tensor[:-1].count_nonzero() == 0, f"{name}: images that don't count have one"


def prepare(case: Case, problem: Callable[[], Problem], name: str) -> Variant:
    """The variant `name` of a case."""
    if name == "unept triton":
        needs_cuda("Triton")
    if name.endswith("compiled") and not case.compiled:
        raise Unavailable("compiled forms are timed with --full only, but for Eq. 7's two terms")
    made = problem()
    run = fused(case.op) if name.startswith("unept") else unfused(case.op)
    if name.endswith("compiled"):
        run = torch.compile(run, dynamic=False)
    return Variant(
        step=partial(make_step, run, made.inputs, made.grad_out),
        gate=partial(made.gate, run),
        context=partial(use_backend, "triton" if name == "unept triton" else "torch"),
    )


def min_bytes(case: Case) -> int:
    """Inputs read once and outputs written once, in the forward and, if there is one, again in the backward."""
    itemsize = torch.empty((), dtype=case.dtype).element_size()
    maps = case.batch * case.channels * SIZE * SIZE * itemsize
    if case.op == "bilinear_gather":
        points = case.batch * SIZE * SIZE * 2 * 4
        return (2 * maps + points) + (3 * maps + 2 * points if case.backward else 0)
    pixels = case.batch * FULL * FULL
    labels = pixels * 8  # int64, read or, for argmax, written
    offset = pixels * 4 if case.op in ("refined", "both") else 0
    return (maps + labels + offset) * (2 if case.backward else 1) + (maps if case.backward else 0)


def test_dense(samples, case, variant):
    made: list[Problem] = []

    def problem() -> Problem:
        made or made.append(Problem(case))
        return made[0]

    group = Group(
        name=case.name,
        prepare=partial(prepare, case, problem),
        baseline=BASELINE,
        info={
            "shape": f"{case.batch}x{case.channels}x{SIZE}x{SIZE}",
            "dtype": str(case.dtype).removeprefix("torch."),
        },
        min_bytes=min_bytes(case),
    )
    samples(group)
