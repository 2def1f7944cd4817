"""Train a model (Sec. 4.2, Training): `python -m unept.train [PRESET] [--options]`."""

import contextlib
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import cli, distributed
from .config import TrainConfig
from .data import DatasetError, SegmentationDataset, check_splits
from .data.loader import Batch, training_loader
from .data.photometric import distort
from .data.transforms import train_transform
from .evaluate import draw_samples, evaluate_model, format_table
from .model.loss import Targets, UNEPTLoss
from .model.network import UNEPT
from .presets import PRESETS
from .training.checkpoint import checkpoints, load_latest, save_checkpoint, save_model, write_atomically
from .training.optimizer import build_optimizer, learning_rate_factor
from .training.recorder import Recorder
from .training.run_folder import check_same_run, continues, run_folder
from .training.throughput import Throughput, peak_memory


def parse(args: list[str] | None = None) -> tuple[str, TrainConfig]:
    """The preset's name and the configuration that the command line asks for."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args.insert(0, "shapes")
    # Of the paper's rows what they are and what to expect; the rest of it is in unept/presets.py.
    presets = {name: ((inspect.getdoc(preset) or "").split("\nSize:")[0], preset()) for name, preset in PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, prog="python -m unept.train", args=args)
    return args[0], config


class Trainer:
    """One run in one folder.

    The folder holds config.json, metrics.jsonl (a line for every `log_every` steps and every evaluation), TensorBoard
    events, checkpoints/, samples/, curves.png, and in model/ the best model so far by validation mIoU.

    Where a process group is initialised, every rank makes one: each trains on its share of each batch, all hold the
    same model, and rank 0 writes.

    Args:
        config: of the run.
        out: the folder.
        device: None: as `config` says.

    Raises:
        ValueError: the batch can't be split over the ranks, or the data or weights can't be used.
    """

    def __init__(self, config: TrainConfig, out: Path, device: torch.device | None = None):
        self.config, self.out = config, out
        self.device = device or distributed.choose_device(config.device)
        self.local_batch = distributed.from_main(lambda: distributed.share_of(config.batch_size, config.accumulate))
        cuda = self.device.type == "cuda"
        torch.manual_seed(config.seed)
        self.train_set, self.validation_set = distributed.from_main(self._data_sets)
        self.resumes = distributed.from_main(lambda: continues(config, out))
        self.model = self.build_model().to(self.device)
        self.loss = UNEPTLoss(config.loss_weights, self.train_set.ignore_index).to(self.device)
        self.amp = cuda if config.amp == "auto" else config.amp == "bf16"
        compiled = cuda if config.compile == "auto" else config.compile == "on"
        self.network = distributed.parallel(self.model, self.device)
        self.predict, self.terms, self.distort = self.network, self.loss.terms, distort
        if compiled:
            self.predict, self.terms = torch.compile(self.predict), torch.compile(self.terms)
            self.distort = torch.compile(self.distort)
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(config, step)
        )
        self.inference = config.inference()
        self.step = 0
        self.best = -1.0
        self.scores: dict[str, Any] = {}
        self.pending: list[Tensor] = []  # terms of the steps since the last log line, on the device
        self.recorder: Recorder | None = None  # of rank 0
        self.throughput = Throughput(self.device, config.data.workers, distributed.world_size())
        self.skipped_before = 0  # bad samples, of all ranks, before the run was resumed

    def build_model(self) -> UNEPT:
        """The network as it is before the first step; a subclass may train another one with the same interface."""
        return UNEPT(
            len(self.train_set.classes),
            classes=self.train_set.classes,
            palette=self.train_set.palette,
            **self._model_options(),
        )

    def train(self) -> dict[str, Any]:
        """Run to the end, from the last checkpoint if the run resumes; returns the last evaluation's scores."""
        self._open()
        config = self.config
        self.loader = self._loader()
        batches = iter(self.loader)
        bar = tqdm(
            total=config.iterations,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=not distributed.is_main(),
        )
        advice = cli.memory_advice(config, self.local_batch)
        self.model.train()
        self.throughput.go()
        while self.step < config.iterations:
            try:
                batch = next(batches)
            except DatasetError:
                # Other ranks don't know of it, and can't take part in what saving asks.
                if distributed.world_size() == 1:
                    self._save()  # the run goes on from here once the file is mended
                raise
            with cli.out_of_memory(advice), self.throughput.step(len(batch.images), batch.seconds):
                self.pending.append(self.optimize(*self._on_device(batch)))
            self.step += 1
            bar.update()
            last = self.step == config.iterations
            if self.step % config.log_every == 0 or last:
                bar.set_postfix(self._log())
            if self.step % config.eval_every == 0 or last:
                self._evaluate()
            if self.step % config.checkpoint_every == 0 or last:
                self._save()
        bar.close()
        if (skipped := self._skipped()) and distributed.is_main():
            print(f"{skipped} times another image stood in for one that can't be read")
        if self.recorder is not None:
            self.recorder.close()
        return self.scores or self._score()  # a run that was finished already has not been evaluated by this process

    def optimize(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on this rank's share of a batch; returns its loss terms, stacked, on the device.

        Every term is normalised by the whole batch's pixels, so that neither the number of ranks nor `accumulate`
        changes the gradient. (Batch normalisation does see `accumulate`: its statistics are those of a part.)
        """
        self._seed_step()
        with torch.no_grad():
            targets = self.loss.targets(labels, boundaries=self.model.refines)
            targets = targets._replace(counts=distributed.mean_over_ranks(targets.counts))
        size = len(images) // self.config.accumulate
        starts = range(0, len(images), size)
        terms = [self._backward(images[i : i + size], targets.part(i, i + size), i == starts[-1]) for i in starts]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return torch.stack(terms).sum(0)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Its images, their colours distorted, and its labels."""
        images = batch.images.to(self.device, non_blocking=True)
        if batch.params is not None:
            images = self.distort(images, batch.params.to(self.device, non_blocking=True))
        return images, batch.labels.to(self.device, non_blocking=True)

    def _skipped(self) -> int:
        """Bad samples that others stood in for, in all of the run."""
        if self.config.data.on_bad_sample == "error":
            return 0
        return self.skipped_before + distributed.sum_over_ranks(self.loader.skipped, self.device)

    def _backward(self, images: Tensor, targets: Targets, last: bool) -> Tensor:
        """Add the gradients of one part of the batch; with the last one, they are averaged over the ranks."""
        waits = isinstance(self.network, DistributedDataParallel) and not last
        with self.network.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                output = self.predict(images)
            terms = self.terms(output, targets)
            terms["loss"].backward()
        self.term_names = list(terms)
        return torch.stack([term.detach() for term in terms.values()])

    def _seed_step(self) -> None:
        """Dropout's random numbers follow from the run's seed, the step and the rank: a run resumes without a state."""
        (seed,) = np.random.SeedSequence((self.config.seed, 2, self.step, distributed.rank())).generate_state(
            1, np.uint64
        )
        torch.manual_seed(int(seed))

    def _loader(self) -> Any:
        data = self.config.data
        return training_loader(
            self.train_set,
            train_transform(
                data.crop_size,
                short_side=data.short_side,
                scale=data.scale,
                cat_max_ratio=data.category_cap,
                flip=data.flip,
                photometric=data.photometric,
                fill=tuple(round(255 * mean) for mean in self.model.backbone.mean),
            ),
            batch_size=self.local_batch,
            seed=self.config.seed,
            start_step=self.step,
            workers=data.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            on_bad_sample=data.on_bad_sample,
        )

    def _data_sets(self) -> list[SegmentationDataset]:
        """Of training and validation, after a look at some of their files."""
        datasets = [self.config.data.build(split) for split in ("train", "val")]
        for dataset in datasets:
            dataset.check(sample=20)
        return datasets

    def _flush(self) -> dict[str, float]:
        """Mean of each term over the steps since the last log line; the one place where losses come to the host."""
        history = distributed.mean_over_ranks(torch.stack(self.pending)).cpu()
        finite = history.isfinite()
        if not finite.all():
            if not distributed.is_main():  # which says it
                raise SystemExit(2)
            first = int((~finite.all(dim=1)).nonzero()[0])
            bad = [name for name, ok in zip(self.term_names, finite[first], strict=True) if not ok]
            culprits = [name for name in bad if name != "loss"] or bad
            raise FloatingPointError(
                f"the loss is not finite at step {self.step - len(self.pending) + first + 1}: {', '.join(culprits)}. "
                f"The last checkpoint and the best model so far are kept in {self.out}; lower the learning rate "
                "(--lr), add --warmup, or try --amp off"
            )
        return dict(zip(self.term_names, history.mean(dim=0).tolist(), strict=True))

    def _log(self) -> dict[str, str]:
        means, rates = self._flush(), self.throughput.rates()
        self.pending.clear()
        lr = self.optimizer.param_groups[0]["lr"]
        line = {"step": self.step, **means, "lr": lr, **rates}
        shown = {"loss": f"{means['loss']:.3f}", "lr": f"{lr:.1e}"}
        for label, key in (("img/s", "images_per_s"), ("step", "step_images_per_s"), ("loader", "loader_images_per_s")):
            shown[label] = f"{rates[key]:.1f}"
        if self.config.data.on_bad_sample == "skip":
            line["skipped"] = self._skipped()
        self._write(line)
        memory = peak_memory(self.device)
        return shown if memory is None else {**shown, "GiB": f"{memory:.1f}"}

    def _write(self, line: dict[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.write(line)

    def _score(self) -> dict[str, Any]:
        tolerance, workers = self.config.boundary_tolerance, self.config.data.workers
        return evaluate_model(
            self.model,
            self.validation_set,
            self.inference,
            self.device,
            tolerance,
            workers=workers,
            on_bad_sample=self.config.data.on_bad_sample,
        )

    def _evaluate(self) -> None:
        self.throughput.stop()
        if self.pending:
            self._flush()  # a diverged model must not become the best
        with cli.out_of_memory("during the evaluation, which sees whole images: --window sees them in parts"):
            self.scores = self._score()
        better = self.best < 0 or self.scores["mIoU"] > self.best
        if better:
            self.best = self.scores["mIoU"]
        if self.recorder is not None:
            self._write({"step": self.step, **{k: v for k, v in self.scores.items() if isinstance(v, (int, float))}})
            if self.config.num_samples:
                picture = self.out / "samples" / f"step_{self.step:08d}.png"
                where = (self.config.num_samples, self.inference, self.device, picture)
                draw_samples(self.model, self.validation_set, *where, self.config.data.on_bad_sample)
            self.recorder.draw_curves()
            if better:
                save_model(self.model, self.out / "model", self.config, self.step, self.scores)
        self.model.train()
        self.throughput.go()

    def _save(self) -> None:
        if self.pending:
            self._flush()  # never overwrite a good checkpoint with a diverged one
        pending = [distributed.mean_over_ranks(terms) for terms in self.pending]
        skipped = self._skipped()
        if not distributed.is_main():
            return
        state = {
            "step": self.step,
            "classes": self.model.classes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "pending": pending,
            "best": self.best,
            "skipped": skipped,
        }
        save_checkpoint(self.out / "checkpoints", self.step, state)

    def _model_options(self) -> dict[str, Any]:
        """Of `UNEPT`; a run that continues has its weights in the checkpoint and needs no others."""
        options = self.config.model.options()
        if distributed.from_main(lambda: self.resumes and bool(checkpoints(self.out / "checkpoints"))):
            options.update(pretrained_backbone=False, backbone_weights=None)
        return options

    def _open(self) -> None:
        """Make the run folder, or continue the run in it."""
        state = distributed.from_main(self._open_folder)
        if state is not None:
            self._restore(state)
        if distributed.is_main():
            self.recorder = Recorder(self.out, self.step)

    def _open_folder(self) -> dict[str, Any] | None:
        """Rank 0's part of it; returns the state to continue from."""
        state = None
        if self.resumes and (self.out / "config.json").exists():
            check_same_run(self.config, self.out)
            state = load_latest(self.out / "checkpoints", torch.device("cpu"))
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        if (launch := distributed.launch_id()) is not None:
            (self.out / "launch").write_text(launch)
        write_atomically(self.out / "config.json", self.config.to_json().encode())
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        if state["classes"] != self.model.classes:
            raise ValueError(
                f"the checkpoint in {self.out} has {len(state['classes'])} classes, the data set has "
                f"{self.model.num_classes}: {state['classes']} against {self.model.classes}. Train in another folder, "
                "or give the data set that the run started with"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.step, self.best, self.skipped_before = state["step"], state["best"], state["skipped"]
        self.pending = [terms.to(self.device) for terms in state["pending"]]


def train(args: list[str] | None = None) -> None:
    """Train as the command line asks (see `unept.config.TrainConfig`) and print the final table.

    Under torchrun every process runs this; rank 0 writes and prints.

    Raises:
        ValueError, OSError: options, data or weights that can't be used; the message says what to do.
        FloatingPointError: the loss became NaN or infinite.
        MemoryError: the GPU's or the machine's memory is used up.
    """
    preset, config = parse(args)
    if config.check_data:
        cli.refuse_several_processes()
        return check_splits(config.data.build, config.data.workers)
    device = distributed.choose_device(config.device)
    with distributed.process_group(device):
        out = distributed.from_main(lambda: run_folder(config, preset))
        trainer = Trainer(config, out, device)
        scores = trainer.train()
        if distributed.is_main():
            print(format_table(scores, trainer.model.classes))
            print(f"\nRun folder  {out}\nModel       {out / 'model'} (best validation mIoU {trainer.best:.4f})")
            print(f"Pictures    {out / 'samples'}, {out / 'curves.png'}")
            print(f"Try it      python -m unept.predict IMAGE --run {out}")


def main() -> None:
    """The command line."""
    cli.run(train)


if __name__ == "__main__":
    main()
