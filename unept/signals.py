"""The signals that stop a run, and how the processes that read its data are kept out of them."""

import multiprocessing
import os
import signal
import threading

# Ctrl-C; the warning of a preemptible machine or of torchrun; a closed terminal; the warning that a batch system sends.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def shield_worker(worker: int) -> None:
    """Keep the process of a loader out of the signals that stop a run, which often reach every process of it.

    A worker that dies makes PyTorch raise an error in the middle of a step. Its parent ends it when the run has ended:
    a SIGTERM counts if the parent has sent it. It is a `worker_init_fn` of `torch.utils.data.DataLoader`.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # The process that started it, which is not the parent of a process that a fork server has forked.
        parent = multiprocessing.parent_process()
        starter = os.getppid() if parent is None or parent.pid is None else parent.pid
        threading.Thread(target=_end_when_asked, args=(starter,), daemon=True).start()


def _end_when_asked(starter: int) -> None:
    """End this process at a SIGTERM from the process that started it, as `multiprocessing` sends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != starter:
        pass
    os._exit(0)
