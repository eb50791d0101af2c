"""What the report says about corrupted images."""

from __future__ import annotations

from collections.abc import Mapping

from edgekd.report.part import Absent, Metric
from edgekd.report.robustness import Corrupted, Robustness
from edgekd.report.tables import Row, Table


def tables(part: Robustness | Absent, metric: Metric) -> list[Table]:
    """By category, then kind by kind; nothing where nothing was corrupted."""
    return [] if isinstance(part, Absent) else [_categories(part, metric), _kinds(part, metric)]


def _mean(rows: list[Corrupted], name: str) -> float:
    return float(sum(getattr(row, name) for row in rows) / len(rows))


def _row(label: str, scores: Mapping[str, float], metric: Metric, strong: bool = False) -> Row:
    compared = (metric.bare(scores["student"] - scores["teacher"]),) if "teacher" in scores else ()
    return Row((label, *(metric.text(score) for score in scores.values()), *compared), strong=strong)


def _networks(part: Robustness) -> list[str]:
    """Which were scored, in the order of the columns."""
    return [name for name in ("teacher", "student") if name in part.clean]


def _categories(part: Robustness, metric: Metric) -> Table:
    networks = _networks(part)
    lines = [_row("as they are", {name: part.clean[name] for name in networks}, metric)]
    for category in dict.fromkeys(row.category for row in part.rows):
        own = [row for row in part.rows if row.category == category]
        lines.append(_row(category, {name: _mean(own, name) for name in networks}, metric))
    lines.append(_row("all corruptions", {name: _mean(part.rows, name) for name in networks}, metric, True))
    compared = ("Student minus teacher",) if "teacher" in networks else ()
    columns = (f"Images, {metric.title}", *(name.capitalize() for name in networks), *compared)
    notes = (
        f"Means over kinds and severities, each on {part.n:,} test images. The networks are as exported, in float.",
    )
    return Table("Robustness to corrupted images", columns, tuple(lines), notes)


def _kinds(part: Robustness, metric: Metric) -> Table:
    networks = _networks(part)
    severities = sorted({row.severity for row in part.rows})
    lines = []
    for kind in dict.fromkeys(row.kind for row in part.rows):
        own = [row for row in part.rows if row.kind == kind]
        student = {row.severity: metric.text(row.student) for row in own}
        means = (metric.text(_mean(own, name)) for name in networks)
        lines.append(Row((kind, *means, *(student[severity] for severity in severities))))
    means_of = (f"{name.capitalize()}, mean" for name in networks)
    columns = ("Corruption", *means_of, *(f"Student at {severity}" for severity in severities))
    return Table(f"{metric.title} by corruption and severity", columns, tuple(lines))
