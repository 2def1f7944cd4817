"""UN-EPT: a unified efficient pyramid transformer for semantic segmentation."""

import importlib.metadata

from .model.loss import UNEPTLoss
from .model.network import UNEPT
from .model.output import UNEPTOutput
from .model.registry import create_model, list_models
from .segmenter import Segmentation, Segmenter

__version__ = importlib.metadata.version("unept")
__all__ = ["UNEPT", "Segmentation", "Segmenter", "UNEPTLoss", "UNEPTOutput", "create_model", "list_models"]
