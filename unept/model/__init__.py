"""The network of Fig. 2, one part per file, and the loss of Eq. 7."""

from .network import UNEPT
from .output import UNEPTOutput

__all__ = ["UNEPT", "UNEPTOutput"]
