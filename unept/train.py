"""Train a model (Sec. 4.2, Training): `python -m unept.train [PRESET] [--options]`."""

import inspect
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import cli, visual
from .checkpoint import checkpoints, load_latest, save_checkpoint, save_model, write_atomically
from .config import TrainConfig
from .data import DatasetError
from .data.loader import training_loader
from .data.transforms import train_transform
from .evaluate import draw_samples, evaluate_model, format_table, json_ready
from .loss import UNEPTLoss
from .model import UNEPT
from .presets import PRESETS

# Options that may differ between a run and its continuation: they don't change the result.
FREE_TO_CHANGE = {"out", "resume", "device", "log_every", "eval_every", "checkpoint_every", "num_samples", "workers"}
FREE_TO_CHANGE |= {"root", "pretrained_backbone", "backbone_weights"}  # data and weights may have moved


def parse(args: list[str] | None = None) -> tuple[str, TrainConfig]:
    """The preset's name and the configuration that the command line asks for."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        args.insert(0, "shapes")
    presets = {name: (inspect.getdoc(preset) or "", preset()) for name, preset in PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, prog="python -m unept.train", args=args)
    return args[0], config


def run_folder(config: TrainConfig, preset: str) -> Path:
    """Where the run goes: `config.out`, else runs/PRESET with a number if need be.

    Raises:
        FileExistsError: `config.out` holds a run and `resume` is not `auto`.
    """
    if config.out is not None:
        if (config.out / "config.json").exists() and config.resume != "auto":
            raise FileExistsError(
                f"{config.out} holds a run already: continue it with --resume auto, or choose another folder with --out"
            )
        return config.out
    number, folder = 1, Path("runs") / preset
    following = folder
    while following.exists():
        folder, number = following, number + 1
        following = Path("runs") / f"{preset}-{number}"
    return folder if config.resume == "auto" else following


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rates are multiplied with at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "step":
        return warmup * (0.1 if step >= config.iterations * 2 / 3 else 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.iterations))


def build_optimizer(model: UNEPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the backbone's own learning rate (Sec. 4.2)."""
    backbone = list(model.backbone.parameters())
    ids = {id(p) for p in backbone}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in ids], "lr": config.lr},
        {"params": backbone, "lr": config.backbone_lr},
    ]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)


def peak_memory(device: torch.device) -> float | None:
    """Peak GiB so far: of the GPU's allocator, or of this process on Linux; None where that can't be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Trainer:
    """One run in one folder.

    The folder holds config.json, metrics.jsonl (a line for every `log_every` steps and every evaluation), TensorBoard
    events, checkpoints/, samples/, curves.png, and in model/ the best model so far by validation mIoU.

    Args:
        config: of the run.
        out: the folder.
    """

    def __init__(self, config: TrainConfig, out: Path):
        self.config, self.out = config, out
        self.device = cli.choose_device(config.device)
        cuda = self.device.type == "cuda"
        torch.manual_seed(config.seed)
        data = config.data
        self.train_set, self.validation_set = data.build("train"), data.build("val")
        for dataset in (self.train_set, self.validation_set):
            dataset.check(sample=20)
        self.model = UNEPT(
            len(self.train_set.classes),
            classes=self.train_set.classes,
            palette=self.train_set.palette,
            **self._model_options(),
        ).to(self.device)
        self.loss = UNEPTLoss(config.loss_weights, self.train_set.ignore_index).to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(config, step)
        )
        self.amp = cuda if config.amp == "auto" else config.amp == "bf16"
        compiled = cuda if config.compile == "auto" else config.compile == "on"
        self.terms = torch.compile(self._terms) if compiled else self._terms
        self.inference = config.inference()
        self.step = 0
        self.best = -1.0
        self.scores: dict[str, Any] = {}
        self.pending: list[Tensor] = []  # terms of the steps since the last log line, on the device
        self.lines: list[dict[str, Any]] = []

    def train(self) -> dict[str, Any]:
        """Run to the end, from the last checkpoint if the run resumes; returns the last evaluation's scores."""
        self._open()
        config = self.config
        loader = training_loader(
            self.train_set,
            train_transform(
                config.data.crop_size,
                short_side=config.data.short_side,
                scale=config.data.scale,
                category_cap=config.data.category_cap,
                flip=config.data.flip,
                photometric=config.data.photometric,
                fill=tuple(round(255 * mean) for mean in self.model.backbone.mean),
            ),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=self.step,
            workers=config.data.workers,
        )
        batches = iter(loader)
        bar = tqdm(total=config.iterations, initial=self.step, unit="step", dynamic_ncols=True)
        self.model.train()
        self.clock = time.perf_counter()
        while self.step < config.iterations:
            try:
                images, labels = next(batches)
            except DatasetError:
                self._save()  # the run goes on from here once the file is mended
                raise
            self.pending.append(self.optimize(images.to(self.device), labels.to(self.device)))
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
        self.writer.close()
        return self.scores or self._score()  # a run that was finished already has not been evaluated by this process

    def _terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            output = self.model(images)
        return self.loss(output, labels)

    def optimize(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on a batch; returns the loss terms, stacked, on the device."""
        parts = self.config.accumulate
        total = None
        for image_part, label_part in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            terms = self.terms(image_part, label_part)
            (terms["loss"] / parts).backward()
            self.term_names = list(terms)
            stacked = torch.stack([term.detach() for term in terms.values()]) / parts
            total = stacked if total is None else total + stacked
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        assert total is not None
        return total

    def _flush(self) -> dict[str, float]:
        """Mean of each term over the steps since the last log line; the one place where losses come to the host."""
        history = torch.stack(self.pending).cpu()
        finite = history.isfinite()
        if not finite.all():
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
        means = self._flush()
        elapsed, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        rate = len(self.pending) * self.config.batch_size / elapsed
        self.pending.clear()
        lr = self.optimizer.param_groups[0]["lr"]
        self._write({"step": self.step, **means, "lr": lr, "images_per_s": rate})
        shown = {"loss": f"{means['loss']:.3f}", "lr": f"{lr:.1e}", "img/s": f"{rate:.1f}"}
        memory = peak_memory(self.device)
        return shown if memory is None else {**shown, "GiB": f"{memory:.1f}"}

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(json_ready(line)) + "\n")
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name, value, line["step"])

    def _score(self) -> dict[str, Any]:
        tolerance, workers = self.config.boundary_tolerance, self.config.data.workers
        return evaluate_model(self.model, self.validation_set, self.inference, self.device, tolerance, workers=workers)

    def _evaluate(self) -> None:
        if self.pending:
            self._flush()  # a diverged model must not become the best
        self.scores = self._score()
        self._write({"step": self.step, **{k: v for k, v in self.scores.items() if isinstance(v, (int, float))}})
        if self.config.num_samples:
            picture = self.out / "samples" / f"step_{self.step:08d}.png"
            draw_samples(self.model, self.validation_set, self.config.num_samples, self.inference, self.device, picture)
        visual.curves(self.lines, self.out / "curves.png")
        if self.best < 0 or self.scores["mIoU"] > self.best:
            self.best = self.scores["mIoU"]
            save_model(self.model, self.out / "model")
        self.model.train()
        self.clock = time.perf_counter()

    def _save(self) -> None:
        if self.pending:
            self._flush()  # never overwrite a good checkpoint with a diverged one
        state = {
            "step": self.step,
            "classes": self.model.classes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "pending": self.pending,
            "best": self.best,
        }
        save_checkpoint(self.out / "checkpoints", self.step, state)

    def _model_options(self) -> dict[str, Any]:
        """Of `UNEPT`; a run that continues has its weights in the checkpoint and needs no others."""
        options = self.config.model.options()
        if self.config.resume == "auto" and checkpoints(self.out / "checkpoints"):
            options.update(pretrained_backbone=False, backbone_weights=None)
        return options

    def _open(self) -> None:
        """Make the run folder, or continue the run in it."""
        state = None
        if self.config.resume == "auto" and (self.out / "config.json").exists():
            self._check_same_run()
            state = load_latest(self.out / "checkpoints", torch.device("cpu"))
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / "config.json", self.config.to_json().encode())
        if state is not None:
            self._restore(state)
        self.lines = [line for line in _read_lines(self.out / "metrics.jsonl") if line["step"] <= self.step]
        write_atomically(self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self.writer = SummaryWriter(str(self.out), purge_step=self.step + 1)

    def _check_same_run(self) -> None:
        def flat(config: TrainConfig) -> dict[str, Any]:
            options = json.loads(config.to_json())
            return {**options.pop("model"), **options.pop("data"), **options}

        before, now = flat(TrainConfig.from_json(self.out / "config.json")), flat(self.config)
        changed = [k for k in now if k not in FREE_TO_CHANGE and before[k] != now[k]]
        if changed:
            listed = ", ".join(f"{k} (was {before[k]}, now {now[k]})" for k in changed)
            raise ValueError(f"the run in {self.out} can't be continued with other options: {listed}")

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
        self.step, self.best = state["step"], state["best"]
        self.pending = [terms.to(self.device) for terms in state["pending"]]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, without the torn last line that a killed process may leave."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def train(args: list[str] | None = None) -> None:
    """Train as the command line asks (see `unept.config.TrainConfig`) and print the final table.

    Raises:
        ValueError, OSError: options, data or weights that can't be used; the message says what to do.
        FloatingPointError: the loss became NaN or infinite.
    """
    cli.refuse_several_processes()
    preset, config = parse(args)
    out = run_folder(config, preset)
    trainer = Trainer(config, out)
    scores = trainer.train()
    print(format_table(scores, trainer.model.classes))
    print(f"\nRun folder  {out}\nModel       {out / 'model'} (best validation mIoU {trainer.best:.4f})")
    print(f"Pictures    {out / 'samples'}, {out / 'curves.png'}")
    print(f"Try it      python -m unept.predict IMAGE --run {out}")


def main() -> None:
    """The command line."""
    cli.run(train)


if __name__ == "__main__":
    main()
