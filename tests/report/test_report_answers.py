"""Single answers in the report: estimates, and the score class by class."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from report_parts import a_report

from edgekd.report import tables
from edgekd.report.answer_figures import of_answers
from edgekd.report.answers import ClassScores, Estimates
from edgekd.report.document import Document
from edgekd.report.part import Metric

DICE = Metric(name="dice", label="Dice")
MAE = Metric(name="mae", label="MAE", higher_is_better=False, share=False, unit="years")


def scores(n: list[int]) -> ClassScores:
    values = [i / len(n) if count else None for i, count in enumerate(n)]
    return ClassScores(names=[f"class {i}" for i in range(len(n))], n=n, student=values, teacher=values[::-1])


def test_classes_are_drawn_the_students_lowest_first_and_only_those_with_samples():
    (drawn,) = of_answers(scores([3, 0, 5]), DICE)
    assert drawn.title == "Dice by class"
    texts = [drawn.svg.find(name) for name in ("class 0 (3)", "class 2 (5)")]
    assert -1 not in texts and "class 1" not in drawn.svg
    (alone,) = of_answers(scores([3, 0, 5]).model_copy(update={"teacher": None}), DICE)
    assert [key.text for key in alone.keys] == ["student"] and "var(--teacher)" not in alone.svg
    (many,) = of_answers(scores([1] * 40), DICE)
    assert "Shown: the 30 of 40 with the lowest." in many.caption


def test_every_value_that_is_estimated_has_its_figure():
    parts = [
        Estimates(name=name, true=[20.0, 40.0, 60.0], student=[22.0, 38.0, 61.0], teacher=[21.0, 40.0, 60.0])
        for name in ("age", "height")
    ]
    drawn = of_answers(parts, MAE)
    assert [figure.title for figure in drawn] == ["Age, estimated and true", "Height, estimated and true"]
    assert "true, years" in drawn[0].svg and "3 test samples" in drawn[0].caption
    assert [key.text for key in drawn[0].keys] == ["student", "teacher"]
    (alone,) = of_answers([parts[0].model_copy(update={"teacher": None})], MAE)
    assert [key.text for key in alone.keys] == ["student"] and "var(--teacher)" not in alone.svg


@pytest.mark.parametrize(
    ("part", "changes"), [(ClassScores, {"n": [1]}), (Estimates, {"student": [1.0]})], ids=["classes", "estimates"]
)
def test_columns_of_other_lengths_are_refused(part, changes):
    whole = {
        ClassScores: {"names": ["a", "b"], "n": [1, 2], "student": [0.1, 0.2], "teacher": [0.1, None]},
        Estimates: {"name": "age", "true": [1.0, 2.0], "student": [1.0, 2.0], "teacher": [1.0, 2.0]},
    }[part]
    part.model_validate(whole)
    with pytest.raises(ValidationError, match="differ in length"):
        part.model_validate(whole | changes)


def test_values_without_points_are_told_with_their_unit():
    assert (MAE.title, MAE.noun, MAE.of_class) == ("MAE, years", "MAE", "MAE")
    assert (MAE.text(1.234), MAE.change(-0.5), MAE.bare(0.25)) == ("1.23", "−0.500 years", "+0.250")
    assert MAE.span((1.0, 2.0)) == "1.00 to 2.00" and DICE.span((0.5, 0.75)) == "50.00 to 75.00%"
    assert DICE.change(-0.004) == "−0.40 points" and Metric().noun == "accuracy"
    assert (MAE.change(-1.4e-7), MAE.bare(1.4e-7)) == ("0 years", "0")  # rounding
    assert (MAE.loss(1.0), MAE.loss(-1.16)) == ("1.00 years", "−1.16 years")
    assert (MAE.loss(1.4e-7), MAE.loss(1.4e-6)) == ("0 years", "1.40e−06 years")
    assert (DICE.loss(0.05), DICE.loss(-0.003)) == ("5.00 points", "−0.30 points")


def test_a_budget_of_accuracy_is_in_the_unit_of_the_metric():
    report = a_report() | {"metric": MAE.model_dump()}
    report["verdict"]["budgets"] = [{"name": "accuracy_drop", "limit": 1.0, "value": 2.5, "met": False}]
    (row,) = tables.budgets(Document.model_validate(report)).rows
    assert row.cells == ("accuracy_drop", "at most 1.00 years", "2.50 years", "MISSED")
