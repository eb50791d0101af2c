"""What the report says of what is inside the networks, as tables."""

from __future__ import annotations

import math

from edgekd.report.document import Document
from edgekd.report.formatting import count, number, size
from edgekd.report.part import Absent
from edgekd.report.tables import RUNG_LABELS, Row, Table


def sections(document: Document) -> list[tuple[str, Table]]:
    """Heading and table of all that this run has to tell."""
    made = (("Angles between classes", angles(document)), ("Silent boards", silent_boards(document)))
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
    whole, metric = found.silent[0].score, document.metric
    rows = [
        Row(
            (
                f"{one.silent} of {found.boards}",
                *(metric.text(value) for value in (one.score, one.lowest_score, one.highest_score)),
                f"{one.score / whole:.1%}" if whole else "",
                f"{one.tried:,}" if one.tried == one.ways else f"{one.tried:,} of {one.ways:,}",
            ),
            strong=one.silent == 0,
        )
        for one in found.silent
    ]
    one = found.parts[0]
    notes = (
        f"Each board runs {one.file.replace('0', 'N')} ({size(one.size_bytes)}, {count(one.macs)} multiply-accumulates)"
        f" and sends {number(found.message_bytes)} bytes per image; head.onnx fuses what arrives, zeros for silence.",
        f"Each feature is given by {found.copies} of the boards. Computed by ONNX Runtime with the boards' own files.",
    )
    columns = ("Silent boards", "Mean", "Lowest", "Highest", "Of the whole", "Sets tried")
    return Table("Accuracy when boards do not answer", columns, tuple(rows), notes)
