"""The processes that read data end when their run ends them, and not by the signals that stop the run."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest

from unept.signals import SIGNALS, shield_worker


def work(ready) -> None:
    shield_worker(0)
    ready.set()
    while True:
        time.sleep(0.1)


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_worker_ends_only_when_its_run_ends_it(method):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    process = context.Process(target=work, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(600)
    for number in set(SIGNALS) - {signal.SIGTERM}:
        os.kill(process.pid, number)
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)  # of another process, as a batch system sends it
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
