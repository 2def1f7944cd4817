"""Tables that kernels read and that depend on the sizes of images: made once per size, kept up to a limit in bytes.

A copy to a GPU waits for it, so that a table is copied once and not at every call. A server sees images of any size,
so that not all tables can stay. Those that a CUDA graph reads are kept as long as the process lives: the graph holds
their addresses.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ._triton import refuse_capture

MAX_BYTES = 64 << 20
"""What the tables of one function may take on one device. When it is passed, the least recently used half goes."""


class _Table:
    """A table and whether a CUDA graph reads it."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.pinned = tensor, False

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class TableCache:
    """A function (sizes..., device) -> table that remembers what it returned; see `cached_table`."""

    def __init__(self, make: Callable[..., Tensor]):
        self._make = make
        self._tables: dict[torch.device, OrderedDict[tuple[Hashable, ...], _Table]] = {}
        self._lock = threading.Lock()
        functools.update_wrapper(self, make)

    def __call__(self, *arguments: Any) -> Tensor:
        """The table for some sizes on a device, the last argument; it is made at the first call."""
        *sizes, device = arguments
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            tables = self._tables.setdefault(device, OrderedDict())
            key = tuple(sizes)
            table = tables.get(key)
            if table is None:
                refuse_capture(f"the table {self._make.__name__} of these sizes is not on the device yet")
                table = tables[key] = _Table(self._make(*arguments))
                _drop_oldest(tables, device)
            else:
                tables.move_to_end(key)
            table.pinned = table.pinned or capturing
        return table.tensor

    def bytes(self, device: torch.device) -> int:
        """What the tables on a device take."""
        with self._lock:
            return sum(table.bytes for table in self._tables.get(device, {}).values())


def _drop_oldest(tables: OrderedDict[tuple[Hashable, ...], _Table], device: torch.device) -> None:
    """Bring the tables that no CUDA graph reads down to half the limit if they have passed it; the newest stays."""
    loose = [(sizes, table) for sizes, table in tables.items() if not table.pinned]
    total = sum(table.bytes for _, table in loose)
    if total <= MAX_BYTES:
        return
    if device.type == "cuda":
        # Kernels on any stream may still read what is dropped here. Half of the tables go at once, so this is rare.
        torch.cuda.synchronize(device)
    for sizes, table in loose[:-1]:
        if total <= MAX_BYTES // 2:
            break
        total -= table.bytes
        del tables[sizes]


def cached_table(make: Callable[..., Tensor]) -> TableCache:
    """Remember the tables of a function of hashable arguments, the last of which is the `torch.device` of the table."""
    return TableCache(make)
