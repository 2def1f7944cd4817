"""Train and evaluate on several processes under torchrun (Sec. 4.2: synchronised batch normalisation).

Every function also works in a single process without a process group, where it has nothing to do.
"""

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .sync_batch_norm import synchronise

Device = Literal["auto", "cuda", "cpu"]
# The other ranks wait while rank 0 draws pictures and writes, and at a cold start each waits while others compile.
TIMEOUT = datetime.timedelta(hours=1)
T = TypeVar("T")


def rank() -> int:
    """Return the number of this process, counted from 0 over all machines."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files: rank 0."""
    return rank() == 0


def default_workers() -> int:
    """Return how many processes read data unless an option says it: the cores that each process has, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def was_restarted() -> bool:
    """Whether torchrun has started this process anew, because one of the processes had ended (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_id() -> str | None:
    """Identify this start of torchrun; the same after it has started its processes anew, None without torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()}" if run == "none" else run  # "none" without --rdzv-id


def choose_device(name: Device) -> torch.device:
    """Return the device that an option names; `auto` is CUDA if there is a device.

    Under torchrun each process has a CUDA device of its own.

    Raises:
        ValueError: `cuda` is asked for and absent, or this machine has fewer devices than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no CUDA device here: use --device cpu, or omit --device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= found:
        raise ValueError(
            f"torchrun started process {local_rank + 1} on this machine, but PyTorch finds {found} CUDA devices here: "
            f"use --nproc-per-node {found}, or --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, by NCCL between GPUs and by gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None, **_rendezvous()
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rendezvous() -> dict[str, Any]:
    """Agree on an unused store: returns `store`, `rank` and `world_size` for `init_process_group`.

    When torchrun starts processes anew, it keeps the store, and with it the addresses of the processes that have ended,
    which a process may read before its peer has written its own (pytorch/pytorch#135712). Therefore each process
    announces itself under a random name, and rank 0 answers with the prefix of a part of the store that is unused.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    prefix = own_name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"arrived/{rank}", own_name)
        prefix = store.get(f"answer/{own_name}").decode()  # waits
        store.set(f"{prefix}/joined/{rank}", "")
    else:
        waiting, deadline = set(range(1, world_size)), time.monotonic() + TIMEOUT.total_seconds()
        while waiting and time.monotonic() < deadline:
            for other in waiting:
                if store.check([f"arrived/{other}"]):  # perhaps of a process that has ended: then it is read again
                    store.set(f"answer/{store.get(f'arrived/{other}').decode()}", prefix)
            time.sleep(0.02)
            waiting = {other for other in waiting if not store.check([f"{prefix}/joined/{other}"])}
    return {"store": dist.PrefixStore(prefix, store), "rank": rank, "world_size": world_size}


def split_batch(batch_size: int, accumulate: int) -> int:
    """Return the number of images of a batch that each rank sees, in `accumulate` parts of equal size.

    Raises:
        ValueError: the batch is not a multiple of the number of parts on all ranks.
    """
    ranks = world_size()
    if batch_size % (ranks * accumulate):
        raise ValueError(
            f"batch_size {batch_size} cannot be split over {ranks} processes in {accumulate} parts each: make it a "
            f"multiple of {ranks * accumulate} (--batch-size), or change --accumulate or torchrun's --nproc-per-node"
        )
    return batch_size // ranks


def run_on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only, and return its result on all ranks.

    An error of the function is raised on rank 0, and ends the other ranks silently (SystemExit 2).
    """
    if world_size() == 1:
        return function()
    result: list[Any] = [None, False]
    error: Exception | None = None
    if is_main():
        try:
            result = [function(), False]
        except Exception as raised:  # raised below, after the broadcast for which the other ranks wait
            error, result = raised, [None, True]
    dist.broadcast_object_list(result, src=0)
    if error is not None:
        raise error
    if result[1]:
        raise SystemExit(2)
    return result[0]


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average a floating-point tensor over the ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def sum_over_ranks(count: int, device: torch.device) -> int:
    """Sum a count over the ranks; the host waits for the result."""
    total = torch.tensor(count, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return int(total)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Synchronise the batch normalisation of a model, and average its gradients over the ranks in each backward.

    Returns:
        The model itself in a single process, else a DistributedDataParallel around it. Parameters and buffers keep
        their names in the model itself.
    """
    if world_size() == 1:
        return model
    synchronise(model)
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
