"""Quality, memory and speed on real images, by one command: `python -m bench.ablations --data CAMVID --weights FILE`.

Trains this project's network and its baselines on CamVid (480x360) with one backbone (`tf_efficientnet_lite0`, ImageNet
weights from a file), one schedule and one seed, and measures the memory of a training step:

    parts       Table 5: the paper's baseline (one scale, learned queries), + pyramid features, + spatial path and
                refinement
    points      Table 6: N = 4 and 16 points on L = 1 and 3 scales, none refined in their own column
    baselines   DeepLabV3+, UPerNet, FPN and SegFormer's head, of segmentation-models-pytorch
    rates       the final network and every baseline once more at RATES times the learning rate: the better one counts
    seeds       two more seeds of the final network and of the best baseline, each at its better rate
    memory      Tables 7 and 8: a training step at batch 2 and 16, 480x480, 150 classes

Each job is a process of its own, leaves OUT/NAME.json, and is not run again. `--minutes` bounds a call: a training that
is interrupted continues from its last checkpoint in the next call. At the end a table is printed, and written to
OUT/README.md.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from unept.config import ModelConfig
from unept.kernels import use_backend
from unept.model.loss import UNEPTLoss
from unept.model.network import UNEPT
from unept.presets import DEIT, camvid
from unept.train import Trainer
from unept.training.throughput import peak_memory

from .harness import DEVICE, device_name, revision, version
from .models import CLASSES, autocast, sample_batch
from .smp import BACKBONE, BaselineTrainer

BASELINES = {"DeepLabV3+": "DeepLabV3Plus", "UPerNet": "UPerNet", "FPN": "FPN", "SegFormer": "Segformer"}
RATES = (3.0,)  # times the learning rates
SCORES = ("mIoU", "pixAcc", "boundary_f", "mIoU_unrefined", "boundary_f_unrefined", "images_per_s")
PAPER_GB = {"resnet50": 7.0, DEIT: 8.5}  # Table 8, batch 2


@dataclass
class Options:
    """Train, measure, and print the results."""

    data: Path
    """Folder of CamVid: {train,val}/ and {train,val}annot/."""
    weights: Path
    """ImageNet weights of tf_efficientnet_lite0, .safetensors as timm has them."""
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
    only: tuple[str, ...] = ()
    """Names of the only jobs to run."""
    job: str | None = None
    """Run this job in this process, as the command does for each job."""


@dataclass(frozen=True)
class Job:
    """One training, or one measurement of memory."""

    name: str
    part: str
    """Part of the plan above."""
    model: dict[str, Any] = field(default_factory=dict)
    """Options of `ModelConfig` for a training of UNEPT, arguments of `measure_memory` for a measurement."""
    baseline: str | None = None
    """Key of `BASELINES`; None trains UNEPT."""
    rate: float = 1.0
    """Factor of the learning rates."""
    seed: int = 0


# --- the plan ---------------------------------------------------------------------------------------------------------

FINAL = "unept"


def plan(results: dict[str, dict[str, Any]]) -> list[Job]:
    """List the jobs that are known so far; those of other seeds follow from the results of the jobs before them."""
    jobs = [
        Job("baseline", "parts", {"num_levels": 1, "context_queries": "learned"}),
        Job("pyramid", "parts", {"context_queries": "learned"}),
        Job(FINAL, "parts"),
        *(Job(name, "baselines", baseline=name) for name in BASELINES),
        *(
            Job(f"{name} x{rate:g}", "rates", baseline=None if name == FINAL else name, rate=rate)
            for name in (FINAL, *BASELINES)
            for rate in RATES
        ),
        *(
            Job(f"L={scales} N={points}", "points", {"num_levels": scales, "num_points": points})
            for scales, points in ((1, 4), (1, 16), (3, 4))  # L=3 N=16 is the final network
        ),
    ]
    best = {name: job for name in (FINAL, *BASELINES) if (job := best_rate(name, jobs, results)) is not None}
    if len(best) == 1 + len(BASELINES):
        strongest = max(BASELINES, key=lambda name: results[best[name].name]["mIoU"])
        jobs += [
            dataclasses.replace(best[name], name=f"{best[name].name} seed {seed}", part="seeds", seed=seed)
            for seed in (1, 2)
            for name in (FINAL, strongest)
        ]
    for backbone in PAPER_GB:
        for batch in (2, 16):
            for backend in ("triton", "torch"):
                for amp in ("bf16", "float32"):
                    for mode in ("compiled", "eager"):
                        name = f"memory {backbone.split('_')[0]} B={batch} {backend} {amp} {mode}"
                        choice = {"backbone": backbone, "batch": batch, "backend": backend, "amp": amp, "mode": mode}
                        jobs.append(Job(name, "memory", choice))
    return jobs


def best_rate(name: str, jobs: Sequence[Job], results: dict[str, dict[str, Any]]) -> Job | None:
    """Return the training of a network whose learning rate gave the highest mIoU; None until all have a result."""
    own = [job for job in jobs if job.part != "seeds" and not job.model and (job.baseline or FINAL) == name]
    if not all("mIoU" in results.get(job.name, {}) for job in own):
        return None
    return max(own, key=lambda job: results[job.name]["mIoU"])


# --- jobs -------------------------------------------------------------------------------------------------------------


def train(job: Job, options: Options) -> dict[str, Any]:
    """Train, and return the scores of the last evaluation, the minutes without evaluations, and the peak memory."""
    base = camvid()
    config = dataclasses.replace(
        base,
        model=ModelConfig(backbone=BACKBONE, backbone_weights=options.weights, **job.model),
        data=dataclasses.replace(base.data, root=options.data, crop_size=options.crop_size),
        out=options.out / "runs" / job.name,
        resume="auto",
        iterations=options.iterations,
        batch_size=options.batch_size,
        lr=base.lr * job.rate,
        backbone_lr=base.backbone_lr * job.rate,
        schedule="cosine",
        warmup=min(100, options.iterations // 10),
        seed=job.seed,
        eval_every=max(1, options.iterations // 4),
        checkpoint_every=max(1, options.iterations // 20),
    )
    if job.baseline is None:
        trainer = Trainer(config, config.out)
    else:
        trainer = BaselineTrainer(BASELINES[job.baseline], config, config.out)
    scores = trainer.train()
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["images_per_s"] for line in lines if "loss" in line)
    rate = rates[len(rates) // 2]
    return {
        **{name: scores.get(name) for name in SCORES},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "training_images_per_s": rate,
        "minutes": config.iterations * config.batch_size / rate / 60,  # without evaluations
        "peak_gib": peak_memory(trainer.device),
    }


def measure_memory(backbone: str, batch: int, backend: str, amp: str, mode: str) -> dict[str, Any]:
    """Measure the peak of three training steps (forward, Eq. 7, backward, AdamW), weights included.

    The images are 480x480, with 150 classes.
    """
    if DEVICE != "cuda":
        raise SystemExit("the peak of a training step is measured on a GPU, and PyTorch finds none here")
    torch.manual_seed(0)
    model, loss = UNEPT(CLASSES, backbone).to(DEVICE).train(), UNEPTLoss()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("torch"):
        model.eval()(torch.zeros(1, 3, 480, 480, device=DEVICE))
        model.train()
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
        "gmacs": counter.get_total_flops() / 2e9,
    }


def run_job(job: Job, options: Options) -> None:
    """Run a job in this process and write its result."""
    result = measure_memory(**job.model) if job.part == "memory" else train(job, options)
    record = {"part": job.part, "device": device_name(), "revision": revision(), "torch": torch.__version__}
    record |= {"triton": version("triton"), "iterations": options.iterations, "batch_size": options.batch_size}
    record |= {"rate": job.rate, "seed": job.seed, "date": time.strftime("%Y-%m-%d")}
    path = options.out / f"{job.name}.json"
    path.write_text(json.dumps({**record, **result}, indent=1) + "\n")


# --- results ----------------------------------------------------------------------------------------------------------


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Read the results by the name of the job."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def report(results: dict[str, dict[str, Any]]) -> str:
    """Return Markdown: a table of the trainings, one of the memory, and the project's targets with pass or MISS."""
    trained = {name: r for name, r in results.items() if "mIoU" in r}
    lines = [
        "| training | mIoU | pixAcc | boundary F | unrefined: mIoU | boundary F | M parameters "
        "| training img/s | inference img/s | GiB | minutes |",
        "|---|" + "---:|" * 10,
    ]
    order = [job.name for job in plan(results)]
    for name in sorted(trained, key=order.index):
        r = trained[name]
        percent = ["" if r[key] is None else f"{100 * r[key]:.2f}" for key in SCORES[:5]]
        rest = (r["parameters"] / 1e6, r["training_images_per_s"], r["images_per_s"], r["peak_gib"], r["minutes"])
        lines.append(f"| {' | '.join([name, *percent, *(f'{value:.1f}' for value in rest)])} |")
    measured = {name: r for name, r in results.items() if "peak_gb" in r}
    if measured:
        lines += ["", "| training step | peak GB | M parameters | GMACs |", "|---|---:|---:|---:|"]
        for name in sorted(measured, key=order.index):
            r = measured[name]
            lines.append(f"| {name} | {r['peak_gb']:.2f} | {r['parameters'] / 1e6:.1f} | {r['gmacs']:.1f} |")
    return "\n".join([*lines, "", *check_targets(results)])


def check_targets(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line per target of the project: pass, MISS or not measured."""
    score = lambda name, key="mIoU": results.get(name, {}).get(key)
    jobs = plan(results)
    best = {name: job.name for name in (FINAL, *BASELINES) if (job := best_rate(name, jobs, results)) is not None}
    final, baselines = score(best.get(FINAL, "")), [score(best[name]) for name in BASELINES if name in best]
    gain = None
    if final is not None:
        gain = score(best[FINAL], "boundary_f") - score(best[FINAL], "boundary_f_unrefined")
    claims: list[tuple[str, bool | None]] = [
        ("mIoU of the final network at least 0.72", None if final is None else final >= 0.72),
        (
            "mIoU above that of every network of segmentation-models-pytorch",
            None if final is None or len(baselines) < len(BASELINES) else final > max(baselines),
        ),
        ("refinement: at least one point of boundary F", None if gain is None else gain >= 0.01),
    ]
    for first, second in (("baseline", "pyramid"), ("pyramid", FINAL)):
        both = None not in (score(first), score(second))
        claims.append((f"{second} above {first}", score(second) > score(first) if both else None))
    for backbone, limit in PAPER_GB.items():
        peak = score(f"memory {backbone.split('_')[0]} B=2 triton bf16 compiled", "peak_gb")
        kept = None if peak is None else peak <= 0.4 * limit
        claims.append((f"{backbone}: at most 40 % of {limit} GB at batch 2", kept))
    words = {None: "not measured", True: "pass", False: "MISS"}
    return [f"- {words[outcome]}: {claim}" for claim, outcome in claims]


def main() -> int:
    """Run the jobs that have no result yet, within the time limit; return 1 if a job failed."""
    options = tyro.cli(Options, prog="python -m bench.ablations")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.job is not None:
        (job,) = (job for job in plan(read_results(options.out)) if job.name == options.job)
        run_job(job, options)
        return 0
    deadline, failed = time.monotonic() + 60 * options.minutes, set()
    while True:
        results = read_results(options.out)
        waiting = [job for job in plan(results) if job.name not in results and job.name not in failed]
        waiting = [job for job in waiting if not options.only or job.name in options.only]
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
    text = report(results := read_results(options.out))
    head = f"# Ablations\n\n`python -m bench.ablations {' '.join(sys.argv[1:])}`\n\n"
    where = ("{device}, torch {torch}, triton {triton}, {date}".format_map(result) for result in results.values())
    devices = sorted(set(where))
    (options.out / "README.md").write_text(head + "\n".join(f"- {device}" for device in devices) + f"\n\n{text}\n")
    print(text)
    if failed:
        print(f"failed: {', '.join(sorted(failed))}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
