"""The choice of a backend: explicit, reversible, and refused with a remedy where it can't be met."""

import contextlib
import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch

from unept.kernels import (
    MSDeformAttnFunction,
    bilinear_gather,
    ms_deform_attn,
    requested_backend,
    set_default_backend,
    sparse_sampling_attention,
    upsample_argmax,
    upsample_cross_entropy,
    use_backend,
)
from unept.kernels.backend import runs_on_triton


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` without a GPU and without what the tests have set."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "UNEPT_BACKEND")}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_setter_and_context_manager():
    before = requested_backend()
    with use_backend("torch"):
        assert requested_backend() == "torch"
        with use_backend("triton"):
            assert requested_backend() == "triton"
        assert requested_backend() == "torch"
    choice = use_backend("torch")
    assert requested_backend() == "torch"
    choice.__exit__(None, None, None)
    assert requested_backend() == before


def test_previous_choice_comes_back_after_an_error():
    before = requested_backend()
    with pytest.raises(ZeroDivisionError), use_backend("torch"):
        raise ZeroDivisionError
    assert requested_backend() == before


def in_thread(function):
    """What a function returns in a new thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_choice_holds_in_its_thread_and_leaves_nothing_behind():
    before = requested_backend()
    entered, left, seen = threading.Event(), threading.Event(), {}

    def first():
        with use_backend("torch"):
            entered.set()
            left.wait(10)
            seen["first"] = requested_backend()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    choice = use_backend("triton")  # begins after the other one and ends before it
    assert in_thread(requested_backend) == before
    choice.__exit__(None, None, None)
    left.set()
    thread.join()
    assert seen["first"] == "torch"
    assert requested_backend() == in_thread(requested_backend) == before


def test_the_default_is_for_threads_that_have_not_chosen():
    before = requested_backend()
    try:
        set_default_backend("torch")
        assert requested_backend() == in_thread(requested_backend) == "torch"
        with use_backend("triton"):
            assert (requested_backend(), in_thread(requested_backend)) == ("triton", "torch")
    finally:
        set_default_backend(before)
    with pytest.raises(ValueError, match="'gpu'; the backends are"):
        set_default_backend("gpu")


def losses_of_all_ops(maps: torch.Tensor) -> list[torch.Tensor]:
    """Losses of maps (1, 2, 4, 4)."""
    points, samples = maps.new_full((1, 5, 2), 0.4), maps.new_full((1, 5, 1, 1, 2, 2), 0.3)
    value, weights = maps.flatten(2).mT[:, :, None], samples[..., 0]
    return [
        bilinear_gather(maps, points).sum(),
        upsample_cross_entropy(maps, maps.new_zeros(1, 4, 4, dtype=torch.long), maps.new_zeros(1, 2, 4, 4)),
        sparse_sampling_attention(value, [(4, 4)], samples, weights, points).sum(),
        ms_deform_attn(value, [(4, 4)], None, samples, weights).sum(),
        MSDeformAttnFunction.apply(value, [(4, 4)], None, samples, weights, 64).sum(),
    ]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "default"])
def test_a_gradient_runs_where_its_op_ran(chosen, compiled):
    """Checked in float64, which the Triton kernels refuse, from a thread that chose these."""
    run = torch.compile(losses_of_all_ops, backend="aot_eager", fullgraph=True) if compiled else losses_of_all_ops
    # Of tensors on a CPU the kernels refuse the device, where they are not interpreted.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    maps = torch.randn(1, 2, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    before = requested_backend()
    choice = use_backend("torch") if chosen else contextlib.nullcontext()
    try:
        if not chosen:
            set_default_backend("torch")
        with choice:
            losses = run(maps)
    finally:
        set_default_backend(before)

    def differentiate():
        with use_backend("triton"):
            gradients = torch.autograd.grad(losses, maps, [torch.ones_like(loss) for loss in losses])
            with pytest.raises(TypeError, match="not float64"):  # a graph that was compiled for another choice
                run(maps)
            return gradients[0].abs().sum() > 0

    assert in_thread(differentiate)


def test_unknown_name_lists_the_backends():
    before = requested_backend()
    with pytest.raises(ValueError, match="'cuda'; the backends are auto, triton, torch"):
        use_backend("cuda")
    assert requested_backend() == before


def test_auto_runs_on_torch_off_the_gpu():
    with use_backend("auto"):
        assert not runs_on_triton(torch.zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_runs_on_triton_on_the_gpu():
    with use_backend("auto"):
        assert runs_on_triton(torch.zeros(1, device="cuda"))
        assert not runs_on_triton(torch.zeros(1, device="cuda", dtype=torch.float64))


def test_triton_refuses_float64():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with (
        use_backend("triton"),
        pytest.raises(TypeError, match="not float64: convert the tensors, or set UNEPT_BACKEND"),
    ):
        upsample_argmax(torch.zeros(1, 2, 3, 3, dtype=torch.float64, device=device), (6, 6))


def test_environment_variable_is_checked_at_import():
    done = in_fresh_process("import unept.kernels", UNEPT_BACKEND="cuda")
    assert done.returncode != 0
    assert "UNEPT_BACKEND is 'cuda'; the backends are auto, triton, torch" in done.stderr


def test_triton_without_a_gpu_says_what_to_do():
    code = "import torch; from unept.kernels import upsample_argmax; upsample_argmax(torch.zeros(1, 2, 3, 3), (6, 6))"
    done = in_fresh_process(code, UNEPT_BACKEND="triton")
    assert done.returncode != 0
    assert "the tensors are on cpu: move them to a CUDA device, set TRITON_INTERPRET=1" in done.stderr


def test_no_second_copy_of_the_package():
    """transformers imports `kernels`, from a clone this folder; a copy would take over the ops and their backend."""
    assert importlib.import_module("kernels") is sys.modules["unept.kernels"]
    assert "kernels.backend" not in sys.modules


def test_ops_work_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ModuleNotFoundError
import torch
from unept.kernels import use_backend
from unept.kernels import upsample_argmax
logits = torch.randn(1, 4, 3, 5)
up = torch.nn.functional.interpolate(logits, (9, 10), mode="bilinear", align_corners=False)
assert torch.equal(upsample_argmax(logits, (9, 10)), up.argmax(1))
use_backend("triton")
try:
    upsample_argmax(logits, (9, 10))
except RuntimeError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError("no error")
"""
    done = in_fresh_process(code)
    assert done.returncode == 0, done.stderr
