"""Which trainings and measurements `bench.ablations` makes, and the networks that they build."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unept.config import ModelConfig
from unept.model.loss import PAPER_WEIGHTS
from unept.presets.recipe import DEIT
from unept.presets.small import camvid

from .compared import ComparedNetwork
from .heads import build_network
from .models import CONVOLUTIONAL_HEADS
from .smp import BACKBONE, Baseline

Size = Literal["paper", "tiny"]
FINAL = "unept"
BASELINES = {"DeepLabV3+": "DeepLabV3Plus", "UPerNet": "UPerNet", "FPN": "FPN", "SegFormer": "Segformer"}
# Further networks of Tables 1, 2, 7 and 8, on the same backbone.
COMPARED = ("PSPNet", "DeepLabV3", *CONVOLUTIONAL_HEADS)
# Those of segmentation-models-pytorch, and their names there.
SMP = {**BASELINES, "PSPNet": "PSPNet", "DeepLabV3": "DeepLabV3"}
ATTENTIONS = ("full", "sparse_transformer", "longformer", "reformer")  # in place of sparse sampling, Table 8
RATES = (3.0,)  # times the learning rates
PAPER_GB = {"resnet50": 7.0, DEIT: 8.5}  # Table 8, batch 2


@dataclass(frozen=True)
class Job:
    """One training, or one measurement of memory."""

    name: str
    part: str
    """Part of the plan (`bench.ablations`)."""
    model: dict[str, Any] = field(default_factory=dict)
    """Options of `ModelConfig` for a training of UNEPT, arguments of `measure_memory` for a measurement."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `TrainConfig` that differ from those of the other trainings."""
    baseline: str | None = None
    """Key of `BASELINES` or `COMPARED`; None trains UNEPT."""
    rate: float = 1.0
    """Factor of the learning rates."""
    seed: int = 0

    @property
    def row(self) -> str:
        """Name of the row of the table; trainings that differ only in their seed share it."""
        return self.name.removesuffix(f" seed {self.seed}")

    def with_seed(self, seed: int, part: str | None = None) -> "Job":
        """Return the same training with another seed, in another part of the plan if one is given."""
        return dataclasses.replace(self, name=f"{self.row} seed {seed}", part=part or self.part, seed=seed)

    def build(self, classes: Sequence[str], palette: Sequence[Any], model: ModelConfig) -> ComparedNetwork:
        """Build the baseline of this job (`bench.heads.training.Build`)."""
        assert self.baseline is not None
        if self.baseline in CONVOLUTIONAL_HEADS:
            return build_network(self.baseline, classes, palette, model.backbone, weights=model.backbone_weights)
        return Baseline(SMP[self.baseline], classes, palette, model.backbone_weights)


def network(size: Size) -> ModelConfig:
    """Return the final network of a size, whose options the jobs change."""
    return ModelConfig(backbone=BACKBONE) if size == "paper" else camvid().model


def plan(results: dict[str, dict[str, Any]], seeds: int = 1, size: Size = "paper") -> list[Job]:
    """List the jobs that are known so far.

    Args:
        results: of the jobs that are done, by name. Two more seeds of the final network and of the best baseline follow
            from them, the part "seeds".
        seeds: number of seeds of every training, each in the part of its training.
        size: size of the networks, which says how many points and which boundary heads the final one has.
    """
    final = network(size)
    grid = [(scales, points) for scales in (1, 3) for points in ((4, 16) if size == "paper" else (4, 8, 16))]
    learned = {"context_queries": "learned", "zero_init_residual": False}
    queries = "spatial" if final.context_queries == "spatial+encoder" else "spatial+encoder"
    residuals = "random" if final.zero_init_residual else "zero"
    start = {"zero_init_residual": not final.zero_init_residual}
    heads = "bilinear" if final.boundary_upsampling == "subpixel" else "subpixel"
    jobs = [
        Job("baseline", "parts", {"num_levels": 1, **learned}),
        Job("pyramid", "parts", learned),
        Job(FINAL, "parts"),
        *(Job(name, "baselines", baseline=name) for name in BASELINES),
        *(Job(name, "compared", baseline=name) for name in COMPARED),
        *(
            Job(f"{name} x{rate:g}", "rates", baseline=None if name == FINAL else name, rate=rate)
            for name in (FINAL, *BASELINES)
            for rate in RATES
        ),
        *(
            Job(f"L={scales} N={points}", "points", {"num_levels": scales, "num_points": points})
            for scales, points in grid
            if (scales, points) != (final.num_levels, final.num_points)
        ),
        Job(f"{heads} heads", "boundaries", {"boundary_upsampling": heads}),
        Job(f"{queries} queries", "queries", {"context_queries": queries}),
        Job(f"{residuals} residuals", "queries", start),
        Job(f"{queries} queries, {residuals} residuals", "queries", {"context_queries": queries, **start}),
        Job("direction 0.7", "boundaries", options={"loss_weights": PAPER_WEIGHTS}),
        Job("predicted pixels", "boundaries", options={"direction_pixels": "predicted"}),
        Job("spatial 64-128", "widths", {"spatial_widths": (64, 128)}),
        *(Job(f"{name} attention", "attentions", {"attention": name}) for name in ATTENTIONS),
    ]
    best = {name: job for name in (FINAL, *BASELINES) if (job := best_rate(name, jobs, results)) is not None}
    if len(best) == 1 + len(BASELINES):
        strongest = max(BASELINES, key=lambda name: results[best[name].name]["mIoU"] or 0)
        jobs += [best[name].with_seed(seed, "seeds") for seed in (1, 2) for name in (FINAL, strongest)]
    # The seeds that are asked for come last: where both lists have a training, it belongs to the part of its row.
    jobs += [job.with_seed(seed) for seed in range(1, seeds) for job in jobs if job.seed == 0]
    jobs = list({job.name: job for job in jobs}.values())
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
    own = [job for job in jobs if job.seed == 0 and not (job.model or job.options) and (job.baseline or FINAL) == name]
    if not all("mIoU" in results.get(job.name, {}) for job in own):
        return None
    return max(own, key=lambda job: results[job.name]["mIoU"] or 0)  # None: no class has an IoU
