"""Whether glibc keeps the memory that is freed, for the next step of a training on a CPU.

What comes from the system is filled with zeros first, page by page, which is some 7 % of a training step. Other C
libraries are left as they are.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# Of <malloc.h>: the free memory to keep; from which size blocks come from the system one by one, and how many of them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


@contextlib.contextmanager
def freed_memory_kept(where: bool = True) -> Iterator[None]:
    """Keep what is freed until the end of the block, in this process and those that it forks, if `where` is true."""
    if not where:
        yield
        return
    _call_glibc("mallopt", M_MMAP_MAX, 0)
    _call_glibc("mallopt", M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        keep_no_freed_memory()


def keep_no_freed_memory() -> None:
    """Undo `freed_memory_kept`, with the values that glibc itself comes to in a process that frees large blocks."""
    _call_glibc("mallopt", M_MMAP_MAX, 1 << 16)
    _call_glibc("mallopt", M_MMAP_THRESHOLD, 1 << 25)
    _call_glibc("mallopt", M_TRIM_THRESHOLD, 1 << 26)
    return_freed_memory()


def return_freed_memory() -> None:
    """Give what has been kept back to the system once."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library on ints, if there is one of this name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
