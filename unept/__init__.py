"""UN-EPT: a unified efficient pyramid transformer for semantic segmentation."""

from .loss import UNEPTLoss
from .model import UNEPT, UNEPTOutput

__all__ = ["UNEPT", "UNEPTLoss", "UNEPTOutput"]
