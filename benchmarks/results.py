"""docs/results.md: every section is written by the script that measured it, never by hand."""

from __future__ import annotations

import re
from pathlib import Path

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


def percentile(values: list[float], q: float) -> float:
    """The q-th percentile, as a plain number."""
    return float(np.percentile(values, q))
