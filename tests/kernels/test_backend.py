"""The choice of a backend: explicit, reversible, and refused with a remedy where it can't be met."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from unept.kernels import requested_backend, upsample_argmax, use_backend
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
    assert in_fresh_process(code, UNEPT_BACKEND="triton", TRITON_INTERPRET="1").returncode == 0


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
