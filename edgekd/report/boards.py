"""What several boards found of one recipe: a row for each, beside its own report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from edgekd.report.document import SCHEMA_VERSION, Budget, Document, Speedup
from edgekd.report.formatting import DASH, milliseconds, size, times
from edgekd.report.part import Absent, AccuracyChange, Count, Metric, Part, Positive
from edgekd.report.tables import Row, Table

Status = Literal["VALID", "INVALID", "FAILED"]


class Board(Part):
    """One board: what its own report says in short, or, for a FAILED one, why there is none.

    `report`: the path of its own report.html, from the folder of this one.
    """

    name: str
    url: str
    target: str
    run_id: str
    status: Status
    reasons: list[str] = Field([])
    exit_code: Count = 0
    model: str | None = None
    score: float | None = None
    n: Count | None = None
    accuracy_change: AccuracyChange | None = None
    speedup: Speedup | None = None
    student_p50_ms: Positive | None = None
    student_p99_ms: Positive | None = None
    teacher_p50_ms: Positive | None = None
    size_bytes: Count | None = None
    budgets: list[Budget] = Field([])
    report: str | None = None

    @model_validator(mode="after")
    def _not_valid_says_why(self) -> Self:
        if self.status != "VALID" and not self.reasons:
            raise ValueError(f"board {self.name}: {self.status} needs at least one reason")
        return self

    @property
    def missed(self) -> list[str]:
        """The budgets that it does not meet."""
        return [budget.name for budget in self.budgets if budget.met is False]


class BoardsDocument(Part):
    """All that the report of several boards says.

    `status`: FAILED when a board was not measured, else INVALID when a measurement does not hold, else VALID.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    created: str
    command: str
    recipe: dict[str, Any]
    metric: Metric = Metric()
    status: Status
    boards: list[Board] = Field(min_length=1)

    def to_json(self) -> str:
        """As JSON text, fields in the order of this class, ending in a newline."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def document_from_boards(record: Mapping[str, Any], found: Mapping[str, Document]) -> BoardsDocument:
    """The report: `record` is the run's run.json, `found` the boards' own reports by name, as far as there are any."""
    boards = [_board(listed, found.get(listed["name"])) for listed in record["boards"]]
    statuses: list[Status] = ["FAILED", "INVALID", "VALID"]
    return BoardsDocument(
        run_id=record["run_id"],
        created=record["created"],
        command=record["command"],
        recipe=record["recipe"],
        metric=next((document.metric for document in found.values()), Metric()),
        status=min((board.status for board in boards), key=statuses.index),
        boards=boards,
    )


def _board(listed: Mapping[str, Any], document: Document | None) -> Board:
    known = {name: listed[name] for name in ("name", "url", "target", "run_id")}
    if document is None:
        return Board(
            **known, status="FAILED", reasons=[listed["error"]["what"]], exit_code=listed["error"]["exit_code"]
        )
    verdict, latency = document.verdict, document.latency
    device, engine = document.row("device"), document.row("engine")
    student, teacher = (None if isinstance(one, Absent) else one for one in (latency.student, latency.teacher))
    assert device is not None and student is not None, "a board that was measured has these"
    return Board(
        **known,
        status="VALID" if verdict.status == "VALID" else "INVALID",
        reasons=verdict.reasons,
        model=document.environment.get("device", {}).get("model") or None,
        score=device.score,
        n=device.n,
        accuracy_change=None if isinstance(verdict.accuracy_change, Absent) else verdict.accuracy_change,
        speedup=None if isinstance(verdict.speedup, Absent) else verdict.speedup,
        student_p50_ms=student.p50_ms,
        student_p99_ms=student.p99_ms,
        teacher_p50_ms=teacher.p50_ms if teacher else None,
        size_bytes=engine.size_bytes if engine else None,
        budgets=verdict.budgets,
        report=f"{listed['name']}/report.html",
    )


def table(document: BoardsDocument) -> Table:
    """A row per board."""
    columns = (
        "Board", "Target", "Verdict", document.metric.title, "Change", "Student, p50", "p99", "Teacher, p50",
        "Speed-up", "95% interval", "Size",
    )  # fmt: skip
    against = ", against its teacher there" if any(board.teacher_p50_ms for board in document.boards) else ""
    return Table(
        f"The same student on every board{against}",
        columns,
        tuple(Row((board.name,), reason=board.reasons[0]) if board.status == "FAILED" else _row(board, document.metric)
              for board in document.boards),
        notes=("Each board's own report has the rest; what another board's measurement is worth does not count here.",),
        text_columns=frozenset({0, 1, 2}),
    )  # fmt: skip


def _row(board: Board, metric: Metric) -> Row:
    change, speedup = board.accuracy_change, board.speedup
    verdict = board.status + (f", missed: {', '.join(board.missed)}" if board.missed else "")
    cells = (
        board.name,
        board.target,
        verdict,
        DASH if board.score is None else metric.text(board.score),
        DASH if change is None else metric.change(change.value),
        *(DASH if ms is None else milliseconds(ms) for ms in (board.student_p50_ms, board.student_p99_ms)),
        DASH if board.teacher_p50_ms is None else milliseconds(board.teacher_p50_ms),
        DASH if speedup is None else times(speedup.value),
        DASH if speedup is None else f"{times(speedup.ci95[0])} to {times(speedup.ci95[1])}",
        DASH if board.size_bytes is None else size(board.size_bytes),
    )
    return Row(cells)


def headline(document: BoardsDocument) -> str:
    """`2 of 3 boards measured, 1.9x to 4.2x faster`."""
    measured = [board for board in document.boards if board.status != "FAILED"]
    speedups: Sequence[float] = sorted(board.speedup.value for board in measured if board.speedup)
    text = f"{len(measured)} of {len(document.boards)} boards measured"
    if speedups:
        ends = dict.fromkeys(map(times, (speedups[0], speedups[-1])))
        text += f"; the student's speed over its teacher's: {' to '.join(ends)}"
    return text


def reasons(document: BoardsDocument) -> list[tuple[str, list[str]]]:
    """By the board's name: why its measurement does not hold, or does not exist."""
    return [(board.name, board.reasons) for board in document.boards if board.reasons]
