"""UN-EPT: a unified efficient pyramid transformer for semantic segmentation."""

import importlib.metadata

from .data.registry import register_dataset
from .model.loss import UNEPTLoss
from .model.network import UNEPT
from .model.output import UNEPTOutput
from .model.refiner import Refiner
from .model.registry import create_model, list_models
from .segmenter import Segmentation, Segmenter

try:
    __version__ = importlib.metadata.version("unept")
except importlib.metadata.PackageNotFoundError:  # used from a clone without installing
    __version__ = "0+unknown"
__all__ = [
    "UNEPT",
    "Refiner",
    "Segmentation",
    "Segmenter",
    "UNEPTLoss",
    "UNEPTOutput",
    "create_model",
    "list_models",
    "register_dataset",
]
