"""Stop a run by a signal: its step is finished and its state is saved, on all ranks after the same step."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .. import distributed
from ..signals import SIGNALS


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after its state was saved.

    Attributes:
        exit_status: 128 + the number of the signal, with which a command exits.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped at step {step}; continue with --resume auto")
        self.exit_status = 128 + number


class StopSignals:
    """Take note of `unept.signals.SIGNALS` for the life of a run instead of ending the process.

    This is a context manager, which all ranks enter together. A signal that is ignored already, as SIGHUP is under
    nohup, stays ignored. Without torchrun, which may pass on a Ctrl-C that the process has seen, a second Ctrl-C raises
    KeyboardInterrupt at once. Outside the main thread, where Python handles no signals, it has no effect.

    Attributes:
        received: the first signal that this process has received, 0 if none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None  # of the step before

    def __enter__(self) -> "StopSignals":
        self.received, self._group, self._asked = 0, None, None
        if distributed.world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT)  # on the host, beside NCCL
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._asked is not None and (kind is None or issubclass(kind, Stopped)):
            self._asked[1].wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received == number == signal.SIGINT
        if again and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.received = self.received or number

    def after_step(self) -> int:
        """Return the signal for which all ranks stop now, 0 to go on; all ranks call it after each step.

        With several ranks a signal counts one step later, so that no rank ever waits for the others' answers.
        """
        if self._group is None:
            return self.received
        before, self._asked = self._asked, self._ask(wait=False)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def now(self) -> int:
        """Return the signal for which all ranks stop, 0 to go on; all ranks call it and wait for each other."""
        return self.received if self._group is None else int(self._ask(wait=True)[0])

    def _ask(self, wait: bool) -> tuple[torch.Tensor, Any]:
        """Ask all ranks for their largest signal: the answer, and what to wait for before it is read."""
        answer = torch.tensor([self.received])
        return answer, dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group, async_op=not wait)
