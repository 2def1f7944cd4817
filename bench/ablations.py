"""Quality, memory and speed on real images, by one command: `python -m bench.ablations --data CAMVID --weights FILE`.

Trains this project's network and its baselines on CamVid (480x360) with one backbone (`tf_efficientnet_lite0`, ImageNet
weights from a file), one schedule and one seed, and measures the memory of a training step:

    parts       Table 5: the paper's baseline (one scale, learned queries), + pyramid features, + spatial path and
                refinement
    points      Table 6: N = 4 and 16 points (and 8 of the size tiny) on L = 1 and 3 scales, none refined in their own
                column
    boundaries  the other kind of up-sampling of boundary and direction maps; the paper's weight of the direction loss;
                directions trained on predicted pixels
    queries     the other choice of whether context queries see the encoder's output, and of whether residual branches
                start at zero, alone and together
    widths      the widths of the spatial branch in the released code
    attentions  the attentions of Table 8 in place of sparse sampling
    baselines   DeepLabV3+, UPerNet, FPN and SegFormer's head, of segmentation-models-pytorch
    compared    Tables 1, 2, 7 and 8: PSPNet and DeepLabV3 of segmentation-models-pytorch, CCNet, OCRNet, ANL, DNLNet,
                PointRend, PSANet and EncNet of bench.heads
    rates       the final network and every baseline once more at RATES times the learning rate: the better one counts
    seeds       two more seeds of the final network and of the best baseline, each at its better rate, where --seeds
                does not ask for them already
    memory      Tables 7 and 8: a training step at batch 2 and 16, 480x480, 150 classes

Each job is a process of its own, leaves OUT/NAME.json, and is not run again. `--minutes` bounds a call: a training that
is interrupted continues from its last checkpoint in the next call. `--seeds N` makes every training N times, within the
parts that `--parts` names; the table then has means and standard deviations. `--size tiny` takes the network of the
preset camvid, which a CPU trains, in place of the paper's size; fewer steps, smaller crops and `--parts` bound the
rest. At the end a table is printed, and written to OUT/README.md. Each training also leaves the IoU of every class in
OUT/runs/NAME/evaluation.json, for `python -m unept.visualize --compare`.
"""

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from unept.files import write_atomically, write_json
from unept.kernels import use_backend
from unept.model.loss import UNEPTLoss
from unept.model.network import UNEPT
from unept.presets.small import camvid
from unept.train import Trainer
from unept.training.throughput import peak_memory

from .ablation_plan import Job, Size, network, plan
from .ablation_report import SCORES, report
from .harness import DEVICE, device_name, revision, version
from .heads import ComparedTrainer
from .models import CLASSES, autocast, sample_batch

LR, BACKBONE_LR = 1e-3, 9e-4  # at which all networks are compared; the preset camvid, which trains longer, has its own


@dataclass
class Options:
    """Train, measure, and print the results."""

    data: Path
    """Folder of CamVid: {train,val}/ and {train,val}annot/."""
    weights: Path | None
    """ImageNet weights of tf_efficientnet_lite0, .safetensors as timm has them. None leaves them random."""
    out: Path = Path("bench/results/ablations")
    """Folder for results and unfinished runs."""
    iterations: int = 4000
    """Optimiser steps of every training."""
    batch_size: int = 16
    """Images per step."""
    crop_size: tuple[int, int] = (360, 480)
    """Height and width of a training sample."""
    minutes: float = 1e9
    """Stop after this many minutes; the same command continues."""
    seeds: int = 1
    """Number of seeds of every training; with several, the table has means and standard deviations."""
    size: Size = "paper"
    """Size of this project's network: the paper's, or that of the preset camvid."""
    parts: tuple[str, ...] = ()
    """Parts of the plan to run; none named: all."""
    only: tuple[str, ...] = ()
    """Names of the only jobs to run, with all their seeds."""
    job: str | None = None
    """Run this job in this process, as the command does for each job."""


# --- jobs -------------------------------------------------------------------------------------------------------------


def make_trainer(job: Job, options: Options) -> Trainer:
    """Make the trainer of a job, which continues what OUT holds of it."""
    base = camvid()
    config = dataclasses.replace(
        base,
        **job.options,
        model=dataclasses.replace(
            network(options.size),
            backbone_weights=options.weights,
            pretrained_backbone=options.weights is not None,
            **job.model,
        ),
        data=dataclasses.replace(base.data, root=options.data, crop_size=options.crop_size),
        out=options.out / "runs" / job.name,
        resume="auto",
        iterations=options.iterations,
        batch_size=options.batch_size,
        lr=LR * job.rate,
        backbone_lr=BACKBONE_LR * job.rate,
        schedule="cosine",
        warmup=min(100, options.iterations // 10),
        seed=job.seed,
        ema=1 - max(1 - (base.ema or 0), 6 / max(options.iterations, 12)),  # a mean over at most a sixth of the steps
        eval_every=options.iterations,
        checkpoint_every=max(1, options.iterations // 20),
    )
    if job.baseline is None:
        return Trainer(config, config.out)
    return ComparedTrainer(job.build, config, config.out)


def train(job: Job, options: Options) -> dict[str, Any]:
    """Train, and return the scores of the last evaluation, the minutes without evaluations, and the peak memory."""
    trainer = make_trainer(job, options)
    config = trainer.config
    trainer.boundary_tolerance = (config.boundary_tolerance, 1)
    scores = trainer.train()
    scores = {name.replace("boundary_f_1px", "boundary_f1"): score for name, score in scores.items()}
    record = {"split": "val", "classes": list(trainer.model.classes), **scores}
    write_json(config.out / "evaluation.json", record)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["images_per_s"] for line in lines if "loss" in line)
    rate = rates[len(rates) // 2]
    return {
        **{name: scores.get(name) for name in SCORES},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "gmacs": multiplications(trainer.model, 360, 480),
        "training_images_per_s": rate,
        "minutes": config.iterations * config.batch_size / rate / 60,  # without evaluations
        "peak_gib": peak_memory(trainer.device),
    }


def multiplications(model: Any, height: int, width: int) -> float:
    """Return the GMACs of a network on one image."""
    mode = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("torch"):
        model.eval()(torch.zeros(1, 3, height, width, device=model.mean.device))
    model.train(mode)
    return counter.get_total_flops() / 2e9


def measure_memory(backbone: str, batch: int, backend: str, amp: str, mode: str) -> dict[str, Any]:
    """Measure the peak of three training steps (forward, Eq. 7, backward, AdamW), weights included.

    The images are 480x480, with 150 classes.
    """
    if DEVICE != "cuda":
        raise SystemExit("the peak of a training step is measured on a GPU, and PyTorch finds none here")
    torch.manual_seed(0)
    model, loss = UNEPT(CLASSES, backbone).to(DEVICE).train(), UNEPTLoss()
    predict, losses = (torch.compile(model), torch.compile(loss.losses)) if mode == "compiled" else (model, loss.losses)
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = sample_batch(batch, 480)
    with use_backend(backend):
        for step in range(4):
            if step == 1:  # the first one tunes and compiles
                torch.cuda.reset_peak_memory_stats()
            with autocast(amp == "bf16"):
                output = predict(images)
            losses(output, loss.targets(labels))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return {
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": multiplications(model, 480, 480),
    }


def run_job(job: Job, options: Options) -> None:
    """Run a job in this process and write its result."""
    result = measure_memory(**job.model) if job.part == "memory" else train(job, options)
    record = {"part": job.part, "device": device_name(), "revision": revision(), "torch": torch.__version__}
    record |= {"triton": version("triton"), "iterations": options.iterations, "batch_size": options.batch_size}
    record |= {"rate": job.rate, "seed": job.seed, "date": time.strftime("%Y-%m-%d")}
    path = options.out / f"{job.name}.json"
    write_json(path, {**record, **result})


# --- results ----------------------------------------------------------------------------------------------------------


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Read the results by the name of the job."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def known_jobs(options: Options) -> list[Job]:
    """List the jobs that are known by what OUT holds."""
    return plan(read_results(options.out), options.seeds, options.size)


def main() -> int:
    """Run the jobs that have no result yet, within the time limit; return 1 if a job failed."""
    options = tyro.cli(Options, prog="python -m bench.ablations")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.job is not None:
        (job,) = (job for job in known_jobs(options) if job.name == options.job)
        run_job(job, options)
        return 0
    deadline, failed = time.monotonic() + 60 * options.minutes, set()
    while True:
        results = read_results(options.out)
        waiting = [job for job in known_jobs(options) if job.name not in results and job.name not in failed]
        waiting = [job for job in waiting if not options.parts or job.part in options.parts]
        waiting = [job for job in waiting if not options.only or {job.name, job.row} & set(options.only)]
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            break
        print(f"== {waiting[0].name}", flush=True)
        command = [sys.executable, "-m", "bench.ablations", *sys.argv[1:], "--job", waiting[0].name]
        try:
            done = subprocess.run(command, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(f"== {waiting[0].name}: interrupted; the same command continues it", flush=True)
            break
        if done.returncode:
            failed.add(waiting[0].name)
    text = report(results := read_results(options.out), options.size)
    head = f"# Ablations\n\n`python -m bench.ablations {' '.join(sys.argv[1:])}`\n\n"
    where = ("{device}, torch {torch}, triton {triton}, {date}".format_map(result) for result in results.values())
    devices = sorted(set(where))
    content = head + "\n".join(f"- {device}" for device in devices) + f"\n\n{text}\n"
    write_atomically(options.out / "README.md", content.encode())
    print(text)
    if failed:
        print(f"failed: {', '.join(sorted(failed))}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
