"""The network of Fig. 2, a part a file, and the loss of Eq. 7."""

from .network import UNEPT, UNEPTOutput

__all__ = ["UNEPT", "UNEPTOutput"]
