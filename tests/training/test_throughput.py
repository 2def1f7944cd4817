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
