"""torch.compile of a network that predicts for images of many sizes, each of which would compile it anew."""

import threading
import types
import weakref
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor

Compile = Literal["auto", "on", "off"]
MAX_SIZES = 8  # sizes that a network is compiled for; Dynamo keeps as many graphs of a function
FREQUENT = 100  # with "auto" a size is compiled when it comes for so many times


def compiles(option: Compile, device_type: str) -> bool:
    """Whether to compile: for `"on"`, and for `"auto"` on CUDA."""
    return option == "on" or (option == "auto" and device_type == "cuda")


def call_compiled(model: Any, images: Tensor, option: Compile) -> Any:
    """Call a model on images, compiled for their size if it is among the first `MAX_SIZES`, else as it is.

    The sizes of a model are counted as long as the model lives.

    Args:
        model: an `nn.Module`.
        images: (B, C, H, W).
        option: `"on"` compiles a size when it first comes, `"auto"` on CUDA when it has come `FREQUENT` times, so that
            single images do not wait for it.
    """
    if not compiles(option, images.device.type):
        return model(images)
    with _lock:
        sizes = _sizes.get(model) or _sizes.setdefault(model, _Sizes())
    if sizes.should_compile((*images.shape, images.dtype), 1 if option == "on" else FREQUENT):
        return sizes.call(model, images)
    return model(images)


class _Sizes:
    """The sizes that one model has seen, and the function that calls it compiled."""

    def __init__(self) -> None:
        # A code object of its own, by which Dynamo counts graphs. The model is an argument, so that it can be freed.
        code = _call.__code__.replace()
        self.call = torch.compile(types.FunctionType(code, globals()), dynamic=False)
        self.seen: Counter[tuple] = Counter()
        self.compiled: set[tuple] = set()

    def should_compile(self, size: tuple, times: int) -> bool:
        """Count an image of a size; whether the size is compiled, now if it has come so many times."""
        with _lock:
            self.seen[size] += 1
            if self.seen[size] >= times and len(self.compiled) < MAX_SIZES:
                self.compiled.add(size)
            return size in self.compiled


def _call(model: Any, images: Tensor) -> Any:
    return model(images)


_sizes: weakref.WeakKeyDictionary[Any, _Sizes] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
