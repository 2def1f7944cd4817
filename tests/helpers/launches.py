"""Launch every op, and a training step, on a GPU that is not there (`stub_gpu`), and count what is compiled.

    python -m tests.helpers.launches [--compile] [SCENARIO ...]

Prints one JSON row per call: its scenario, the compilations and launches by kernel, and the host's microseconds, those
for making the inputs included. Every call is made twice. For training steps it also says how many of PyTorch's own
operators the operators of this package call (`aten`): on a GPU each takes the host some microseconds. With
UNEPT_AUTOTUNE=0 nothing is tuned. `--compile` compiles for sm_90, and launches by Triton's own launcher.
"""

import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import unept
from tests.helpers import stub_gpu
from unept.kernels import (
    bilinear_gather,
    boundary_targets,
    ms_deform_attn,
    sparse_sampling_attention,
    upsample_argmax,
    upsample_cross_entropy,
)
from unept.kernels.sparse_attention import force_form, projected_sampling_attention

DTYPES = torch.float32, torch.float16, torch.bfloat16
Call = tuple[str, Callable[[], Any]]


def leaf(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, strided: bool = False) -> Tensor:
    """A tensor that may need a gradient; strided has gaps between all elements."""
    tensor = torch.rand(*shape, 2, dtype=dtype)[..., 0] if strided else torch.rand(shape, dtype=dtype)
    return tensor.requires_grad_(grad)


def backward(out: Tensor) -> None:
    """The backward pass, if anything needs a gradient."""
    if out.requires_grad:
        out.sum().backward()


def attention(
    h: int, w: int, *, dtype: torch.dtype = torch.float32, points: torch.dtype | None = None, strided: bool = False,
    needs: tuple[bool, ...] = (True,) * 4, reference: bool = True, channels: int = 32, batch: int = 2,
) -> None:  # fmt: skip
    """One layer over one level, 2 heads, 8 points."""
    make = lambda *shape, grad, dtype=dtype: leaf(*shape, dtype=dtype, grad=grad, strided=strided)
    points = points or dtype
    value = make(batch, h * w, 2, channels, grad=needs[0])
    places = make(batch, h * w, 2, 1, 8, 2, grad=needs[1], dtype=points)
    scores = make(batch, h * w, 2, 1, 8, grad=needs[2], dtype=points)
    if reference:
        centres = make(1, h * w, 2, grad=needs[3], dtype=torch.float32)
        backward(sparse_sampling_attention(value, [(h, w)], places, scores, centres))
    else:
        backward(ms_deform_attn(value, [(h, w)], None, places, scores))


def projected(h: int, w: int, num_points: int = 8) -> None:
    """One layer over one level, 2 heads, that projects bfloat16 queries itself."""
    value, query = (leaf(2, h * w, 2, 32, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = leaf(2, 32, 3 * num_points), leaf(2, 3 * num_points)
    backward(projected_sampling_attention(value, [(h, w)], query, weight, bias, leaf(1, h * w, 2, grad=False)))


def attention_calls() -> Iterator[Call]:
    for dtype, strided, reference in itertools.product(DTYPES, (False, True), (True, False)):
        name = f"{dtype} strided={strided} reference={reference}"
        yield name, lambda d=dtype, s=strided, r=reference: attention(6, 7, dtype=d, strided=s, reference=r)
    for needs in itertools.product((False, True), repeat=4):
        yield f"needs={needs}", lambda needs=needs: attention(6, 7, needs=needs)
    for channels in (1, 5, 64, 256):
        yield f"channels={channels}", lambda c=channels: attention(6, 7, channels=c)
    yield "bfloat16 maps, float32 points", lambda: attention(6, 7, dtype=torch.bfloat16, points=torch.float32)
    for num_points in (8, 5):
        yield f"projected inside, {num_points} points", lambda n=num_points: projected(6, 7, n)
    for padded, method in itertools.product((False, True), ("binned", "atomic")):

        def forced(padded: bool = padded, method: Any = method) -> None:
            with force_form(padded=padded, value_gradient=method):
                attention(6, 7)

        yield f"padded={padded} {method}", forced


def gather(h: int, w: int, *, dtype: torch.dtype = torch.float32, strided: bool = False, padding: str = "border",
           needs: tuple[bool, bool] = (True, True), channels: int = 3) -> None:  # fmt: skip
    """A point for each pixel."""
    features = leaf(2, channels, h, w, dtype=dtype, grad=needs[0], strided=strided)
    backward(bilinear_gather(features, leaf(2, h * w, 2, grad=needs[1], strided=strided), padding))


def gather_calls() -> Iterator[Call]:
    for dtype, strided, padding in itertools.product(DTYPES, (False, True), ("zeros", "border")):
        name = f"{dtype} strided={strided} {padding}"
        yield name, lambda d=dtype, s=strided, p=padding: gather(6, 7, dtype=d, strided=s, padding=p)
    for needs in itertools.product((False, True), repeat=2):
        yield f"needs={needs}", lambda needs=needs: gather(6, 7, needs=needs)
    # Tiles of channels stand on the grid's first axis: the others have at most 65535 programs.
    yield "1.1 M channels", lambda: gather(1, 1, channels=1_100_000, needs=(False, False))


def losses(h: int, w: int, *, dtype: torch.dtype = torch.float32, strided: bool = False, offset: bool = True,
           weighted: bool = False, labels: torch.dtype = torch.int64, classes: int = 5,
           ratio: int = 8) -> None:  # fmt: skip
    """Logits at a part of the size of the labels, their losses with a gradient, and the predicted classes."""
    logits = leaf(2, classes, h, w, dtype=dtype, strided=strided)
    target = torch.zeros(2, ratio * h, ratio * w, dtype=labels)
    moved = leaf(2, 2, ratio * h, ratio * w, grad=False, strided=strided) if offset else None
    weights = leaf(classes, grad=False, strided=strided) if weighted else None
    backward(upsample_cross_entropy(logits, target, moved, class_weights=weights))
    upsample_argmax(logits.detach(), (ratio * h, ratio * w), moved)


def losses_calls() -> Iterator[Call]:
    for dtype, strided, options in itertools.product(DTYPES, (False, True), (False, True)):
        call = lambda d=dtype, s=strided, o=options: losses(2, 3, dtype=d, strided=s, offset=o, weighted=o)
        yield f"{dtype} strided={strided} offset and weights={options}", call
    for labels in (torch.uint8, torch.int16, torch.int32):
        yield f"labels {labels}", lambda labels=labels: losses(2, 3, labels=labels)


def boundary(h: int, w: int, *, labels: torch.dtype = torch.uint8, radius: float = 5.0, directions: int = 8) -> None:
    """Distance and direction of labels."""
    boundary_targets(torch.zeros(2, h, w, dtype=labels), radius=radius, num_directions=directions)


def boundary_calls() -> Iterator[Call]:
    for labels in (torch.uint8, torch.int64):
        yield f"labels {labels}", lambda labels=labels: boundary(16, 17, labels=labels)
    for radius, directions in ((1.0, 4), (3.5, 255)):
        yield f"radius={radius} {directions}", lambda r=radius, d=directions: boundary(9, 9, radius=r, directions=d)


def deterministic_calls() -> Iterator[Call]:
    """The ops whose gradients are then added up as integers."""
    calls = {"attention": attention, "gather": gather, "losses": losses}
    for (name, call), dtype in itertools.product(calls.items(), (torch.float32, torch.bfloat16)):

        def repeatable(call: Callable[..., None] = call, dtype: torch.dtype = dtype) -> None:
            torch.use_deterministic_algorithms(True)
            try:
                call(6, 7, dtype=dtype)
            finally:
                torch.use_deterministic_algorithms(False)

        yield f"{name} {dtype}", repeatable


def sizes() -> Iterator[Call]:
    """Every op at one size, and then at 60 others, the first with a side of 1; with two numbers of classes."""
    draw = random.Random(0)
    others = [(1, 9), (17, 1), (1, 1), *((draw.randint(1, 80), draw.randint(1, 80)) for _ in range(57))]
    for size in ((6, 7), *others):

        def call(size: tuple[int, int] = size) -> None:
            for batch in (2, 3):
                attention(*size, batch=batch)
            gather(*size)
            boundary(*size)
            for ratio in (8, 1):
                losses(*size, classes=150 if size[0] % 2 else 19, ratio=ratio)

        yield f"{size}", call


def training_steps() -> Iterator[Call]:
    """Training steps of a small network, at its first size and at others."""
    torch.manual_seed(0)
    model = unept.UNEPT(
        19, backbone="resnet10t", pretrained_backbone=False, output_stride=32, d_model=64, num_heads=4, num_points=8,
        ffn_dim=64,
    )  # fmt: skip
    loss = unept.UNEPTLoss()
    for size in ((64, 64), (96, 64), (72, 128)):

        def step(size: tuple[int, int] = size) -> None:
            model.zero_grad()
            labels = torch.zeros(2, *size, dtype=torch.int64)
            targets = loss.targets(labels)
            targets.direction.zero_()  # which no kernel has written
            loss.losses(model(torch.rand(2, 3, *size)), targets)["loss"].backward()

        yield f"{size}", step


def aten_calls(call: Callable[[], Any]) -> int:
    """How many of PyTorch's operators are called from those of this package, but for what these call themselves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()

    def parents(event: Any) -> Iterator[str]:
        while event := event.cpu_parent:
            yield event.name

    named = [(event.name, list(parents(event))) for event in profile.events()]
    inside = [above for name, above in named if name.startswith("aten::")]
    return sum(
        any(name.startswith("unept::") for name in above) and not any(name.startswith("aten::") for name in above)
        for above in inside
    )


SCENARIOS: dict[str, Callable[[], Iterator[Call]]] = {
    "training": training_steps,  # first, where nothing has been compiled yet
    "attention": attention_calls,
    "gather": gather_calls,
    "losses": losses_calls,
    "boundary": boundary_calls,
    "deterministic": deterministic_calls,
    "sizes": sizes,
}


if __name__ == "__main__":
    log = stub_gpu.install(compiles="--compile" in sys.argv)
    for scenario in [name for name in sys.argv[1:] if name in SCENARIOS] or SCENARIOS:
        for name, call in SCENARIOS[scenario]():
            for repeat in range(2):
                log.clear()
                start = time.perf_counter()
                call()
                host = {"host_us": round((time.perf_counter() - start) * 1e6)}
                row = {"scenario": scenario, "call": name, "repeat": repeat}
                row |= {"compilations": dict(log.compilations), "launches": dict(log.launches)}
                if scenario == "training" and repeat:
                    host["aten"] = aten_calls(call)
                print(json.dumps({**row, **host}), flush=True)
