"""What the report says about corrupted images."""

from __future__ import annotations

from edgekd.report.part import Absent, Metric
from edgekd.report.robustness import Corrupted, Robustness
from edgekd.report.tables import Row, Table


def tables(part: Robustness | Absent, metric: Metric) -> list[Table]:
    """By category, then kind by kind; nothing where nothing was corrupted."""
    return [] if isinstance(part, Absent) else [_categories(part, metric), _kinds(part, metric)]


def _mean(rows: list[Corrupted], name: str) -> float:
    return float(sum(getattr(row, name) for row in rows) / len(rows))


def _row(label: str, teacher: float, student: float, metric: Metric, strong: bool = False) -> Row:
    cells = (label, metric.text(teacher), metric.text(student), metric.bare(student - teacher))
    return Row(cells, strong=strong)


def _categories(part: Robustness, metric: Metric) -> Table:
    lines = [_row("as they are", part.clean["teacher"], part.clean["student"], metric)]
    for category in dict.fromkeys(row.category for row in part.rows):
        own = [row for row in part.rows if row.category == category]
        lines.append(_row(category, _mean(own, "teacher"), _mean(own, "student"), metric))
    lines.append(_row("all corruptions", _mean(part.rows, "teacher"), _mean(part.rows, "student"), metric, True))
    columns = (f"Images, {metric.title}", "Teacher", "Student", "Student minus teacher")
    notes = (
        f"Means over kinds and severities, each on {part.n:,} test images. The networks are as exported, in float.",
    )
    return Table("Robustness to corrupted images", columns, tuple(lines), notes)


def _kinds(part: Robustness, metric: Metric) -> Table:
    severities = sorted({row.severity for row in part.rows})
    lines = []
    for kind in dict.fromkeys(row.kind for row in part.rows):
        own = [row for row in part.rows if row.kind == kind]
        student = {row.severity: metric.text(row.student) for row in own}
        means = (metric.text(_mean(own, "teacher")), metric.text(_mean(own, "student")))
        lines.append(Row((kind, *means, *(student[severity] for severity in severities))))
    columns = ("Corruption", "Teacher, mean", "Student, mean", *(f"Student at {severity}" for severity in severities))
    return Table(f"{metric.title} by corruption and severity", columns, tuple(lines))
