"""Heads of the networks that Tables 1, 7 and 8 compare with, written from their papers, on this project's backbones.

A head takes the feature maps of `unept.model.backbone.Backbone`, finest first, and gives a `HeadOutput`; see
`bench.heads.network` for the network around it, `bench.heads.loss` for its loss and `bench.heads.training` for its
trainer.
"""

from .anl import ANLHead
from .base import Head, HeadOutput
from .ccnet import CCNetHead
from .dnlnet import DNLNetHead
from .encnet import EncNetHead
from .loss import HeadLoss
from .network import HEADS, HeadNetwork, build_network
from .ocrnet import OCRNetHead
from .pointrend import PointRendHead
from .psanet import PSANetHead
from .setr import SETRNaiveHead, SETRProgressiveHead
from .training import ComparedTrainer

__all__ = [
    "HEADS",
    "ANLHead",
    "CCNetHead",
    "ComparedTrainer",
    "DNLNetHead",
    "EncNetHead",
    "Head",
    "HeadLoss",
    "HeadNetwork",
    "HeadOutput",
    "OCRNetHead",
    "PSANetHead",
    "PointRendHead",
    "SETRNaiveHead",
    "SETRProgressiveHead",
    "build_network",
]
