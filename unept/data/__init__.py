"""Datasets, training transforms and loaders (Sec. 4.1, 4.2)."""

from .ade20k import ADE20K
from .base import SPLITS, DatasetError, SegmentationDataset
from .camvid import CamVid
from .check import check_splits
from .cityscapes import Cityscapes
from .files import FileDataset
from .folder import ImageFolder
from .loader import TrainingSampler, TransformedDataset, evaluation_loader, image_loader, training_loader
from .pascal_context import PascalContext
from .registry import DATASETS, DatasetEntry, build_dataset, register_dataset
from .shapes import Shapes
from .transforms import eval_transform, train_transform

__all__ = [
    "ADE20K",
    "DATASETS",
    "SPLITS",
    "CamVid",
    "Cityscapes",
    "DatasetEntry",
    "DatasetError",
    "FileDataset",
    "ImageFolder",
    "PascalContext",
    "SegmentationDataset",
    "Shapes",
    "TrainingSampler",
    "TransformedDataset",
    "build_dataset",
    "check_splits",
    "eval_transform",
    "evaluation_loader",
    "image_loader",
    "register_dataset",
    "train_transform",
    "training_loader",
]
