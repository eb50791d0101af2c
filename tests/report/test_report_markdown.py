from __future__ import annotations

import re

import pytest

from edgekd.report import Document, engine_tables
from edgekd.report.document import Energy
from edgekd.report.formatting import milliseconds, percent, times
from edgekd.report.markdown import markdown_from_document
from edgekd.report.quantization_tables import passages
from edgekd.report.tables import RUNG_LABELS


def tables_in(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cells, split as GitHub splits them: at pipes that no backslash escapes."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in block.splitlines()] for block in blocks]


def test_tables_parse(document):
    found = tables_in(markdown_from_document(document))
    rest = [*passages(document.quantization), *engine_tables.passages(document)]
    with_tables = sum(passage.table is not None for passage in rest)
    assert len(found) == 7 + with_tables  # budgets, ladder, attack, latency, launches, mode, environment
    for rows in found:
        assert {len(row) for row in rows} == {len(rows[0])}
        assert all(re.fullmatch(r"\s*(:---|---:)\s*", cell) for cell in rows[1])


def test_ladder_and_latency(document):
    _, ladder, attack, latency, launches, *_ = tables_in(markdown_from_document(document))
    assert [row[0].strip() for row in ladder[2:]] == list(RUNG_LABELS.values())
    assert ladder[2][1].strip() == percent(document.row("teacher").score)
    assert "built on the device; see the row below" in ladder[7][-1]
    assert [[cell.strip() for cell in row] for row in attack[2:]] == [
        ["Teacher", "93.00%", "31.00%", "30.00 to 32.00%", "0.10%", "10,000"],
        ["Student, labels only", "90.40%", "28.00%", "27.00 to 29.00%", "0.10%", "10,000"],
        ["Student, distilled", "92.00%", "35.00%", "34.00 to 36.00%", "0.10%", "10,000"],
    ]
    ratios = document.verdict.speedup.by_launch
    assert [cell.strip() for cell in launches[2]] == [
        "9", times(min(ratios)), times(document.verdict.speedup.value), times(max(ratios)),
        percent((max(ratios) - min(ratios)) / document.verdict.speedup.value),
    ]  # fmt: skip
    assert [cell.strip() for cell in latency[2][:3]] == [
        "p50",
        milliseconds(document.latency.student.p50_ms),
        milliseconds(document.latency.teacher.p50_ms),
    ]


def test_verdict_and_command(document):
    text = markdown_from_document(document)
    assert text.startswith("# 4.32x faster, −1.15 points of accuracy, on raspberry-pi-5\n\n**VALID**")
    assert f"```sh\n{document.command}\n```" in text


def test_invalid_with_reasons(report):
    report["verdict"] |= {"status": "INVALID", "reasons": ["too short: 12 queries", "clocks changed"]}
    text = markdown_from_document(Document.model_validate(report))
    assert "**INVALID**" in text
    assert "- too short: 12 queries\n- clocks changed\n" in text


def test_what_is_not_measured_is_not_called_invalid(report):
    report["verdict"] |= {"status": "NOT_MEASURED", "reasons": ["nothing was measured on a device: edgekd bench"]}
    report["verdict"]["speedup"] = {"reason": "Not measured yet."}
    text = markdown_from_document(Document.model_validate(report))
    assert text.startswith("# −1.15 points of accuracy, speed not measured on raspberry-pi-5\n\n**NOT MEASURED**")
    assert "- nothing was measured on a device: edgekd bench\n" in text
    assert "INVALID" not in text


def test_no_quantization_says_why(report):
    report["quantization"] = {"reason": "The recipe asks for no quantization."}
    text = markdown_from_document(Document.model_validate(report))
    assert "## Quantization\n\nThe recipe asks for no quantization.\n" in text


@pytest.mark.parametrize("hostile", ["a|b", "<script>alert(1)</script>", "x\n\n# heading", "![i](j)", "`code`"])
def test_hostile_text_stays_text(report, hostile):
    report["target"]["name"] = hostile
    report["environment"] = {"fact": hostile}
    report["command"] = f"edgekd run {hostile} ```"
    report["quantization"]["layers"][0] |= {"layer": hostile, "suggestion": hostile}
    report["quantization"]["still_float"] = [hostile]
    text = markdown_from_document(Document.model_validate(report))
    outside_code = re.sub(r"^(`{4,})sh\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_code
    assert "![i]" not in outside_code
    assert [line for line in outside_code.splitlines() if line.startswith("# ")] == outside_code.splitlines()[:1]
    assert all(len({len(row) for row in rows}) == 1 for rows in tables_in(outside_code))


def test_energy_by_rail(document):
    both = {
        name: getattr(document.latency, name).model_copy(
            update={"energy": [Energy(rail="VDD_IN", sensor="ina3221", per_inference_mj=used, launches=9)]}
        )
        for name, used in (("student", 2.0), ("teacher", 9.0))
    }
    measured = document.model_copy(update={"latency": document.latency.model_copy(update=both)})
    latency = tables_in(markdown_from_document(measured))[3]
    name, *cells = [cell.strip().replace("\\", "").replace("*", "") for cell in latency[-1]]
    assert (name, cells) == ("energy, rail VDD_IN", ["2.00 mJ", "9.00 mJ", times(4.5)])
    assert not any("energy" in row[0] for row in tables_in(markdown_from_document(document))[2])
