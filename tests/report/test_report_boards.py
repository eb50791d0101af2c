"""The report of several boards: a row each, whatever became of the others."""

from __future__ import annotations

import json

import pytest

from edgekd import report
from edgekd.report import Absent, boards, html, markdown
from edgekd.report.formatting import milliseconds, percent, times

NAMES = {"good": "VALID", "hot": "INVALID", "gone": "FAILED"}


def a_record(*names):
    listed = [
        {
            "name": name, "url": f"ssh://{name}", "target": "raspberry-pi-5", "run_id": f"run/{name}",
            "error": {"what": "it is <gone>", "exit_code": 3} if name == "gone" else None,
        }
        for name in names
    ]  # fmt: skip
    return {
        "run_id": "run",
        "created": "2026-01-01",
        "command": "edgekd run",
        "recipe": {"name": "r"},
        "boards": listed,
    }


@pytest.fixture(scope="session")
def several(document):
    verdict = document.verdict.model_copy(update={"status": "INVALID", "reasons": ["throttled: cool it"]})
    found = {"good": document, "hot": document.model_copy(update={"verdict": verdict})}
    return boards.document_from_boards(a_record(*NAMES), found)


def test_each_board_has_a_row_of_its_own(several, document):
    assert {board.name: board.status for board in several.boards} == NAMES
    good, hot, gone = several.boards
    assert good.student_p50_ms == document.latency.student.p50_ms
    assert good.speedup == document.verdict.speedup and good.budgets == document.verdict.budgets
    assert (good.report, gone.report, gone.exit_code) == ("good/report.html", None, 3)
    assert hot.reasons == ["throttled: cool it"]
    rows = boards.table(several).rows
    cells = dict(zip(boards.table(several).columns, rows[0].cells, strict=True))
    assert cells["Student, p50"] == milliseconds(document.latency.student.p50_ms)
    assert cells["Top-1"] == percent(document.row("device").score)
    assert cells["Speed-up"] == times(document.verdict.speedup.value)
    assert (rows[2].cells, rows[2].reason) == (("gone",), "it is <gone>")


@pytest.mark.parametrize(
    ("names", "status"), [(["good"], "VALID"), (["good", "hot"], "INVALID"), (["gone", "hot", "good"], "FAILED")]
)
def test_the_worst_board_gives_the_status(document, several, names, status):
    hot = document.model_copy(
        update={"verdict": document.verdict.model_copy(update={"status": "INVALID", "reasons": ["x"]})}
    )
    assert boards.document_from_boards(a_record(*names), {"good": document, "hot": hot}).status == status


def test_the_files_say_the_same(several, tmp_path):
    assert report.write(several, tmp_path) == tmp_path / "report.html"
    again = report.BoardsDocument.model_validate(json.loads((tmp_path / "report.json").read_text()))
    assert again == several
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert page == html.html_from_boards(several) and text == markdown.markdown_from_boards(several)
    assert "it is &lt;gone&gt;" in page and "it is &lt;gone&gt;" in text
    assert '<a href="good/report.html">' in page and "gone/report.html" not in page
    assert "throttled: cool it" in page and "throttled: cool it" in text
    assert "<script" not in page


def test_the_headline_counts_what_was_measured(several, document):
    factor = times(document.verdict.speedup.value)
    assert boards.headline(several) == f"2 of 3 boards measured; the student's speed over its teacher's: {factor}"
    gone = boards.document_from_boards(a_record("gone"), {})
    assert boards.headline(gone) == "0 of 1 boards measured"


def test_boards_without_a_teacher_are_compared_with_none(document):
    absent = Absent(reason="The recipe names no teacher.")
    alone = document.model_copy(
        update={
            "verdict": document.verdict.model_copy(update={"speedup": absent, "accuracy_change": absent}),
            "latency": document.latency.model_copy(update={"teacher": absent}),
        }
    )
    found = boards.document_from_boards(a_record("good"), {"good": alone})
    assert boards.table(found).caption == "The same student on every board"
    assert boards.headline(found) == "1 of 1 boards measured"


def test_a_board_that_does_not_count_says_why():
    known = {"name": "a", "url": "local:", "target": "local", "run_id": "r/a"}
    with pytest.raises(ValueError, match="board a: INVALID needs at least one reason"):
        boards.Board(**known, status="INVALID")
