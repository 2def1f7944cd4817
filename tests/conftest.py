"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before the first import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from unept.kernels import use_backend

# (backend, device) pairs that every op is tested on.
BACKENDS = [("torch", "cpu"), ("triton", "cpu")]
if torch.cuda.is_available():
    BACKENDS = [("torch", "cpu"), ("torch", "cuda"), ("triton", "cuda")]


@pytest.fixture(params=BACKENDS, ids=lambda pair: "-".join(pair))
def backend(request):
    """Switch to a backend for one test; the value is (backend, device)."""
    name, device = request.param
    with use_backend(name):
        yield name, device


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def deterministic():
    """Deterministic algorithms; PyTorch then also fills every new buffer with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
