"""One markdown table of benchmark results: `python -m bench.report FILE.json [FILE2.json ...]`.

Reads what pytest-benchmark writes with --benchmark-json. A ratio is the baseline's median time over the row's own, both
of the same group: 2.00 is twice as fast. "on the GPU" is the GPU's own time for a step, from an empty L2 cache: where
the median is longer, the host is the limit. GB/s counts each input and output once; "of bound" is the share of the
bandwidth in the device's data sheet that this makes in the GPU's own time. Below the table: the project's targets,
where they were measured.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("group", "variant", "median", "on the GPU", "spread", "ratio", "images/s", "peak MiB", "GB/s", "of bound")


@dataclass
class Row:
    """One benchmark."""

    group: str
    variant: str
    seconds: float
    """The median."""
    spread: float
    """Interquartile range over the median."""
    info: dict[str, Any]

    @property
    def device(self) -> str:
        """On which it ran."""
        return str(self.info.get("device", "unknown device"))


def read(paths: Iterable[str | Path]) -> list[Row]:
    """The benchmarks of pytest-benchmark's JSON files; of one measured again, the last file's.

    Raises:
        ValueError: a file that pytest-benchmark did not write.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    for path in paths:
        content = json.loads(Path(path).read_text())
        if "benchmarks" not in content:
            raise ValueError(f"{path} holds no benchmarks: give files written by pytest --benchmark-json=FILE")
        for item in content["benchmarks"]:
            info, stats = item["extra_info"], item["stats"]
            variant = info.get("variant", item["name"])
            row = Row(item["group"] or item["name"], variant, stats["median"], stats["iqr"] / stats["median"], info)
            rows[row.device, row.group, variant] = row
    return list(rows.values())


def _time(seconds: float) -> str:
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e3), ("us", 1e6)) if seconds * s >= 1 or u == "us")
    return f"{seconds * scale:.3g} {unit}"


def _number(info: dict[str, Any], key: str, form: str) -> str:
    value = info.get(key)
    return "" if value is None or math.isnan(value) else format(value, form)


def table(rows: list[Row]) -> str:
    """Markdown: where it was measured, then a row a benchmark, the fastest of a group first."""
    lines = []
    for key in ("device", "revision", "torch", "triton"):
        found = sorted({str(row.info[key]) for row in rows if key in row.info})
        mixed = " (results of several are mixed here)" if len(found) > 1 else ""
        lines.append(f"- {key}: {', '.join(found)}{mixed}")
    packages = sorted({row.info["package"] for row in rows if "package" in row.info})
    lines += [f"- baselines: {', '.join(packages)}"] if packages else []
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    medians = {(row.device, row.group, row.variant): row.seconds for row in rows}
    groups = {(row.device, row.group): None for row in rows}
    for device, group in groups:
        members = [row for row in rows if (row.device, row.group) == (device, group)]
        for row in sorted(members, key=lambda row: row.seconds):
            baseline = medians.get((device, group, row.info.get("baseline", "")))
            cells = (
                group,
                row.variant,
                _time(row.seconds),
                _time(row.info["device_seconds"]) if "device_seconds" in row.info else "",
                f"{row.spread:.0%}",
                f"{baseline / row.seconds:.2f}" if baseline else "",
                _number(row.info, "images_per_second", ".1f"),
                _number(row.info, "peak_mib", ".0f"),
                _number(row.info, "gb_per_second", ".3g"),
                _number(row.info, "share_of_bound", ".0%"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A limit on the ratio of two rows, each a (group, variant).

    The time (or the peak memory) of `slow` over that of `fast` must be at least, or at most, `limit`. Without `slow`,
    the limit is on the time of `fast` in milliseconds.
    """

    claim: str
    slow: tuple[str, str] | None
    fast: tuple[str, str]
    limit: float
    at_most: bool = False
    memory: bool = False


def _encoder(batch: int, points: int, dtype: str, direction: str) -> str:
    return f"sparse_sampling_attention, ResNet-50 encoder, B={batch} N={points} {dtype} initial, {direction}"


def _targets() -> list[Target]:
    ours, extension, fallback = "unept triton", "torch-ms-deform-attn", "grid_sample"
    targets = []
    for direction, dcnv4, cpu in (("forward", 1.5, 3.0), ("forward+backward", 3.0, 2.5)):
        baseline = (_encoder(16, 16, "float32", direction), extension)
        bf16, fp32 = (_encoder(16, 16, dtype, direction) for dtype in ("bfloat16", "float32"))
        half, single = _encoder(16, 8, "float16", direction), _encoder(1, 16, "float32", direction)
        targets += [
            Target(f"{direction}: bfloat16 against {extension}", baseline, (bf16, ours), 4),
            Target(f"{direction}: float32 against {extension}", baseline, (fp32, ours), 2.5),
            Target(f"{direction}: N=8 against DCNv4", (half, "DCNv4"), (half, ours), dcnv4),
            Target(f"{direction}: CPU against grid_sample", (single, fallback), (single, "unept torch"), cpu),
            Target(f"{direction}: CPU against {extension}", (single, extension), (single, "unept torch"), 1),
        ]
    single = _encoder(1, 16, "float32", "forward")
    targets += [
        Target("forward: CPU, compiled, against grid_sample", (single, fallback), (single, "unept torch, compiled"), 10)
    ]
    loss = "upsample_cross_entropy x8, both, B=16 K=150 bfloat16, forward+backward"
    unfused = (loss, "unfused, compiled")
    targets += [
        Target("Eq. 7's segmentation terms against unfused, compiled", unfused, (loss, ours), 5),
        Target("the same, memory", unfused, (loss, ours), 10, memory=True),
    ]
    for batch, variant in ((16, ours), (4, "unept torch")):
        group = f"boundary_targets, shapes, B={batch}"
        targets.append(Target(f"boundary targets, {variant}, against SciPy", (group, "scipy"), (group, variant), 1))
    group = "boundary_targets, shapes, B=16"
    targets.append(Target("boundary targets of 16 x 480 x 480, ms", None, (group, ours), 0.3, at_most=True))
    loader = "loader, jpeg, 683x512 to 480x480"
    targets.append(
        Target("training samples of JPEGs against torchvision", (loader, "torchvision"), (loader, "unept"), 2)
    )
    for sizes, kind in (("480 and 960", "bfloat16 autocast"), ("240 and 480", "float32")):
        context = f"context branch, ResNet-50 features, {sizes} pixels, batch 1, {kind}, forward"
        pixels = (context, "large"), (context, "small")
        targets.append(Target(f"context branch, 4 times the pixels ({sizes} a side)", *pixels, 4.4, at_most=True))
    return targets


TARGETS = _targets()


def check_targets(rows: list[Row]) -> str:
    """Return a line per target and device where its group was measured: the ratio, and pass or MISS."""
    found = {(row.device, row.group, row.variant): row for row in rows}
    groups = {(row.device, row.group) for row in rows}
    lines = []
    for device in sorted({row.device for row in rows}):
        for target in TARGETS:
            if (device, target.fast[0]) not in groups:
                continue
            fast = found.get((device, *target.fast))
            slow = found.get((device, *target.slow)) if target.slow else fast
            sign = "<=" if target.at_most else ">="
            if slow is None or fast is None:
                pairs = ((target.slow, slow), (target.fast, fast))
                missing = ", ".join(name[1] for name, row in pairs if name and row is None)
                lines.append(f"- not measured: {target.claim} {sign} {target.limit:g} (no row of {missing})")
                continue
            ratio = slow.seconds / fast.seconds if target.slow else fast.seconds * 1e3
            if target.memory:
                ratio = slow.info["peak_mib"] / max(fast.info["peak_mib"], 1e-9)
            passed = ratio <= target.limit if target.at_most else ratio >= target.limit
            lines.append(
                f"- {'pass' if passed else 'MISS'}: {target.claim}: {ratio:.2f}, target {sign} {target.limit:g}"
            )
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    """Return the table and, below it, the targets."""
    return f"{table(rows)}\n\n{check_targets(rows)}".rstrip()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(report(read(sys.argv[1:])))
