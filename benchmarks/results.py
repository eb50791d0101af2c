"""docs/results.md: every section is written by the script that measured it, never by hand."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent.parent / "docs" / "results.md"
HEAD = "# Results\n\nMeasured, not typed: each section is written by the script that it names.\n"


def write_section(name: str, title: str, body: str) -> None:
    """Put a section into docs/results.md, in place of the one of that name."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{begin}\n## {title}\n\n{body.strip()}\n\n{end}\n"
    found = re.compile(f"{re.escape(begin)}.*{re.escape(end)}\n", re.DOTALL)
    text = found.sub(lambda match: section, text) if found.search(text) else f"{text.rstrip()}\n\n{section}"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread_of(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation, `95.54 ± 0.28`; of one value `95.54 ± nan`."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def gain(values: Sequence[float], base: Sequence[float]) -> str:
    """Differences within seeds, mean (range): `+0.74 (-0.28 to +1.39)`."""
    changes = [value - other for value, other in zip(values, base, strict=True)]
    return f"{statistics.mean(changes):+.2f} ({min(changes):+.2f} to {max(changes):+.2f})"


def summary(ratios: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of the rounds' ratios, ready for JSON."""
    return {name: float(np.percentile(ratios, q)) for name, q in (("ratio", 50), ("ratio_p10", 10), ("ratio_p90", 90))}


def spread(row: dict[str, Any]) -> str:
    """`1.07 (1.02 to 1.12)` of a row that holds a summary."""
    return f"{row['ratio']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})"
