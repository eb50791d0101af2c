from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from edgekd.errors import StoreError
from edgekd.report import Document, load, write
from edgekd.report.document import MAX_SAMPLES, SCHEMA_VERSION


def test_json_round_trip(document, tmp_path):
    write(document, tmp_path)
    assert load(tmp_path / "report.json") == document
    assert (tmp_path / "report.json").read_text() == document.to_json()


def test_files_written(document, tmp_path):
    page = write(document, tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "report.html"
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.json", "report.md"]


def test_unwritable_folder(document, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as error:
        write(document, tmp_path / "file")
    assert f"error: {tmp_path / 'file'}: cannot write the report (" in str(error.value)
    assert "fix:   free some space or give a folder that you may write to" in str(error.value)


def test_other_schema_version(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(StoreError) as error:
        load(path)
    assert str(error.value).splitlines() == [
        f"error: {path}: schema_version = 2 cannot be read",
        "       this edgekd reads schema_version 1",
        "fix:   use the edgekd that wrote it, or make the report again: edgekd report",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the report (No such file or directory)"),
        ('{"schema_version": 1, ', "not a report, the JSON is damaged"),
        ("[]", "schema_version = null cannot be read"),
        ('{"schema_version": 1}', "run_id: Field required"),
    ],
)
def test_unreadable_report(tmp_path, content, message):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StoreError) as error:
        load(path)
    assert f"error: {path}: " in str(error.value)
    assert message in str(error.value)
    assert "make the report again: edgekd report" in str(error.value)


def set_at(report: dict, path: str, value: object) -> dict:
    *steps, last = path.split(".")
    part = report
    for step in steps:
        part = part[int(step)] if isinstance(part, list) else part[step]
    part[int(last) if isinstance(part, list) else last] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("verdict.status", "INVALID", "a verdict that is INVALID needs at least one reason"),
        ("verdict.speedup.value", float("nan"), "finite number"),
        ("ladder.0.score", None, "score, n and ci95 go together"),
        ("ladder.0.score", 93.1, "no share from 0 to 1"),
        ("ladder.0.reason", "measured all the same", "either score, n and ci95, or a reason"),
        ("verdict.status", "NOT_MEASURED", "a verdict that is NOT_MEASURED needs at least one reason"),
        ("verdict.budgets.0.met", None, "budget p99_ms: value and met go together"),
        ("ladder.5.reason", None, "either score, n and ci95, or a reason"),
        ("latency.student.samples_ms", [1.0], "samples_ms and samples_time_s differ in length"),
        ("confusion.student.2", [1, 2], "confusion.student is not 10 x 10"),
        ("activation.1.y", [0.0, 1.0], "x and y differ in length"),
        ("activation.1.histogram.low", 99.0, "a histogram from 99.0 to .* has no bins"),
        ("telemetry.series.cpu_hz", [1.0], "1 readings at 120 times"),
        ("quantization.layers.2.output_sqnr_db", float("inf"), "finite number"),
        ("quantization.layers.2.input_clipped", 1.2, "less than or equal to 1"),
        ("quantization.layers.2.layer", "stem", "two rows of quantization.layers have one name"),
        ("quantization.layers.2.colour", "red", "Extra inputs are not permitted"),
        ("quantization.still_float.0", "conv9", "still_float names conv9, which has no row"),
        ("quantization.classes.0.change", None, "class airplane: scores and samples do not go together"),
        ("quantization.lma.1.step", 0.0, "greater than 0"),
        ("quantization.findings.0.effect", "ugly", "'rejected' or 'slow'"),
        ("quantization.search.tried", [], "at least 1 item"),
        ("extra", 1, "Extra inputs are not permitted"),
    ],
)
def test_contradiction_refused(report, path, value, message):
    with pytest.raises(ValidationError, match=message):
        Document.model_validate(set_at(report, path, value))


@pytest.mark.parametrize("part", ["layers", "lma", "classes"])
def test_every_field_of_a_row_is_needed(report, part):
    for name in report["quantization"][part][0]:
        rows = [{key: value for key, value in row.items() if key != name} for row in report["quantization"][part]]
        with pytest.raises(ValidationError, match="Field required"):
            Document.model_validate(report | {"quantization": report["quantization"] | {part: rows}})


def test_samples_are_thinned_evenly(report):
    n = 3 * MAX_SAMPLES + 1
    report["latency"]["student"] |= {"samples_ms": list(range(1, n + 1)), "samples_time_s": list(range(n))}
    student = Document.model_validate(report).latency.student
    assert len(student.samples_ms) == MAX_SAMPLES
    assert np.array_equal(np.array(student.samples_ms), np.array(student.samples_time_s) + 1)
    assert set(np.diff(student.samples_time_s)) <= {3, 4}
