"""The report in short, as Markdown for a pull request or a job summary."""

from __future__ import annotations

from edgekd.report import (
    boards,
    engine_tables,
    measuring_tables,
    network_tables,
    quantization_tables,
    robustness_tables,
    tables,
)
from edgekd.report.document import Document
from edgekd.report.formatting import DASH, flat
from edgekd.report.part import Absent
from edgekd.report.passage import Passage
from edgekd.report.tables import Table


def markdown_from_document(document: Document) -> str:
    """Verdict, ladder, latency, quantization, environment and the command that reproduces them, in GitHub's dialect."""
    verdict = document.verdict
    parts = [f"# {_inline(tables.headline(document))}", f"**{verdict.status_text}** · run {_inline(document.run_id)}"]
    if verdict.reasons:
        parts.append("\n".join(f"- {_inline(reason)}" for reason in verdict.reasons))
    parts.append(
        "\n".join(
            f"- **{finding.name}**: {_inline(finding.value)} ({_inline(finding.detail)})"
            for finding in tables.findings(document)
        )
    )
    for heading, table in (
        ("Budgets", tables.budgets(document)),
        ("Accuracy", tables.ladder(document)),
        ("Corrupted images", _corrupted(document)),
        ("Accuracy under attack", tables.attack(document)),
        *network_tables.sections(document),
        ("Latency", tables.latency(document)),
        ("Speed-up from launch to launch", tables.launches(document)),
    ):
        parts += [f"## {heading}", _inline(table.reason) if isinstance(table, Absent) else _table(table)]
    measuring = measuring_tables.passages(document)
    parts += [
        "## How it was measured",
        *(_passages(measuring) if not isinstance(measuring, Absent) else [_inline(measuring.reason)]),
    ]
    parts += ["## Quantization"]
    if isinstance(document.quantization, Absent):
        parts.append(_inline(document.quantization.reason))
    else:
        parts += _passages(quantization_tables.passages(document.quantization))
    compiled = _passages(engine_tables.passages(document))
    parts += ["## Engines", *(compiled or ["Nothing was compiled yet: edgekd compile."])]
    facts = flat(document.environment)
    rows = "\n".join(f"| {_inline(name)} | {_inline(value)} |" for name, value in facts)
    parts += ["## Environment", f"| Fact | Value |\n|:---|:---|\n{rows}" if facts else "The run recorded no facts."]
    parts += ["## Reproduce", _code(document.command)]
    if document.notes:
        parts += ["## Notes", "\n".join(f"- {_inline(note)}" for note in document.notes)]
    return "\n\n".join(parts) + "\n"


def markdown_from_boards(document: boards.BoardsDocument) -> str:
    """A row per board, and why some do not count."""
    parts = [f"# {_inline(boards.headline(document))}", f"**{document.status}** · run {_inline(document.run_id)}"]
    for name, why in boards.reasons(document):
        parts.append(f"**{_inline(name)}**\n\n" + "\n".join(f"- {_inline(reason)}" for reason in why))
    parts += ["## Boards", _table(boards.table(document)), "## Reproduce", _code(document.command)]
    return "\n\n".join(parts) + "\n"


def _corrupted(document: Document) -> Table | Absent:
    """The means by category: the rest is in report.html."""
    part = document.robustness
    return part if isinstance(part, Absent) else robustness_tables.tables(part, document.metric)[0]


def _passages(passages: list[Passage]) -> list[str]:
    parts = []
    for passage in passages:
        parts.append(f"### {passage.heading}")
        if passage.sentences:
            parts.append("\n".join(f"- {_inline(sentence)}" for sentence in passage.sentences))
        if passage.table:
            parts.append(_table(passage.table))
    return parts


def _table(table: Table) -> str:
    width = len(table.columns)
    lines = [
        _line(table.columns),
        _line([":---" if column in table.text_columns else "---:" for column in range(width)]),
    ]
    for row in table.rows:
        cells = list(row.cells)
        if row.reason:
            cells += [DASH] * (width - len(cells) - 1) + [row.reason]
        lines.append(_line([_inline(cell) for cell in cells]))
    return "\n".join(lines) + "".join(f"\n\n{_inline(note)}" for note in table.notes)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _inline(text: str) -> str:
    """Text that cannot become markup: no HTML, no table cell, no emphasis, no link, no second line."""
    for character in "\\`*_[]|~#":
        text = text.replace(character, "\\" + character)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def _code(text: str) -> str:
    """A fenced block whose fence is longer than any run of back-ticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}sh\n{text}\n{fence}"
