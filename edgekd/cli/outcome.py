"""What came of a run: its report, what of it the terminal shows, and the exit code that its verdict asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import BudgetMissed, ResultInvalid

if TYPE_CHECKING:
    from edgekd.artifact import Artifact, Store
    from edgekd.report import BoardsDocument, Document
    from edgekd.terminal import Terminal

# What of the report's ladder fits on a terminal of 80 columns, beside the score.
LADDER_COLUMNS = ("Rung", "95% interval", "To teacher", "Size", "Params")


def written(store: Store, run_id: str | None) -> tuple[Document | BoardsDocument, Path]:
    """The report of a run, None is the newest, and where it was written."""
    from edgekd import pipeline
    from edgekd import report as reports
    from edgekd.report import boards
    from edgekd.report.assemble import document_from_run

    record, artifacts = pipeline.recorded(store, run_id)
    document: Document | BoardsDocument
    if "boards" in record:
        measured = [board for board in record["boards"] if not board["error"]]
        own = {board["name"]: document_from_run(*pipeline.recorded(store, board["run_id"])) for board in measured}
        document = boards.document_from_boards(record, own)
    else:
        document = document_from_run(record, artifacts)
    return document, reports.write(document, store.run_folder(record["run_id"]))


def show(document: Document, path: Path, terminal: Terminal) -> None:
    """The ladder, alarms and the verdict; the whole is in the report."""
    from edgekd.report import Absent, network_tables, tables

    ladder = tables.ladder(document)
    lines = [ladder.columns, *(row.cells for row in ladder.rows if not row.reason)]
    shown = [at for at, one in enumerate(ladder.columns) if one in (*LADDER_COLUMNS, document.metric.title)]
    columns, *rows = ([cells[at] for at in shown] for cells in lines)
    terminal.table(columns, rows)
    for table in (network_tables.boards(document), network_tables.heard(document)):
        if not isinstance(table, Absent):
            terminal.say("")
            terminal.table(table.columns, [row.cells for row in table.rows])
    terminal.say("")
    for name, engine in document.engines.items():
        for alarm in engine.alarms:
            terminal.say(f"alarm: {name}: {alarm}")
    terminal.say(f"{document.verdict.status_text}: {tables.headline(document)}")
    terminal.say(str(path))


def judge(document: Document, path: Path) -> None:
    """Raises ResultInvalid or BudgetMissed: the report is there, and the exit code says how it ended."""
    verdict = document.verdict
    if verdict.status == "INVALID":
        by_kit = document.command.startswith("edgekd import ")
        raise ResultInvalid(
            f"the measurement does not hold: {verdict.reasons[0]}",
            allowed=f"reasons: {len(verdict.reasons)}, all in {path}",
            fix="quiet the board, and run the kit there again: python3 run.py"
            if by_kit
            else "quiet the machine and measure again: edgekd bench",
        )
    missed = [budget for budget in verdict.budgets if budget.met is False]
    if missed:
        first = missed[0]
        raise BudgetMissed(
            f"budgets.{first.name} = {first.limit:g} is missed: {first.value:.4g}",
            allowed=f"{len(missed)} of {len(verdict.budgets)} budgets missed, all in {path}",
            fix="train longer, choose a larger student or another quantize.method, or relax the budget",
        )


def show_kit(made: Artifact, terminal: Terminal) -> None:
    """Where it is, and what is done with it."""
    from edgekd.kit import FOLDER
    from edgekd.stages import ARCHIVE

    file = made.file(ARCHIVE)
    terminal.say(f"kit for the board: {file} ({made.result['size_bytes'] / 1e6:.1f} MB)")
    terminal.say(f"  on the board:  tar xzf {ARCHIVE} && python3 {FOLDER}/run.py")
    terminal.say("  back here:     edgekd import results.json")
