"""One markdown table of benchmark results: `python -m bench.report FILE.json [FILE2.json ...]`.

Reads what pytest-benchmark writes with --benchmark-json. A ratio is the baseline's median time over the row's own, both
of the same group: 2.00 is twice as fast. GB/s counts each input and output once; the bound is the time that the device's
memory needs for them by its data sheet.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("group", "variant", "median", "spread", "ratio", "images/s", "peak MiB", "GB/s", "of bound")


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
    """Markdown: where it was measured, then a row a benchmark, groups in the order of the files."""
    lines = []
    for key in ("device", "revision", "torch", "triton"):
        found = sorted({str(row.info[key]) for row in rows if key in row.info})
        lines.append(f"- {key}: {', '.join(found)}" + (" (results of several are mixed here)" if len(found) > 1 else ""))
    peers = sorted({row.info["peer"] for row in rows if "peer" in row.info})
    lines += [f"- peers: {', '.join(peers)}"] if peers else []
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    medians = {(row.device, row.group, row.variant): row.seconds for row in rows}
    groups = {(row.device, row.group): None for row in rows}
    for device, group in groups:
        for row in rows:
            if (row.device, row.group) != (device, group):
                continue
            baseline = medians.get((device, group, row.info.get("baseline", "")))
            cells = (
                group,
                row.variant,
                _time(row.seconds),
                f"{row.spread:.0%}",
                f"{baseline / row.seconds:.2f}" if baseline else "",
                _number(row.info, "images_per_second", ".1f"),
                _number(row.info, "peak_mib", ".0f"),
                _number(row.info, "gb_per_second", ".3g"),
                _number(row.info, "share_of_bound", ".0%"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    print(table(read(sys.argv[1:])))
