"""Quality, memory and speed on real images, by one command: `python -m bench.evidence --data CAMVID --weights FILE`.

Trains this project's network and its rivals on CamVid (480x360) with one backbone (`tf_efficientnet_lite0`, ImageNet
weights from a file), one schedule and one seed, and measures the memory of a training step:

    parts       Table 5: the baseline (one scale, learned queries), + pyramid features, + spatial path and refinement
    points      Table 6: N = 4 and 16 points on L = 1 and 3 scales, none refined in their own column
    rivals      DeepLabV3+, UPerNet, FPN and SegFormer's head, of segmentation-models-pytorch
    rates       the final network and every rival once more at RATES times the learning rate: the better one counts
    seeds       two more seeds of the final network and of the best rival, each at its better rate
    memory      Tables 7 and 8: a training step at batch 2 and 16, 480x480, 150 classes

Each job is a process of its own, leaves OUT/NAME.json, and is not run again. `--minutes` bounds a call: a training that
is cut off goes on from its last checkpoint in the next. The last thing is a table, also in OUT/README.md.
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
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unept.config import ModelConfig, TrainConfig
from unept.kernels import use_backend
from unept.model.loss import UNEPTLoss
from unept.model.network import UNEPT
from unept.model.output import TrainableModel, UNEPTOutput, padded_size
from unept.presets import DEIT, camvid
from unept.train import Trainer
from unept.training.throughput import peak_memory

from .harness import DEVICE, device_name, revision, version
from .models import CLASSES, autocast, sample_batch
from .peers import imported

BACKBONE = "tf_efficientnet_lite0"
RIVALS = {"DeepLabV3+": "DeepLabV3Plus", "UPerNet": "UPerNet", "FPN": "FPN", "SegFormer": "Segformer"}
RATES = (3.0,)  # times the learning rates
SCORES = ("mIoU", "pixAcc", "boundary_f", "mIoU_unrefined", "boundary_f_unrefined", "images_per_s")
PAPER_GB = {"resnet50": 7.0, DEIT: 8.5}  # Table 8, batch 2


@dataclass
class Options:
    """Train, measure, and print what came out."""

    data: Path
    """CamVid's folder: {train,val}/ and {train,val}annot/."""
    weights: Path
    """ImageNet weights of tf_efficientnet_lite0, .safetensors as timm has them."""
    out: Path = Path("bench/results/evidence")
    """Folder for results and unfinished runs."""
    iterations: int = 4000
    """Steps of every training."""
    batch_size: int = 16
    """Images a step."""
    crop_size: tuple[int, int] = (360, 480)
    """Height and width of a training sample."""
    minutes: float = 1e9
    """Stop after so many, to be continued by the same command."""
    only: tuple[str, ...] = ()
    """Names of jobs: these alone."""
    job: str | None = None
    """Do this one in this process, as the command does for each."""


@dataclass(frozen=True)
class Job:
    """One training, or one measurement of memory."""

    name: str
    part: str
    """Of the plan above."""
    model: dict[str, Any] = field(default_factory=dict)
    """Options of `ModelConfig` for a training of ours, those of `memory_of` for a measurement."""
    rival: str | None = None
    rate: float = 1.0
    seed: int = 0


# --- the plan ---------------------------------------------------------------------------------------------------------

FINAL = "unept"


def plan(results: dict[str, dict[str, Any]]) -> list[Job]:
    """All jobs that can be named yet; the seeds' follow from the results of those before."""
    jobs = [
        Job("baseline", "parts", {"num_levels": 1, "context_queries": "learned"}),
        Job("pyramid", "parts", {"context_queries": "learned"}),
        Job(FINAL, "parts"),
        *(Job(name, "rivals", rival=name) for name in RIVALS),
        *(
            Job(f"{name} x{rate:g}", "rates", rival=None if name == FINAL else name, rate=rate)
            for name in (FINAL, *RIVALS)
            for rate in RATES
        ),
        *(
            Job(f"L={scales} N={points}", "points", {"num_levels": scales, "num_points": points})
            for scales, points in ((1, 4), (1, 16), (3, 4))  # L=3 N=16 is the final network
        ),
    ]
    best = {name: job for name in (FINAL, *RIVALS) if (job := best_rate(name, jobs, results)) is not None}
    if len(best) == 1 + len(RIVALS):
        rival = max(RIVALS, key=lambda name: results[best[name].name]["mIoU"])
        jobs += [
            dataclasses.replace(best[name], name=f"{best[name].name} seed {seed}", part="seeds", seed=seed)
            for seed in (1, 2)
            for name in (FINAL, rival)
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
    """Of a contender's trainings with different rates the one with the highest mIoU, once all have ended."""
    own = [job for job in jobs if job.part != "seeds" and not job.model and (job.rival or FINAL) == name]
    if not all("mIoU" in results.get(job.name, {}) for job in own):
        return None
    return max(own, key=lambda job: results[job.name]["mIoU"])


# --- the rivals -------------------------------------------------------------------------------------------------------


class Rival(nn.Module):
    """A network of segmentation-models-pytorch on the same backbone, as a `TrainableModel` that `Trainer` can train.

    Its scores are at 1/4 of the image (ours at 1/8), and are up-sampled by the loss and the prediction like ours.

    Args:
        architecture: a class of segmentation_models_pytorch.
        classes, palette: of the data set.
        weights: of the backbone.
    """

    refines = False
    normalized = UNEPT.normalized

    def __init__(self, architecture: str, classes: Sequence[str], palette: Sequence[Any], weights: Path | None):
        super().__init__()
        smp = imported("segmentation_models_pytorch", "segmentation-models-pytorch")
        self.num_classes, self.classes, self.palette = len(classes), list(classes), list(palette)
        encoder = f"tu-{BACKBONE}"
        self.network = getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, classes=len(classes))
        self.network.segmentation_head[1] = nn.Identity()  # its up-sampling
        self.backbone.mean, self.backbone.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # of this backbone's weights
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1) * 255, persistent=False)
        self.preprocessing: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        if weights is not None:
            self._load(weights)

    @property
    def backbone(self) -> Any:
        """The encoder."""
        return self.network.encoder

    def _load(self, weights: Path) -> None:
        stored = load_file(weights)
        missing, _ = self.backbone.model.load_state_dict(stored, strict=False)
        if missing:
            raise ValueError(f"{weights} lacks {len(missing)} of the backbone's tensors, such as {missing[0]}")

    def forward(self, images: Tensor) -> UNEPTOutput:
        """As `UNEPT.forward`; without boundary and direction."""
        images = self.normalized(images)
        height, width = padded_size(images.shape[2:])
        full = padded_size((height, width), 32)
        padded = F.pad(images, (0, full[1] - images.shape[3], 0, full[0] - images.shape[2]))
        logits = self.network(padded)
        stride = full[0] // logits.shape[2]
        return UNEPTOutput(logits[:, :, : height // stride, : width // stride], None, None)

    def save_pretrained(self, folder: Path) -> None:
        """The weights alone."""
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "model.pt")


class RivalTrainer(Trainer):
    """Trains a `Rival` of this architecture."""

    def __init__(self, architecture: str, config: TrainConfig, out: Path):
        self.architecture = architecture
        super().__init__(config, out)

    def build_model(self) -> TrainableModel:
        """See `Trainer`."""
        weights = self.config.model.backbone_weights
        return Rival(self.architecture, self.train_set.classes, self.train_set.palette, weights)


# --- jobs -------------------------------------------------------------------------------------------------------------


def training(job: Job, options: Options) -> dict[str, Any]:
    """Train, and give the last evaluation's scores, minutes and peak memory."""
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
    if job.rival is None:
        trainer = Trainer(config, config.out)
    else:
        trainer = RivalTrainer(RIVALS[job.rival], config, config.out)
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


def memory_of(backbone: str, batch: int, backend: str, amp: str, mode: str) -> dict[str, Any]:
    """Peak of three training steps (forward, Eq. 7, backward, AdamW) of 480x480 and 150 classes, weights included."""
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
    """Do a job in this process and write its result."""
    result = memory_of(**job.model) if job.part == "memory" else training(job, options)
    told = {"part": job.part, "device": device_name(), "revision": revision(), "torch": torch.__version__}
    told |= {"triton": version("triton"), "iterations": options.iterations, "batch_size": options.batch_size}
    told |= {"rate": job.rate, "seed": job.seed, "date": time.strftime("%Y-%m-%d")}
    path = options.out / f"{job.name}.json"
    path.write_text(json.dumps({**told, **result}, indent=1) + "\n")


# --- results ----------------------------------------------------------------------------------------------------------


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """By the job's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def report(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: one table of the trainings, one of the memory, and the project's goals with pass or miss."""
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
    return "\n".join([*lines, "", *goals(results)])


def goals(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the project set itself, as far as it is measured."""
    score = lambda name, key="mIoU": results.get(name, {}).get(key)
    jobs = plan(results)
    best = {name: job.name for name in (FINAL, *RIVALS) if (job := best_rate(name, jobs, results)) is not None}
    final, rivals = score(best.get(FINAL, "")), [score(best[name]) for name in RIVALS if name in best]
    gain = None
    if final is not None:
        gain = score(best[FINAL], "boundary_f") - score(best[FINAL], "boundary_f_unrefined")
    claims: list[tuple[str, bool | None]] = [
        ("mIoU of the final network at least 0.72", None if final is None else final >= 0.72),
        ("above every rival", None if final is None or len(rivals) < len(RIVALS) else final > max(rivals)),
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
    """Run what has no result yet, within the time; 1 if a job failed."""
    options = tyro.cli(Options, prog="python -m bench.evidence")
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
        command = [sys.executable, "-m", "bench.evidence", *sys.argv[1:], "--job", waiting[0].name]
        try:
            done = subprocess.run(command, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(f"== {waiting[0].name}: cut off; the same command goes on with it", flush=True)
            break
        if done.returncode:
            failed.add(waiting[0].name)
    text = report(results := read_results(options.out))
    head = f"# Evidence\n\n`python -m bench.evidence {' '.join(sys.argv[1:])}`\n\n"
    where = ("{device}, torch {torch}, triton {triton}, {date}".format_map(result) for result in results.values())
    devices = sorted(set(where))
    (options.out / "README.md").write_text(head + "\n".join(f"- {device}" for device in devices) + f"\n\n{text}\n")
    print(text)
    if failed:
        print(f"failed: {', '.join(sorted(failed))}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
