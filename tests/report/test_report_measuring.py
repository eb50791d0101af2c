"""What the pages say about how the engines were asked."""

from __future__ import annotations

import pytest
from markupsafe import escape
from report_parts import a_mode, a_report

from edgekd import registry
from edgekd.report import measuring_figures, measuring_tables
from edgekd.report.document import Document
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document


def a_document(name, report=None, **changed):
    return Document.model_validate((report or a_report()) | {"mode": a_mode(name) | changed})


def passage(name, **changed):
    (found,) = measuring_tables.passages(a_document(name, **changed))
    return found


def cells(found):
    """{first cell: {column: cell}}."""
    return {row.cells[0]: dict(zip(found.table.columns, row.cells, strict=True)) for row in found.table.rows}


@pytest.mark.parametrize("name", registry.names("mode"))
def test_every_mode_has_its_section_on_both_pages(brief, name):
    document = a_document(name, brief)
    (found,) = measuring_tables.passages(document)
    html, markdown = html_from_document(document), markdown_from_document(document)
    assert html.count(f"<h3>{found.heading}</h3>") == 1
    assert markdown.count(f"### {found.heading}\n") == 1
    for sentence in found.sentences:
        assert escape(sentence) in html
    if found.table:
        assert found.table.caption in html


def without_teacher(part):
    """The same, had there been no teacher."""
    if isinstance(part, dict):
        kept = {key: without_teacher(value) for key, value in part.items() if key != "teacher"}
        return kept | ({"speedup": None} if "speedup" in part else {})
    return [without_teacher(one) for one in part if one != "teacher"] if isinstance(part, list) else part


@pytest.mark.parametrize("name", registry.names("mode"))
def test_every_mode_has_its_section_without_a_teacher(brief, name):
    reason = {"reason": "The recipe names no teacher."}
    brief["latency"]["teacher"], brief["mode"] = reason, without_teacher(a_mode(name))
    document = Document.model_validate(brief)
    (found,) = measuring_tables.passages(document)
    figures = measuring_figures.of_measuring(document)
    assert "teacher" not in " ".join(found.sentences) and "Ahead" not in " ".join(found.sentences)
    assert all(key.text != "teacher" for figure in figures.values() for key in figure.keys)
    if found.table:
        assert {len(row.cells) for row in found.table.rows} == {len(found.table.columns)}
        assert "Speed-up" not in found.table.columns and "both" not in found.table.caption
    assert found.heading in html_from_document(document) and found.heading in markdown_from_document(document)


def test_one_after_the_other_has_nothing_to_add():
    assert passage("single_stream").table is None
    assert measuring_figures.of_measuring(a_document("single_stream")) == {}


def test_a_query_of_several_samples():
    text = " ".join(passage("multi_stream").sentences)
    assert text.startswith("A query is 8 samples; its latency is that of the last one answered.")
    assert "The student took a query as one batch. The teacher took a query one sample after the other" in text


def test_the_sweep_marks_the_best_batch_of_each():
    found = passage("offline")
    assert [row.cells[0] for row in found.table.rows if row.strong] == ["student, batch 32", "teacher, batch 32"]
    row = cells(found)["student, batch 4"]
    ms = 4.3 * (1 + 0.6 * 3)
    assert row["Throughput"] == f"{4e3 / ms:.0f} /s"
    assert row["p50 of a batch"] == f"{ms:.1f} ms"
    assert row["p50 per sample"] == f"{ms / 4:.2f} ms"
    assert found.sentences[0] == (
        f"The student computes most at batch 32: {32e3 / (4.3 * (1 + 0.6 * 31)):.0f} samples a second,"
        f" {32 / (1 + 0.6 * 31):.2f}x of what it does at batch 1."
    )


def test_a_best_batch_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="best_batch of the student is none of its sweep"):
        a_document("offline", best_batch={"student": 3, "teacher": 1})


def test_deadlines_and_who_cannot_keep_up():
    found = passage("fps")
    assert found.sentences[0].startswith("A frame arrives every 16.7 ms, 60.0 a second")
    assert found.sentences[1:] == (
        "The teacher cannot keep up: it needs 18.6 ms a frame, so its queue grows for as long as frames come, and its "
        "latencies say how long that was.",
    )
    rows = cells(found)
    assert (rows["Student"]["Deadlines missed"], rows["Teacher"]["Deadlines missed"]) == (
        "0 of 1,800",
        "1,791 of 1,800",
    )
    assert (rows["Student"]["Busy"], rows["Teacher"]["Highest rate"]) == ("25.80%", "53.8 /s")


def test_no_samples_draw_no_deadlines(brief):
    assert measuring_figures.of_measuring(a_document("fps", brief)) == {}


def test_who_is_ahead_at_the_start_and_at_the_end():
    found = passage("sustained")
    assert found.sentences[0] == (
        "Ahead at the start: the student, speed-up 1.86x (1.82x to 1.90x). "
        "At the end: the teacher, speed-up 0.752x (0.737x to 0.767x)."
    )
    assert found.sentences[1] == "The student's median latency changed by +171.0% from the first window to the last."
    assert found.sentences[3:] == (
        "The hottest sensor went from 50.0 °C to 83.4 °C.",
        "The device says: the firmware throttled the board.",
    )
    assert len(found.table.rows) == 20
    assert cells(found)["570 to 600 s"]["Ahead"] == "teacher"


def test_a_machine_without_sensors_is_said_to_have_none():
    windows = [window | {"temperature_c": None, "clock_hz": None} for window in a_mode("sustained")["windows"]]
    document = a_document("sustained", windows=windows, throttling=[])
    drawn = measuring_figures.of_measuring(document)["sustained"]
    assert drawn.caption.endswith("No sensor tells the temperature.")
    assert "hottest sensor" not in drawn.svg
    assert "The device reported no throttling." in passage("sustained", windows=windows, throttling=[]).sentences


def test_both_timings_stand_side_by_side():
    model = {
        "p50_ms": 4.0, "p90_ms": 4.2, "p99_ms": 5.0, "n": 900, "p50_by_turn_ms": [3.9, 4.0, 4.1],
        "agent_p50_ms": 4.06, "agent_over_loadgen": 1.015,
    }  # fmt: skip
    found = {"version": "6.0.17", "models": {"student": model, "teacher": model | {"agent_over_loadgen": 0.99}}}
    document = a_document("single_stream", a_report() | {"loadgen": found})
    mode, loadgen = measuring_tables.passages(document)
    assert mode.name == "single_stream"
    rows = cells(loadgen)
    assert rows["Student"] == {
        "Model": "Student", "p50, edgekd": "4.06 ms", "p50, LoadGen": "4.00 ms", "Difference": "1.50%",
        "LoadGen, by turn": "3.90 ms to 4.10 ms", "p90, LoadGen": "4.20 ms", "p99, LoadGen": "5.00 ms",
        "Queries": "900",
    }  # fmt: skip
    assert rows["Teacher"]["Difference"] == "−1.00%"
    assert "LoadGen 6.0.17" in html_from_document(document)


def test_end_to_end_stands_by_steps(brief):
    steps = {"decode": 0.4, "resize": 0.2, "normalise": 0.1, "infer": 4.0, "argmax": 0.01}
    student = {"p50_ms": 4.72, "p90_ms": 4.9, "p99_ms": 5.5, "n": 1200, "steps_ms": steps}
    teacher = student | {"p50_ms": 18.7, "steps_ms": steps | {"infer": 18.0}}
    found = {
        "decoder": "Pillow 13.0.0",
        "models": {"student": student, "teacher": teacher},
        "speedup": {"value": 3.97, "ci95": [3.9, 4.0]},
    }
    document = a_document("single_stream", brief | {"end_to_end": found})
    _, passage_ = measuring_tables.passages(document)
    assert passage_.sentences == (
        "From the stored image to the answer, the student is 3.97x as fast as the teacher "
        "(95% interval 3.90x to 4.00x).",
        "The student itself takes 84.93% of that time.",
        "The teacher itself takes 96.21% of that time.",
        "Decoder: Pillow 13.0.0.",
    )
    rows = cells(passage_)
    assert list(rows) == [*steps, "all, p50", "all, p90", "all, p99", "images timed"]
    assert rows["infer"] == {"Step": "infer", "Student": "4.00 ms", "Teacher": "18.0 ms"}
    html = html_from_document(document)
    assert html.count("<strong>Time by step</strong>") == 1
    assert passage_.table.caption in html
