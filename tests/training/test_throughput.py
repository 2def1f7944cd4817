"""The rates that a run reports: of the step, of the loader, and of both together."""

import pytest
import torch

from unept.training import throughput
from unept.training.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told: `clock[0] += seconds`."""
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("ranks", [1, 4])
def test_rates_tell_the_step_from_the_loader(clock, ranks):
    speed = Throughput(torch.device("cpu"), workers=2, ranks=ranks)
    speed.start()
    for _ in range(2):
        for _ in range(5):
            clock[0] += 0.3  # waits for data
            with speed.step(images=10, loader_seconds=0.08):
                clock[0] += 0.2
        speed.stop()
        clock[0] += 1000  # an evaluation
        speed.start()
        assert speed.rates() == pytest.approx(
            {
                "images_per_s": 50 / 2.5 * ranks,
                "step_images_per_s": 50 / 1.0 * ranks,
                "loader_images_per_s": 2 / 0.08 * ranks,
            }
        )


def test_a_loader_without_workers_is_one(clock):
    speed = Throughput(torch.device("cpu"), workers=0)
    speed.start()
    for images, seconds in ((6, 0.1), (2, 0.5)):
        with speed.step(images, seconds):
            clock[0] += 1
    assert speed.rates() == pytest.approx(
        {"images_per_s": 4, "step_images_per_s": 4, "loader_images_per_s": 8 / (6 * 0.1 + 2 * 0.5)}
    )


def test_steps_are_timed_on_their_device_whichever_is_the_current_one(monkeypatch, clock):
    """Events of CUDA that tell the stream on which they were recorded; the device is the second one."""

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: str) -> None:
            self.stream, self.seconds = stream, clock[0]

        def elapsed_time(self, end: "Event") -> float:
            assert self.stream == end.stream == "stream of cuda:1"
            return 1e3 * (end.seconds - self.seconds)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    speed = Throughput(torch.device("cuda", 1), workers=1)
    speed.start()
    for _ in range(2):
        with speed.step(images=4, loader_seconds=0.1):
            clock[0] += 0.25
    assert speed.rates()["step_images_per_s"] == pytest.approx(16)
