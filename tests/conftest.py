"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before the first import."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest

from unept.kernels import use_backend

# The same examples on every machine and in every run, and nothing kept on disk; `search` draws new ones each time.
hypothesis.settings.register_profile(
    "repeat",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    max_examples=30,
)
hypothesis.settings.register_profile(
    "search", hypothesis.settings.get_profile("repeat"), derandomize=False, max_examples=500
)
hypothesis.settings.load_profile("repeat")

# (backend, device) pairs that every op is tested on.
BACKENDS = [("torch", "cpu"), ("triton", "cpu")]
if torch.cuda.is_available():
    BACKENDS = [("torch", "cpu"), ("torch", "cuda"), ("triton", "cuda")]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A case marked `slow_interpreted`, or `exhaustive_interpreted`, is so where Triton's interpreter runs it."""
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        for mark in (pytest.mark.slow, pytest.mark.exhaustive):
            if backend == ("triton", "cpu") and item.get_closest_marker(f"{mark.name}_interpreted"):
                item.add_marker(mark)


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


@pytest.fixture(autouse=True, scope="session")
def _float32_by_default():
    """`amp="auto"` computes in float32 on every CPU, so that tests see the same numbers wherever they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unept.precision.cpu_multiplies_bfloat16", lambda: False)
        yield
