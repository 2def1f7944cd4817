"""Choices by measurement: made once, kept on disk, and none where nothing can be measured."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from tests.helpers import offline
from tests.helpers.attention import attention, check, deformable, make_case
from tests.kernels import test_bilinear_gather as gather
from tests.kernels import test_projected_sampling as projected
from tests.kernels import test_upsample_cross_entropy as cross_entropy
from unept.kernels import _autotune, boundary_targets, use_backend
from unept.kernels.sparse_attention import force_form
from unept.kernels.sparse_attention.triton_arguments import geometry

SECONDS = {"slow": 2.0, "fast": 1.0}


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A GPU with a clock that says SECONDS; the value is the list of what has been timed."""
    calls: list[str] = []

    def bench(run, **_):
        calls.append(run())
        return SECONDS[calls[-1]]

    monkeypatch.setattr(_autotune, "INTERPRETED", False)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="a GPU"))
    _autotune.forget_choices()
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield calls
    _autotune.forget_choices()


CANDIDATES = {"slow": lambda: "slow", "fast": lambda: "fast"}


def test_the_fastest_is_chosen_once_for_each_key(timed):
    assert _autotune.fastest("op", CANDIDATES, ("a",))() == "fast"
    assert _autotune.fastest("op", CANDIDATES, ("a",))() == "fast"
    assert timed == ["slow", "fast"]
    _autotune.fastest("op", CANDIDATES, ("b",))
    assert timed == ["slow", "fast"] * 2


def test_threads_tune_one_after_the_other(monkeypatch):
    """Triton keeps the launch that it tunes in the tuner, where a second thread would take it away."""
    monkeypatch.setattr(_autotune, "INTERPRETED", False)
    kernel = SimpleNamespace(arg_names=["seconds", "x"], __name__="kernel", fn=lambda: None, launched=[])
    kernel.run = lambda *_, seconds, BLOCK, **__: (time.sleep(seconds), kernel.launched.append((seconds, BLOCK)))
    configs = [triton.Config({"BLOCK": block}) for block in (16, 32)]
    options = {"reset_to_zero": [], "restore_value": None, "do_bench": lambda run, **_: (run(), [1.0] * 3)[1]}
    tuner = _autotune.Tuner(kernel, kernel.arg_names, configs, ["seconds"], **options)
    tuner.chosen, tuner.pointers = {}, ["x"]
    with ThreadPoolExecutor(2) as pool:
        launch = {"grid": (1,), "warmup": False, "x": torch.zeros(1)}
        runs = [pool.submit(tuner.run, seconds=seconds, **launch) for seconds in (0.2, 0.02, 0.2, 0.02)]
        for run in runs:
            run.result()
    timed = [(seconds, block) for seconds in (0.02, 0.2) for block in (16, 32)]
    assert sorted(kernel.launched) == sorted([*timed, *[(seconds, 16) for seconds in (0.02, 0.02, 0.2, 0.2)]])


def test_the_choice_outlives_the_process(timed):
    _autotune.fastest("op", CANDIDATES, ("a",))
    _autotune.forget_choices()
    assert _autotune.fastest("op", CANDIDATES, ("a",))() == "fast"
    assert timed == ["slow", "fast"]


@pytest.mark.parametrize("reason", ["capture", "switched off"])
def test_nothing_is_timed_while_a_graph_is_captured_or_when_told_not_to(timed, monkeypatch, reason):
    if reason == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setattr(_autotune, "TUNES", False)
    assert _autotune.fastest("op", CANDIDATES, ("a",))() == "slow"
    assert not timed


def test_what_is_missing_while_a_graph_is_captured_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"the table geometry of these sizes .* run the same step once"):
        geometry((123, 7), False, torch.device("cpu"))


@_autotune.autotuned(
    [triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 4})],
    key=[],
    fit=lambda config, arguments: triton.Config({"BLOCK": config.kwargs["BLOCK"] // arguments["factor"]}),
)
def fill_kernel(out_ptr, factor, size_bucket, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), BLOCK)


def test_without_tuning_the_first_configuration_is_fitted_and_taken(monkeypatch):
    monkeypatch.setattr(_autotune, "TUNES", False)

    def block() -> int:
        out = torch.zeros(8, device="cuda" if torch.cuda.is_available() else "cpu")
        fill_kernel[(1,)](out_ptr=out, factor=2, size_bucket=0)
        return int(out[0])

    assert block() == 4
    with _autotune.force_configuration(1):
        assert block() == 2


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[False, True], ids=["default", "deterministic"])
def repeats(request):
    """Whether results must repeat to the bit; the gradient of the value is then always added up, as integers."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=range(offline.size_of_largest_pool()))
def number(request):
    """The number of a configuration in each pool; smaller pools have their last."""
    with use_backend("triton"), _autotune.force_configuration(request.param):
        yield request.param


@pytest.mark.exhaustive
def test_every_configuration_of_the_attention(number, repeats):
    for padded, method in itertools.product((True, False), ("binned", "atomic")[repeats:]):
        with force_form(padded=padded, value_gradient=method):
            check(attention, make_case(batch=1, queries=70, num_points=5, channels=7).to(DEVICE, torch.float32))
            # Two channels in a word, and the tiles that only these have.
            wide = make_case(batch=1, queries=9, num_points=4, channels=64, heads=1, levels=1)
            for dtype in (torch.float32, torch.bfloat16):
                check(attention, wide.to(DEVICE, dtype))
            normalised = make_case(batch=1, queries=9, num_points=4, heads=1, normalised=True)
            check(deformable, normalised.to(DEVICE, torch.float32))
            projected.assert_matches_reference(projected.make_inputs(4, torch.bfloat16, heads=1))


@pytest.mark.exhaustive
def test_every_configuration_of_the_other_ops(number, repeats):
    for dtype in (torch.float32, torch.float16):
        for padding in ("zeros", "border"):
            gather.assert_matches_reference(*gather.make_inputs(dtype, DEVICE), padding)
        for offset in (None, "float"):
            arguments = cross_entropy.make_inputs(DEVICE, dtype, offset=offset, weighted=True)
            cross_entropy.assert_matches_reference(arguments)
            cross_entropy.assert_argmax_matches_reference(arguments)
    labels = torch.randint(0, 3, (2, 19, 23), dtype=torch.uint8, device=DEVICE)
    with use_backend("torch"):
        expected = boundary_targets(labels)
    for found, want in zip(boundary_targets(labels), expected, strict=True):
        assert torch.equal(found, want)


def test_tuning_of_a_tiny_problem_does_not_decide_for_real_ones():
    size_bucket, heads, queries = _autotune.size_bucket, 8, 3 * 60 * 60
    tiny, image, batch = size_bucket(heads * 5), size_bucket(heads * queries), size_bucket(16 * heads * queries)
    assert len({tiny, image, batch}) == 3
    assert size_bucket(heads * 3 * 64 * 48) == image, "another size of image would tune anew"
