"""The networks that are compared: random weights, 150 classes, nothing downloaded."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unept.kernels import use_backend
from unept.model.loss import UNEPTLoss
from unept.model.network import UNEPT
from unept.model.output import class_ids

from .baselines import imported
from .harness import DEVICE

CLASSES = 150
BLOCKS = 5  # segments of a label map, each way

AMP = DEVICE == "cuda"  # bfloat16 autocast
# What gates compare with, eager and on the torch backend: on CUDA float32, that double convolutions take no minutes.
REFERENCE = torch.float32 if DEVICE == "cuda" else torch.float64


@contextlib.contextmanager
def as_reference(module: nn.Module, dtype: torch.dtype = REFERENCE) -> Iterator[None]:
    """The module in this dtype on the torch backend; afterwards it has its float32 weights back, to the bit."""
    with use_backend("torch"):
        module.to(dtype)
        try:
            yield
        finally:
            module.float()


@dataclass
class Network:
    """A network, its training loss and its prediction at full size; `amp`: the network itself under autocast."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor, bool], Tensor]
    """images (B, 3, H, W) float, labels (B, H, W) int64, amp -> scalar."""
    ids: Callable[[Tensor, bool], Tensor]
    """images, amp -> class ids (B, H, W)."""
    compiles: bool = True
    reference: torch.dtype = REFERENCE


def autocast(amp: bool) -> torch.autocast:
    """bfloat16 if `amp`."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=amp)


def unept(backbone: str) -> Network:
    """This project's network, as `unept.train` runs it: the model under autocast, the loss of Eq. 7 outside."""
    model, loss = UNEPT(CLASSES, backbone).to(DEVICE), UNEPTLoss()

    def loss_of(images: Tensor, labels: Tensor, amp: bool) -> Tensor:
        with autocast(amp):
            output = model(images)
        return loss(output, labels)["loss"]

    def ids_of(images: Tensor, amp: bool) -> Tensor:
        with autocast(amp):
            return model.predict(images)

    return Network(model, loss_of, ids_of)


def from_smp(architecture: str) -> Network:
    """DeepLabV3Plus or UPerNet of segmentation-models-pytorch on its ResNet-50, cross-entropy at full size."""
    smp = imported("segmentation_models_pytorch", "segmentation-models-pytorch")
    model = getattr(smp, architecture)(encoder_name="resnet50", encoder_weights=None, classes=CLASSES).to(DEVICE)

    def loss_of(images: Tensor, labels: Tensor, amp: bool) -> Tensor:
        with autocast(amp):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels, ignore_index=255)

    def ids_of(images: Tensor, amp: bool) -> Tensor:
        with autocast(amp):
            return model(images).argmax(1)

    return Network(model, loss_of, ids_of)


def mask2former() -> Network:
    """Mask2Former of transformers on its ResNet-50, 100 queries; eager: its matching does not compile."""
    imported("scipy", "scipy")
    library = imported("transformers", "transformers")
    backbone = library.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = library.Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES)
    model = library.Mask2FormerForUniversalSegmentation(config).to(DEVICE)

    def loss_of(images: Tensor, labels: Tensor, amp: bool) -> Tensor:
        classes = [image.unique() for image in labels]
        masks = [(image == found[:, None, None]).to(images.dtype) for image, found in zip(labels, classes, strict=True)]
        with autocast(amp):
            return model(pixel_values=images, mask_labels=masks, class_labels=classes).loss

    def ids_of(images: Tensor, amp: bool) -> Tensor:
        with autocast(amp):
            output = model(pixel_values=images)
        # Each query votes for its classes (the last is "none") where its mask is; smallest first, then up-sampled.
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = output.masks_queries_logits.float().sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)
        return F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False).argmax(1)

    return Network(model, loss_of, ids_of, compiles=False, reference=torch.float32)  # its loss takes no float64


def with_head(name: str, backbone: str) -> Network:
    """A network of `bench.heads`, with its auxiliary classifiers in the loss."""
    from .heads import HEADS, HeadLoss, build_network  # they load the trainer, which is not needed elsewhere

    stride = HEADS[name].output_stride if backbone.startswith("resnet") else None
    names, palette = [f"class {k}" for k in range(CLASSES)], [(0, 0, 0)] * CLASSES
    model, loss = build_network(name, names, palette, backbone, output_stride=stride).to(DEVICE), HeadLoss()

    def loss_of(images: Tensor, labels: Tensor, amp: bool) -> Tensor:
        with autocast(amp):
            output = model(images)
        return loss(output, labels)["loss"]

    def ids_of(images: Tensor, amp: bool) -> Tensor:
        with autocast(amp):
            return class_ids(model(images), images.shape[2:], None)

    return Network(model, loss_of, ids_of)


# Heads of bench.heads by the kind of backbone that they take.
CONVOLUTIONAL_HEADS = ("CCNet", "OCRNet", "ANL", "DNLNet", "PointRend", "PSANet", "EncNet")
VIT_HEADS = ("SETR naive", "SETR PUP")
BUILDERS: dict[str, Callable[[str], Network]] = {
    "unept triton": unept,
    "unept torch": unept,
    "DeepLabV3+": lambda backbone: from_smp("DeepLabV3Plus"),
    "UPerNet": lambda backbone: from_smp("UPerNet"),
    "Mask2Former, eager": lambda backbone: mask2former(),
    **{name: partial(with_head, name) for name in (*CONVOLUTIONAL_HEADS, *VIT_HEADS)},
}
PACKAGES = {
    "DeepLabV3+": "segmentation-models-pytorch",
    "UPerNet": "segmentation-models-pytorch",
    "Mask2Former, eager": "transformers",
}


def sample_batch(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Normalised images (B, 3, size, size) and labels (B, size, size) of 5x5 squares, each of a random class."""
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    squares = torch.randint(0, CLASSES, (batch, 1, BLOCKS, BLOCKS), device=DEVICE).float()
    return images, F.interpolate(squares, (size, size), mode="nearest")[:, 0].long()
