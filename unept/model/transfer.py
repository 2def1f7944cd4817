"""Take over the weights of another network as far as they fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHOWN = 4  # names of each kind that a description lists


@dataclass(frozen=True)
class Transfer:
    """Which tensors of a network were taken from a state dict, by name."""

    taken: list[str]
    """Those that were."""
    reshaped: list[str]
    """Those that have another shape there, with both shapes."""
    new: list[str]
    """Those that are not there, or were to be left as they were initialised."""
    unused: list[str]
    """Those that are only there."""

    def describe(self) -> str:
        """Say in one line what was taken and what was left, without the counters of batch normalisation."""
        parts = [f"{len(self.taken)} of {len(self.taken) + len(self.reshaped) + len(self.new)} tensors taken"]
        kinds = (("of another shape", self.reshaped), ("initialised anew", self.new), ("not used", self.unused))
        for title, names in kinds:
            names = [name for name in names if not name.endswith("num_batches_tracked")]
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                parts.append(f"{title}: {', '.join(names[:SHOWN])}{more}")
        return "; ".join(parts)


def load_fitting(model: Any, state: Mapping[str, Tensor], anew: Sequence[str] = ()) -> Transfer:
    """Copy every tensor of a state dict into a network where the name and the shape are the same.

    Args:
        model: the network; what does not fit stays as it is.
        state: the state dict of another network.
        anew: beginnings of the names of tensors that are not taken though they fit.

    Raises:
        ValueError: no weight fits.
    """
    own = model.state_dict()
    wanted = {name: t for name, t in state.items() if name in own and not name.startswith(tuple(anew))}
    fitting = {name: t for name, t in wanted.items() if t.shape == own[name].shape}
    if not any(t.is_floating_point() and t.dim() > 1 for t in fitting.values()):
        raise ValueError(
            f"none of its {len(state)} tensors fits the network by name and shape: build the network with the options "
            "that the weights were trained with, above all backbone and d_model"
        )
    model.load_state_dict({**own, **fitting})
    return Transfer(
        taken=list(fitting),
        reshaped=[
            f"{name} {tuple(t.shape)} instead of {tuple(own[name].shape)}"
            for name, t in wanted.items()
            if name not in fitting
        ],
        new=[name for name in own if name not in wanted],
        unused=[name for name in state if name not in own],
    )


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the floating-point dtype of a name, such as "float16" or "bfloat16", or the dtype itself.

    Raises:
        ValueError: it is no floating-point dtype of PyTorch.
    """
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {name!r}; give float32, float16, bfloat16 or float64, as a torch.dtype or its name")
    return found
