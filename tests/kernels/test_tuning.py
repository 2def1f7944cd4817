"""Choices by measurement: made once, kept on disk, and none where nothing can be measured."""

from types import SimpleNamespace

import pytest
import torch
import triton

from unept.kernels import _autotune

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


def test_a_pool_without_tuning_is_its_first_configuration(monkeypatch):
    configs = [triton.Config({"BLOCK_Q": size}) for size in (64, 32)]
    monkeypatch.setattr(_autotune, "INTERPRETED", False)
    assert _autotune.autotune_pool(*configs) == configs
    monkeypatch.setattr(_autotune, "TUNES", False)
    assert _autotune.autotune_pool(*configs) == configs[:1]


def test_tuning_of_a_tiny_problem_does_not_decide_for_real_ones():
    size_bucket, heads, queries = _autotune.size_bucket, 8, 3 * 60 * 60
    tiny, image, batch = size_bucket(heads * 5), size_bucket(heads * queries), size_bucket(16 * heads * queries)
    assert len({tiny, image, batch}) == 3
    assert size_bucket(heads * 3 * 64 * 48) == image, "another size of image would tune anew"
