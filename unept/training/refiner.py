"""Train a `Refiner` on the labels of a data set; no model whose predictions it will refine is needed."""

import math
from itertools import islice

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..data.base import SegmentationDataset
from ..data.loader import training_loader
from ..data.photometric import distort
from ..data.transforms import train_transform
from ..model.loss import UNEPTLoss
from ..model.refiner import Refiner


def train_refiner(
    refiner: Refiner,
    dataset: SegmentationDataset,
    *,
    iterations: int = 2000,
    batch_size: int = 8,
    crop_size: int | tuple[int, int] = 256,
    lr: float = 1e-3,
    workers: int = 0,
    seed: int = 0,
) -> list[float]:
    """Train with AdamW under a cosine schedule, on random crops as a network is trained on, and leave evaluation mode.

    Args:
        refiner: on the device where it is to be trained; it is changed in place.
        dataset: images with labels; its classes do not matter, only where they meet.
        iterations: number of steps.
        batch_size: crops per step.
        crop_size: height and width of a crop in pixels, or one int for both.
        lr: the learning rate at the start.
        workers: processes that prepare batches.
        seed: of the crops' order.

    Returns:
        The loss of each step.
    """
    loader = training_loader(dataset, train_transform(crop_size), batch_size, seed, workers=workers)
    num_directions = refiner.options["num_directions"]
    criterion = UNEPTLoss(ignore_index=dataset.ignore_index, num_directions=num_directions)
    optimizer = torch.optim.AdamW(refiner.parameters(), lr, weight_decay=1e-4)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / iterations)))
    device, losses = refiner.mean.device, []
    refiner.train()
    for batch in islice(loader, iterations):
        images, labels = batch.images.to(device), batch.labels.to(device)
        if batch.params is not None:
            images = distort(images, batch.params.to(device))
        loss = refiner.loss(images, labels, criterion)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    refiner.eval()
    return torch.stack(losses).tolist()
