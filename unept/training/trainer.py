"""Train a model (Sec. 4.2, Training): the loop, its records, evaluations and checkpoints, on one process or many."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import distributed
from ..config import TrainConfig
from ..data import DatasetError, SegmentationDataset
from ..data.loader import Batch, training_loader
from ..data.photometric import distort
from ..data.transforms import train_transform
from ..evaluation.evaluator import evaluate_model
from ..memory import memory_advice, out_of_memory
from ..model.loss import Targets, UNEPTLoss
from ..model.network import UNEPT
from ..model.output import TrainableModel
from ..pictures.figures import draw_samples
from . import run_folder
from .checkpoint import TrainingState, checkpoints, save_checkpoint, save_model
from .class_weights import class_weights
from .depthwise import prepare_for_cpu_bfloat16
from .losses import Losses, average_over_ranks, reduce_losses
from .optimizer import average_weights, build_optimizer, build_scheduler
from .recorder import Recorder
from .throughput import Throughput, peak_memory


class Trainer:
    """Train one model in one run folder.

    The folder holds config.json, metrics.jsonl (a line every `log_every` steps and one per evaluation), TensorBoard
    events, checkpoints/, samples/, curves.png, and in model/ the best model so far by validation mIoU.

    Where a process group is initialised, every rank makes a Trainer: each trains on its share of each batch, all hold
    the same model, and rank 0 writes.

    Args:
        config: options of the run.
        out: the run folder.
        device: device to train on; None chooses it by `config.device`.

    Attributes:
        model: the network that is trained.
        averaged: the average of its weights (`TrainConfig.ema`), or None.
        step: optimiser steps completed.
        best: highest validation mIoU so far, -1 before the first evaluation.
        scores: result of the last evaluation (`evaluate_model`); empty before the first.

    Raises:
        ValueError: the batch cannot be split over the ranks, or the data or the weights cannot be used.
    """

    def __init__(self, config: TrainConfig, out: Path, device: torch.device | None = None):
        self.config, self.out = config, out
        self.device = device or distributed.choose_device(config.device)
        self.local_batch = distributed.run_on_main(
            lambda: distributed.split_batch(config.batch_size, config.accumulate)
        )
        torch.manual_seed(config.seed)
        self.train_set, self.validation_set = distributed.run_on_main(self.build_datasets)
        self.resumes = distributed.run_on_main(lambda: run_folder.should_resume(config, out))
        self.model = self.build_model().to(self.device)
        weights = distributed.run_on_main(lambda: class_weights(config, self.train_set))
        self.loss = self.build_loss(weights).to(self.device)
        cuda = self.device.type == "cuda"
        self.amp = cuda if config.amp == "auto" else config.amp == "bf16"
        if self.amp and not cuda:
            prepare_for_cpu_bfloat16(self.model)
        self.network = distributed.parallel(self.model, self.device)
        self.forward, self.compute_losses, self.distort = self.network, self.loss.losses, distort
        if config.compile == "on" or (config.compile == "auto" and cuda):
            self.forward = torch.compile(self.forward)
            self.compute_losses = torch.compile(self.compute_losses)
            self.distort = torch.compile(self.distort)
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = build_scheduler(self.optimizer, config)
        self.averaged = average_weights(self.model, config.ema) if config.ema else None
        self.inference = config.inference()
        self.step = 0
        self.best = -1.0
        self.scores: dict[str, Any] = {}
        self.loss_history: list[Losses] = []  # of the steps since the last record, on the device
        self.recorder: Recorder | None = None  # only on rank 0
        self.throughput = Throughput(self.device, config.data.workers, distributed.world_size())
        self.skipped_before = 0  # bad samples on all ranks before the run was resumed

    def build_datasets(self) -> list[SegmentationDataset]:
        """Return the training and the validation set, after reading some of their files."""
        datasets = [self.config.data.build(split) for split in ("train", "val")]
        for dataset in datasets:
            dataset.check(sample=20)
        return datasets

    def build_model(self) -> TrainableModel:
        """Return the network as it is before the first step. A subclass may return another one."""
        options = self.config.model.options()
        if distributed.run_on_main(lambda: self.resumes and bool(checkpoints(self.out / "checkpoints"))):
            # The checkpoint holds all weights, and the file or the network that the first ones came from may be gone.
            options.update(pretrained_backbone=False, backbone_weights=None)
        return UNEPT(
            len(self.train_set.classes), classes=self.train_set.classes, palette=self.train_set.palette, **options
        )

    def build_loss(self, class_weights: Tensor | None) -> UNEPTLoss:
        """Return the loss. A subclass that trains another network may return another one."""
        return UNEPTLoss(
            self.config.loss_weights,
            self.train_set.ignore_index,
            class_weights,
            num_directions=self.config.model.num_directions,
            direction_pixels=self.config.direction_pixels,
            boundary_balance=self.config.boundary_balance,
        )

    def train(self) -> dict[str, Any]:
        """Train to the last step, from the last checkpoint if the run is continued.

        Returns:
            The scores of the last evaluation (`evaluate_model`).

        Raises:
            ValueError: the run folder holds a run with other options or classes.
            DatasetError: a training sample cannot be read.
            FloatingPointError: a loss became NaN or infinite.
            MemoryError: the memory of the GPU or of the machine is used up.
            OSError: the disk is full or not writable.
        """
        self.setup_run_folder()
        self.loader = self.build_loader()
        batches, advice = iter(self.loader), memory_advice(self.config, self.local_batch)
        self.model.train()
        self.throughput.start()
        with tqdm(
            total=self.config.iterations,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=not distributed.is_main(),
        ) as bar:
            while self.step < self.config.iterations:
                batch = self._next_batch(batches)
                with out_of_memory(advice), self.throughput.step(len(batch.images), batch.seconds):
                    self.loss_history.append(self.train_step(*self.prepare_batch(batch)))
                self.step += 1
                bar.update()
                self._after_step(bar)
        if (skipped := self.count_skipped()) and distributed.is_main():
            print(f"{skipped} times another image has replaced one that cannot be read")
        if self.recorder is not None:
            self.recorder.close()
        return self.scores or self.evaluate()  # a run that had ended before has not been evaluated by this process

    def setup_run_folder(self) -> None:
        """Create the run folder, or continue the run in it; on rank 0, start its records."""
        state = distributed.run_on_main(
            lambda: run_folder.open_run_folder(self.config, self.out, self.model.classes, self.resumes)
        )
        if state is not None:
            self.restore(state)
        if distributed.is_main():
            self.recorder = Recorder(self.out, self.step)

    def restore(self, state: TrainingState) -> None:
        """Continue from a checkpoint."""
        self.model.load_state_dict(state.model)
        if self.averaged is not None and state.averaged is not None:
            self.averaged.load_state_dict(state.averaged)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.last_epoch = state.scheduler["last_epoch"]
        self.step, self.best, self.skipped_before = state.step, state.best, state.skipped
        self.loss_history = [
            {name: loss.to(self.device) for name, loss in losses.items()} for losses in state.loss_history
        ]

    def build_loader(self) -> Any:
        """Return the endless loader of this rank's training batches, from the next step on."""
        data = self.config.data
        transform = train_transform(
            data.crop_size,
            short_side=data.short_side,
            long_side=data.long_side,
            scale=data.scale,
            cat_max_ratio=data.cat_max_ratio,
            flip=data.flip,
            photometric=data.photometric,
            fill=tuple(round(255 * mean) for mean in self.model.backbone.mean),
        )
        return training_loader(
            self.train_set,
            transform,
            batch_size=self.local_batch,
            seed=self.config.seed,
            start_step=self.step,
            workers=data.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            on_bad_sample=data.on_bad_sample,
        )

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch; if a file of it cannot be read, save a checkpoint before the error is raised."""
        try:
            return next(batches)
        except DatasetError:
            # The other ranks do not know of the error, so they cannot take part in the reductions of saving.
            if distributed.world_size() == 1:
                self.save()
            raise

    def prepare_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Move a batch to the device and distort the colours of its images.

        Returns:
            Images (B, 3, h, w) and labels (B, h, w), both uint8.
        """
        images = batch.images.to(self.device, non_blocking=True)
        if batch.params is not None:
            images = self.distort(images, batch.params.to(self.device, non_blocking=True))
        return images, batch.labels.to(self.device, non_blocking=True)

    def train_step(self, images: Tensor, labels: Tensor) -> Losses:
        """Take one optimiser step on this rank's share of a batch.

        Every loss is divided by the pixel counts of the whole batch, so that neither the number of ranks nor
        `accumulate` changes the gradient. (Batch normalisation does depend on `accumulate`: its statistics are those
        of a part.)

        Args:
            images: this rank's images (B, 3, H, W), uint8.
            labels: their labels (B, H, W), integer.

        Returns:
            Losses by name. Their means over the ranks are the losses of the whole batch.
        """
        self._seed_step()
        with torch.no_grad():
            targets = self.loss.targets(labels, boundaries=self.model.refines)
            targets = targets._replace(counts=distributed.mean_over_ranks(targets.counts))
        size = len(images) // self.config.accumulate
        parts = [
            self.forward_backward(
                images[start : start + size], targets.part(start, start + size), last=start + size == len(images)
            )
            for start in range(0, len(images), size)
        ]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return {name: torch.stack([losses[name] for losses in parts]).sum() for name in parts[0]}

    def _seed_step(self) -> None:
        """Seed dropout by the run's seed, the step and the rank, so that a run resumes without a random state."""
        entropy = (self.config.seed, 2, self.step, distributed.rank())
        (seed,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(seed))

    def forward_backward(self, images: Tensor, targets: Targets, last: bool) -> Losses:
        """Add the gradients of one part of the batch; with the last part, average them over the ranks."""
        accumulates = isinstance(self.network, DistributedDataParallel) and not last
        with self.network.no_sync() if accumulates else contextlib.nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                output = self.forward(images)
            losses = self.compute_losses(output, targets)
            losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _after_step(self, bar: tqdm) -> None:
        """Log, validate and save where the options say so, and after the last step."""
        config, last = self.config, self.step == self.config.iterations
        if self.step % config.log_every == 0 or last:
            bar.set_postfix(self.log())
        if self.step % config.eval_every == 0 or last:
            self.validate()
        if self.step % config.checkpoint_every == 0 or last:
            self.save()

    def log(self) -> dict[str, str]:
        """Record the mean losses since the last record, the learning rate and the throughput.

        Returns:
            What the progress bar shows.
        """
        means, rates = self.reduce_losses(), self.throughput.rates()
        self.loss_history.clear()
        lr = self.optimizer.param_groups[0]["lr"]
        line = {"step": self.step, **means, "lr": lr, **rates}
        if self.config.data.on_bad_sample == "skip":
            line["skipped"] = self.count_skipped()
        self._record(line)
        shown = {"loss": f"{means['loss']:.3f}", "lr": f"{lr:.1e}"}
        for label, key in (("img/s", "images_per_s"), ("step", "step_images_per_s"), ("loader", "loader_images_per_s")):
            shown[label] = f"{rates[key]:.1f}"
        if (memory := peak_memory(self.device)) is not None:
            shown["GiB"] = f"{memory:.1f}"
        return shown

    def reduce_losses(self) -> dict[str, float]:
        """Average each loss over the ranks and the steps since the last record.

        Raises:
            FloatingPointError: a loss of one of the steps is NaN or infinite (`losses.reduce_losses`).
        """
        try:
            return reduce_losses(self.loss_history, self.step)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}. The last checkpoint and the best model so far are kept in {self.out}; lower the learning "
                "rate (--lr), add --warmup, or try --amp off"
            ) from None

    def _record(self, line: dict[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.write(line)

    @property
    def evaluated_model(self) -> TrainableModel:
        """The model that is evaluated and saved: the average of the weights if the run keeps one, else `model`."""
        return self.model if self.averaged is None else self.averaged.module

    def validate(self) -> None:
        """Evaluate the model, record its scores, draw samples and curves, and save the model if it is the best."""
        self.throughput.stop()
        if self.loss_history:
            self.reduce_losses()  # a diverged model must not become the best
        with out_of_memory("during the evaluation, which sees whole images: --window sees them in parts"):
            self.scores = self.evaluate()
        better = self.best < 0 or self.scores["mIoU"] > self.best
        if better:
            self.best = self.scores["mIoU"]
        if self.recorder is not None:
            self._record({"step": self.step, **{k: v for k, v in self.scores.items() if isinstance(v, (int, float))}})
            self._draw_samples()
            self.recorder.draw_curves()
            if better:
                save_model(self.evaluated_model, self.out / "model", self.config, self.step, self.scores)
        self.model.train()
        self.throughput.start()

    def evaluate(self) -> dict[str, Any]:
        """Return the scores of the model on the validation set (`evaluate_model`)."""
        return evaluate_model(
            self.evaluated_model,
            self.validation_set,
            self.inference,
            self.device,
            self.config.boundary_tolerance,
            workers=self.config.data.workers,
            on_bad_sample=self.config.data.on_bad_sample,
        )

    def _draw_samples(self) -> None:
        if self.config.num_samples:
            draw_samples(
                self.evaluated_model,
                self.validation_set,
                self.config.num_samples,
                self.inference,
                self.device,
                self.out / "samples" / f"step_{self.step:08d}.png",
                self.config.data.on_bad_sample,
            )

    def save(self) -> None:
        """Save a checkpoint on rank 0; all ranks have to call it."""
        if self.loss_history:
            self.reduce_losses()  # a diverged model must not replace a good checkpoint
        self.loss_history = average_over_ranks(self.loss_history)
        skipped = self.count_skipped()
        if not distributed.is_main():
            return
        state = TrainingState(
            step=self.step,
            classes=self.model.classes,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler={"last_epoch": self.scheduler.last_epoch},
            loss_history=self.loss_history,
            best=self.best,
            skipped=skipped,
            averaged=None if self.averaged is None else self.averaged.state_dict(),
        )
        save_checkpoint(self.out / "checkpoints", self.step, state.to_dict())

    def count_skipped(self) -> int:
        """Return how often another sample has replaced one that cannot be read, in the whole run and over all ranks."""
        if self.config.data.on_bad_sample == "error":
            return 0
        return self.skipped_before + distributed.sum_over_ranks(self.loader.skipped, self.device)
