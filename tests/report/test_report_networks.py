"""What the report tells of angles between classes and of silent boards; nothing where there is nothing to tell."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from edgekd.report.assemble import _angles, _spread
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document
from edgekd.report.network_tables import angles, sections, silent_boards
from edgekd.report.part import Absent

ANGLES = {"smallest_deg": 70.2, "mean_deg": 94.1, "largest_deg": 120.5, "closest": [3, 1]}
SPREAD = {
    "boards": 3,
    "copies": 2,
    "message_bytes": 64,
    "head": {"file": "head.onnx", "size_bytes": 900},
    "parts": [{"file": f"part_{n}.onnx", "size_bytes": 20_000, "params": 4_000, "macs": 80_000} for n in range(3)],
    "silent": [
        {"silent": 0, "tried": 1, "ways": 1, "score": 0.9, "lowest_score": 0.9, "highest_score": 0.9},
        {"silent": 1, "tried": 3, "ways": 3, "score": 0.81, "lowest_score": 0.8, "highest_score": 0.82},
        {"silent": 2, "tried": 2, "ways": 3, "score": 0.45, "lowest_score": 0.4, "highest_score": 0.5},
    ],
}


def made(**results: dict) -> dict:
    return {name: SimpleNamespace(result=result) for name, result in results.items()}


def recipe(method: str, methods: list | None = None) -> dict:
    return {"recipe": {"distill": {"method": method, **({"methods": methods} if methods else {})}}}


def network(angles: dict | None = ANGLES) -> dict:
    return {"class_names": ["a", "b", "c", "d"], "class_angles": angles}


@pytest.fixture
def told(document):
    found = _angles(recipe("combined", [{"kd": {}}, {"angular": {}}]), made(teacher=network(), student=network()))
    return document.model_copy(update={"angles": found, "spread": _spread(made(parts=SPREAD))})


def test_angles_are_told_where_the_method_looks_at_them():
    artifacts = made(teacher=network(), scratch=network(None), student=network())
    assert [one.network for one in _angles(recipe("angular"), artifacts)] == ["teacher", "student"]
    assert _angles(recipe("angular"), artifacts)[0].closest == ("d", "b")
    assert isinstance(_angles(recipe("kd"), artifacts), Absent)
    assert _angles(recipe("angular"), made(teacher=network(None))).reason == "No network has a linear classifier."


def test_the_table_of_angles(told):
    table = angles(told)
    assert [row.cells for row in table.rows] == [
        ("Teacher", "70.2°", "94.1°", "120.5°", "d and b"),
        ("Student, distilled", "70.2°", "94.1°", "120.5°", "d and b"),
    ]
    classes = len(told.confusion.classes)
    assert f"{math.degrees(math.acos(-1 / (classes - 1))):.1f}°" in table.notes[1]


def test_the_table_of_silent_boards(told):
    assert [row.cells for row in silent_boards(told).rows] == [
        ("0 of 3", "90.00%", "90.00%", "90.00%", "100.0%", "1"),
        ("1 of 3", "81.00%", "80.00%", "82.00%", "90.0%", "3"),
        ("2 of 3", "45.00%", "40.00%", "50.00%", "50.0%", "2 of 3"),
    ]


def test_both_pages_tell_them(told, document):
    assert sections(document) == []
    for page in (html_from_document, markdown_from_document):
        for heading in ("Angles between classes", "Silent boards"):
            assert heading in page(told) and heading not in page(document)
