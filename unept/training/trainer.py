"""Train a model (Sec. 4.2, Training): the loop, its records, evaluations and checkpoints, on one process or many."""

import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..allocator import freed_memory_kept
from ..config import TrainConfig
from ..data import DatasetError, SegmentationDataset
from ..data.augmentation import build_transform
from ..data.check import check_before_run
from ..data.loader import Batch
from ..data.photometric import distort
from ..evaluation.evaluator import evaluate_model
from ..kernels.backend import runs_on_triton
from ..memory import memory_advice, out_of_memory
from ..model.loss import Targets, UNEPTLoss
from ..model.network import UNEPT
from ..model.output import TrainableModel
from ..pictures.figures import draw_samples
from ..plugins import import_modules
from ..precision import uses_bfloat16
from ..progress import Progress, step_progress
from . import run_folder
from .acceleration import compile_kernels, compiled
from .batches import build_loader
from .checkpoint import describe_saved, divergence_advice, save_checkpoint, save_model
from .depthwise import prepare_for_cpu_bfloat16
from .fine_tuning import prepare_model
from .freezing import freeze, training_mode
from .history import add_to_history
from .interruption import Stopped, StopSignals
from .lock import locked
from .losses import Losses, average_over_ranks, build_loss, reduce_losses
from .optimizer import AverageOfWeights, build_optimizer, build_scheduler, clip_gradients
from .recorder import Recorder
from .state import RunningStatistics, TrainingState
from .throughput import Throughput, peak_memory
from .trackers import check_tracker, start_tracker


class Trainer:
    """Train one model in one run folder.

    The folder holds config.json, metrics.jsonl (a line every `log_every` steps and one per evaluation), history.jsonl
    (a line per start and stop), TensorBoard events, checkpoints/, samples/, curves.png, and in model/ the best model so
    far by validation mIoU.

    Where a process group is initialised, every rank makes a Trainer: each trains on its share of each batch, all hold
    the same model, and rank 0 writes.

    Args:
        config: options of the run.
        out: the run folder.
        device: device to train on; None chooses it by `config.device`.
        augmentation: takes the place of this package's own (`unept.data.augmentation`).

    Attributes:
        model: the network that is trained.
        averaged: the average of its weights (`TrainConfig.ema`), or None.
        needs_state: whether the network was made without pretrained weights, as a checkpoint holds them all.
        step: optimiser steps completed.
        samples: images drawn for them, on all ranks.
        best: highest validation mIoU so far, -1 before the first evaluation.
        stale: number of evaluations since that one.
        scores: result of the last evaluation (`evaluate_model`); empty before the first.
        boundary_tolerance: what evaluations are given under this name, by default `TrainConfig.boundary_tolerance`.

    Raises:
        ValueError: the batch cannot be split over the ranks, a package is missing, or the data or the weights cannot be
            used.
    """

    def __init__(self, config: TrainConfig, out: Path, device: torch.device | None = None, augmentation: Any = None):
        distributed.run_on_main(lambda: import_modules(config.data.imports))  # what is not found is told once
        import_modules(config.data.imports)  # as rank 0 hands the data sets to the others
        self.config, self.out = config, out
        self.device = device or distributed.choose_device(config.device)
        self.local_batch = distributed.run_on_main(
            lambda: distributed.split_batch(config.batch_size, config.accumulate)
        )
        distributed.run_on_main(lambda: check_tracker(config))
        torch.manual_seed(config.seed)
        self.train_set, self.validation_set = distributed.run_on_main(self.build_datasets)
        self.resumes = distributed.run_on_main(lambda: run_folder.should_resume(config, out))
        self.needs_state = distributed.run_on_main(lambda: self.resumes and run_folder.holds_state(out))
        self.model = self.build_model().to(self.device)
        freeze(self.model, config.recipe)
        self.loss = self.build_loss().to(self.device)
        self.transform = build_transform(config.data, self.model.backbone.mean, augmentation)
        if config.matmul_precision == "high":
            torch.set_float32_matmul_precision("high")
        self.amp = uses_bfloat16(config.amp, self.device.type)
        if self.amp and self.device.type == "cpu":
            prepare_for_cpu_bfloat16(self.model)
        self.network = distributed.parallel(self.model, self.device)
        functions = compiled(config, self.device, self.network, self.loss.losses, distort)
        self.forward, self.compute_losses, self.distort = functions
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = build_scheduler(self.optimizer, config)
        self.averaged = AverageOfWeights(self.model, config.ema) if config.ema else None
        self.inference = config.inference()
        self.boundary_tolerance: float | Sequence[float] = config.boundary_tolerance
        self.step, self.samples = 0, 0
        self.statistics = RunningStatistics(self.model)
        self.best, self.stale = -1.0, 0
        self.evaluated = True  # False while an evaluation that is due at this step has not been completed
        self.intact = True  # False while the optimiser changes the weights
        self.signals = StopSignals()
        self.scores: dict[str, Any] = {}
        self.loss_history: list[Losses] = []  # of the steps since the last record, on the device
        self.recorder: Recorder | None = None  # only on rank 0
        self.throughput = Throughput(self.device, config.data.workers, distributed.world_size())
        self.skipped_before = 0  # bad samples on all ranks before the run was resumed

    def build_datasets(self) -> list[SegmentationDataset]:
        """Return the training and the validation set, after reading some of their files."""
        datasets = [self.config.data.build(split) for split in ("train", "val")]
        for split, dataset in zip(("train", "val"), datasets, strict=True):
            for warning in check_before_run(dataset, split, self.config.data.workers, self.config.data.on_bad_sample):
                print(f"warning: {warning}", file=sys.stderr)
        return datasets

    def build_model(self) -> TrainableModel:
        """Return the network as it is before the first step. A subclass may return another one."""
        options, classes = self.config.model.options(), self.train_set.classes
        if self.needs_state:
            # The checkpoint holds all weights, and the file or the network that the first ones came from may be gone.
            options.update(pretrained_backbone=False, backbone_weights=None)
        model = UNEPT(len(classes), classes=classes, palette=self.train_set.palette, **options)
        return prepare_model(model, self.config.recipe, self.needs_state)

    def build_loss(self) -> UNEPTLoss:
        """Return the loss. A subclass that trains another network may return another one."""
        return build_loss(self.config, self.train_set)

    def train(self) -> dict[str, Any]:
        """Train to the last step, from the last checkpoint if the run is continued.

        Returns:
            The scores of the last evaluation (`evaluate_model`).

        Raises:
            FileExistsError: another run trains in the run folder, or it holds a run that is not to be continued.
            ValueError: the run folder holds a run with other classes, or options with which it cannot be continued.
            DatasetError: a training sample cannot be read.
            FloatingPointError: a loss or a weight became NaN or infinite.
            MemoryError: the memory of the GPU or of the machine is used up.
            OSError: the disk is full or not writable.
            Stopped: a signal stopped the run (`StopSignals`), after its state was saved.
        """
        with locked(self.out), self.signals, freed_memory_kept(self.device.type == "cpu"):
            self.setup_run_folder()
            self.loader = self.build_loader()
            if not self.evaluated:
                self.validate()
            training_mode(self.model)
            self.throughput.start()
            self._train_steps()
            if (skipped := self.count_skipped()) and distributed.is_main():
                print(f"{skipped} times another image has replaced one that cannot be read")
            if self.recorder is not None:
                self.recorder.close()
            if not self.scores:  # a run that had ended before has not been evaluated by this process
                self.scores = self.evaluate()
                self._stop(self.signals.now())
            return self.scores

    def _train_steps(self) -> None:
        batches, advice, first = iter(self.loader), memory_advice(self.config, self.local_batch), self.step
        with step_progress(self.config.iterations, self.step, distributed.is_main()) as bar:
            while not self.ended:
                self.statistics.keep()
                with self._saved_before_error():
                    batch = next(batches)
                    with out_of_memory(advice):
                        if self.step == first and runs_on_triton(next(self.model.parameters())):
                            compile_kernels(partial(self.rehearse, *self.prepare_batch(batch)), self.device)
                        with self.throughput.step(len(batch.images), batch.seconds):
                            losses = self.train_step(*self.prepare_batch(batch))
                self.loss_history.append(losses)
                self.step += 1
                self.samples += self.config.batch_size
                bar.update()
                self._after_step(bar)

    @property
    def ended(self) -> bool:
        """Whether the last step is done, or `patience` evaluations in a row were not better than the best."""
        patience = self.config.recipe.patience
        return self.step >= self.config.iterations or 0 < patience <= self.stale

    def setup_run_folder(self) -> None:
        """Create the run folder, or continue the run in it; on rank 0, start its records."""
        state: TrainingState | None = distributed.run_on_main(
            lambda: run_folder.open_run_folder(self.config, self.out, self.model.classes, self.resumes)
        )
        if state is not None:
            state.restore(self)
        elif self.needs_state:
            raise ValueError(
                f"the checkpoints in {self.out} are gone since this process started, and the network was made without "
                "pretrained weights: start again"
            )
        if distributed.is_main():
            tracker = start_tracker(self.config, self.out)
            self.recorder = Recorder(self.out, self.step, evaluated=self.evaluated, tracker=tracker)

    def build_loader(self) -> Any:
        """Return the endless loader of this rank's training batches, from the next step on."""
        return build_loader(self.config, self.train_set, self.transform, self.local_batch, self.samples)

    @contextlib.contextmanager
    def _saved_before_error(self) -> Iterator[None]:
        """Save a checkpoint before an error is raised that leaves the weights of the step before as they are."""
        try:
            yield
        except (DatasetError, MemoryError) as error:
            # The other ranks do not know of the error, so they cannot take part in the reductions of saving.
            if distributed.world_size() == 1 and self.intact:
                self.optimizer.zero_grad(set_to_none=True)
                self.statistics.restore()
                self.save()
            if isinstance(error, MemoryError):
                raise MemoryError(f"{error}. {describe_saved(self.out)}") from error
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
        clip_gradients(self.model, self.config.recipe.clip_grad)
        self.intact = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.intact = True
        return {name: torch.stack([losses[name] for losses in parts]).sum() for name in parts[0]}

    def rehearse(self, images: Tensor, labels: Tensor) -> None:
        """Run forward and backward of a copy of the network on a part of a batch, eagerly.

        The network, its gradients and its statistics stay as they are. The copy's batch normalisation takes the running
        statistics, so that no rank waits here for another.

        Args:
            images, labels: as `train_step` takes them.
        """
        copied = copy.copy(self)
        network = copied.model = copied.network = copied.forward = copy.deepcopy(self.model)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        copied.compute_losses = self.loss.losses  # not compiled
        part = len(images) // self.config.accumulate
        with torch.no_grad():
            targets = self.loss.targets(labels, boundaries=network.refines)
        copied.forward_backward(images[:part], targets.part(0, part), last=True)

    def _seed_step(self) -> None:
        """Seed dropout by the run's seed, the step and the rank, so that a run resumes without a random state."""
        entropy = (self.config.seed, 2, self.step, distributed.rank())
        (seed,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(seed))

    def forward_backward(self, images: Tensor, targets: Targets, last: bool) -> Losses:
        """Add the gradients of one part of the batch; with the last part, average them over the ranks."""
        accumulates = isinstance(self.network, DistributedDataParallel) and not last
        with self.network.no_sync() if accumulates else contextlib.nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp), _advised(images):
                output = self.forward(images)
            losses = self.compute_losses(output, targets)
            losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _after_step(self, bar: Progress) -> None:
        """Log, save and validate where the options say so, and after the last step; stop where a signal asks for it."""
        config, last = self.config, self.step == self.config.iterations
        stop = self.signals.after_step()
        if self.step % config.log_every == 0 or last:
            bar.set_postfix(self.log())
        self.evaluated = self.step % config.eval_every != 0 and not last
        if stop or not self.evaluated or self.step % config.checkpoint_every == 0:
            self.save()
        self._stop(stop)
        if not self.evaluated:
            self.validate()

    def _stop(self, number: int) -> None:
        """End the run after its state was saved, if a signal asks for it (its number, or 0)."""
        if number:
            if self.recorder is not None:
                self.recorder.close()
            distributed.run_on_main(lambda: add_to_history(self.out, "stop", self.step, signal=number))
            raise Stopped(number, self.step)

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
            raise FloatingPointError(f"{error}. {divergence_advice(self.out)}") from None

    def _record(self, line: dict[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.write(line)

    @property
    def evaluated_model(self) -> TrainableModel:
        """The model that is evaluated and saved: the average of the weights if the run keeps one, else `model`."""
        return self.model if self.averaged is None else self.averaged.module

    def validate(self) -> None:
        """Evaluate the model, record its scores, draw samples and curves, save the model if it is the best, and save.

        A checkpoint from before the evaluation has to be there: what interrupts it costs the evaluation alone.
        """
        self.throughput.stop()
        with out_of_memory(f"while evaluating whole images: --window sees them in parts. {describe_saved(self.out)}"):
            self.scores = self.evaluate()
        self._stop(self.signals.now())
        better = not self.best >= 0 or self.scores["mIoU"] > self.best  # no score so far may be NaN, too
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = self.scores["mIoU"]
        if self.recorder is not None:
            self._record({"step": self.step, **{k: v for k, v in self.scores.items() if isinstance(v, (int, float))}})
            self._draw_samples()
            self.recorder.draw_curves()
            if better:
                save_model(self.evaluated_model, self.out / "model", self.config, self.step, self.scores)
        self.evaluated = True
        self.save()
        training_mode(self.model)
        self.throughput.start()

    def evaluate(self) -> dict[str, Any]:
        """Return the scores of the model on the validation set (`evaluate_model`)."""
        return evaluate_model(
            self.evaluated_model,
            self.validation_set,
            self.inference,
            self.device,
            self.boundary_tolerance,
            workers=self.config.data.workers,
            on_bad_sample=self.config.data.on_bad_sample,
            should_stop=lambda: bool(self.signals.received),
        )

    def _draw_samples(self) -> None:
        if count := self.config.num_samples:
            path, on_bad = self.out / "samples" / f"step_{self.step:08d}.png", self.config.data.on_bad_sample
            draw_samples(self.evaluated_model, self.validation_set, count, self.inference, self.device, path, on_bad)

    def save(self) -> None:
        """Save a checkpoint on rank 0; all ranks have to call it."""
        if self.loss_history:
            self.reduce_losses()  # a diverged model must not replace a good checkpoint
        self.loss_history = average_over_ranks(self.loss_history)
        state = TrainingState.of(self, self.count_skipped())
        try:
            distributed.run_on_main(lambda: save_checkpoint(self.out / "checkpoints", state))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. {divergence_advice(self.out)}") from None

    def count_skipped(self) -> int:
        """Return how often another sample has replaced one that cannot be read, in the whole run and over all ranks."""
        if self.config.data.on_bad_sample == "error":
            return 0
        return self.skipped_before + distributed.sum_over_ranks(self.loader.skipped, self.device)


@contextlib.contextmanager
def _advised(images: Tensor) -> Iterator[None]:
    """Say what to do where batch normalisation has a single value per channel, whose deviation is zero."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        height, width = images.shape[2:]
        raise ValueError(
            f"batch normalisation needs more than one value per channel, but the network sees {len(images)} image of "
            f"{width}x{height} pixels at once, of which a map of the backbone has one: give a larger --batch-size, a "
            "larger --crop-size, or fewer parts with --accumulate"
        ) from error
