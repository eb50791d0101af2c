"""What the report says of what is inside the networks, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekd.report.document import Document
from edgekd.report.formatting import DASH, count, milliseconds, number, size
from edgekd.report.networks import Silence
from edgekd.report.part import Absent, Metric
from edgekd.report.tables import RUNG_LABELS, Row, Table

SILENCE_COLUMNS = ("Silent boards", "Mean", "Lowest", "Highest", "Of the whole", "Sets tried")


def sections(document: Document) -> list[tuple[str, Table]]:
    """Heading and table of all that this run has to tell."""
    made = (
        ("Angles between classes", angles(document)),
        ("Silent boards", silent_boards(document)),
        ("The parts on their boards", boards(document)),
        ("Silent boards, as the boards answered", heard(document)),
    )
    return [(heading, table) for heading, table in made if not isinstance(table, Absent)]


def angles(document: Document) -> Table | Absent:
    """How far the class vectors of each network are apart."""
    found = document.angles
    if isinstance(found, Absent):
        return found
    rows = [
        Row(
            (
                RUNG_LABELS[one.network],
                *(f"{value:.1f}°" for value in (one.smallest_deg, one.mean_deg, one.largest_deg)),
                " and ".join(one.closest),
            ),
            strong=one.network == "student",
        )
        for one in found
    ]
    classes = len(document.confusion.classes) if not isinstance(document.confusion, Absent) else 0
    notes = ["Between the rows of the classifier: two classes at a small angle are easily taken for each other."]
    if classes > 1:
        largest = math.degrees(math.acos(-1 / (classes - 1)))
        notes.append(
            f"{classes} classes are equally far from each other at {largest:.1f}°, if there are features enough."
        )
    columns = ("Network", "Smallest", "Mean", "Largest", "Closest classes")
    return Table(
        "Angles between the classes' vectors", columns, tuple(rows), tuple(notes), text_columns=frozenset({0, 4})
    )


def silent_boards(document: Document) -> Table | Absent:
    """The score for every number of boards that do not answer."""
    found = document.spread
    if isinstance(found, Absent):
        return found
    one = found.parts[0]
    notes = (
        f"Each board runs {one.file.replace('0', 'N')} ({size(one.size_bytes)}, {count(one.macs)} multiply-accumulates)"
        f" and sends {number(found.message_bytes)} bytes per image; head.onnx fuses what arrives, zeros for silence.",
        f"Each feature is given by {found.copies} of the boards. Computed by ONNX Runtime with the boards' own files.",
    )
    rows = _silences(found.silent, found.boards, found.silent[0].score, document.metric)
    return Table("Accuracy when boards do not answer", SILENCE_COLUMNS, rows, notes)


def boards(document: Document) -> Table | Absent:
    """How each board did with its part; why one is silent."""
    found = document.spread_run
    if isinstance(found, Absent):
        return found
    rows = [
        Row(
            (
                one.name,
                one.target,
                one.backend,
                one.status,
                *(DASH if ms is None else milliseconds(ms) for ms in (one.p50_ms, one.p99_ms)),
                size(one.size_bytes),
            )
        )
        for one in found.boards
    ]
    notes = [f"{one.name}: {reason}" for one in found.boards for reason in one.reasons]
    columns = ("Board", "Target", "Backend", "Verdict", "Part, p50", "p99", "Size")
    return Table("Each part on its board", columns, tuple(rows), tuple(notes), text_columns=frozenset({0, 1, 2, 3}))


def heard(document: Document) -> Table | Absent:
    """The score for every number of silent boards, from what the boards themselves answered."""
    found = document.spread_run
    if isinstance(found, Absent):
        return found
    lost = [one.name for one in found.boards if one.status == "SILENT"]
    whole = found.silent[0].score if isinstance(document.spread, Absent) else document.spread.silent[0].score
    notes = [f"{number(found.n)} images through the boards; fused here by head.onnx."]
    if lost:
        notes.append(f"Silent by themselves, and in every row: {', '.join(lost)}. The whole is as computed here.")
    rows = _silences(found.silent, len(found.boards), whole, document.metric)
    return Table("Accuracy from the boards' own answers", SILENCE_COLUMNS, rows, tuple(notes))


def _silences(silent: Sequence[Silence], boards: int, whole: float, metric: Metric) -> tuple[Row, ...]:
    return tuple(
        Row(
            (
                f"{one.silent} of {boards}",
                *(metric.text(value) for value in (one.score, one.lowest_score, one.highest_score)),
                f"{one.score / whole:.1%}" if whole else "",
                f"{one.tried:,}" if one.tried == one.ways else f"{one.tried:,} of {one.ways:,}",
            ),
            strong=one.silent == silent[0].silent,
        )
        for one in silent
    )
