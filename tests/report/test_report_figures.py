from __future__ import annotations

import re

import numpy as np
from report_parts import a_latency, a_layer, a_matrix

from edgekd.report import Document, figures, tables
from edgekd.report.document import Activation, Confusion, Latency
from edgekd.report.formatting import milliseconds, percent, times


def latencies(**medians: float) -> dict[str, Latency]:
    return {name: Latency(**a_latency(median, 1, seed)) for seed, (name, median) in enumerate(medians.items())}


def test_latency_axis_is_logarithmic_only_where_models_are_far_apart():
    far = figures.latency_distribution(latencies(student=2, teacher=30)).svg
    near = figures.latency_distribution(latencies(student=2, teacher=2.2)).svg
    assert "(log scale)" in far
    assert "(log scale)" not in near


def test_percentiles_are_marked():
    models = latencies(student=2, teacher=30)
    svg = figures.latency_distribution(models).svg
    for model in models.values():
        assert f"p99 {milliseconds(model.p99_ms)}" in svg


def test_latency_without_teacher():
    drawn = figures.latency_over_time(latencies(student=2))
    assert [key.role for key in drawn.keys] == ["student"]
    assert "var(--teacher)" not in drawn.svg


def test_every_launch_is_a_dot(brief):
    document = Document.model_validate(brief)
    drawn = figures.launches(document)
    assert drawn.svg.count("<use ") == len(document.verdict.speedup.by_launch) == 9
    assert times(document.verdict.speedup.value) in drawn.caption


def test_identical_latencies_are_drawn():
    fields = a_latency(2, 1, 0) | {f"p{q}_ms": 2.0 for q in (50, 90, 99)} | {"samples_ms": [2.0] * 6000}
    drawn = figures.latency_distribution({"student": Latency(**fields)})
    assert "p50 2.00 ms" in drawn.svg


def test_confusion_of_many_classes_shows_the_worst():
    k = 100
    student = np.diag(np.full(k, 50))
    bad = np.arange(20, 40)
    student[bad, bad - 20] = 30
    matrix = Confusion(classes=[f"class{i}" for i in range(k)], student=student.tolist())
    drawn = figures.confusion(matrix)
    assert len(drawn) == 1
    assert "Shown: the 20 of 100 classes with the most errors." in drawn[0].caption
    assert set(re.findall(r"class\d+", drawn[0].svg)) == {f"class{i}" for i in bad}


def test_confusion_cells_carry_their_counts():
    matrix = Confusion(classes=["a", "b"], student=[[7, 3], [0, 11]], teacher=[[5, 5], [4, 7]])
    counts, change = figures.confusion(matrix)
    assert set(re.findall(r">([−+]?\d+)<", counts.svg)) == {"7", "3", "11"}
    assert set(re.findall(r">([−+]?\d+)<", change.svg)) == {"+2", "−2", "−4", "+4"}
    # Every change is for the better here: more on the diagonal, less beside it.
    assert "var(--better)" in change.svg
    assert "var(--worse)" not in change.svg


def test_recall_by_formula():
    matrix = a_matrix(0.8, 5)
    counts = np.array(matrix, dtype=float)
    assert np.allclose(tables.recall(matrix), [counts[c, c] / counts[c].sum() for c in range(len(counts))])
    assert np.isnan(tables.recall([[0, 0], [1, 3]])[0])


def test_class_without_samples_is_left_out():
    matrix = Confusion(classes=["seen", "unseen"], student=[[5, 1], [0, 0]], teacher=[[6, 0], [0, 0]])
    assert [row.cells[0] for row in tables.changed_classes(matrix).rows] == ["seen"]


def test_learned_curve_jumps_at_its_cuts():
    layer = Activation(**a_layer(3))
    pieces = figures._pieces(np.array(layer.x), layer.cuts)
    assert len(pieces) == layer.k
    assert np.array_equal(np.concatenate(pieces), np.arange(len(layer.x)))
    x = np.array(layer.x)
    for piece, cut in zip(pieces[1:], layer.cuts, strict=True):
        assert x[piece[0] - 1] <= cut < x[piece[0]]


def test_inputs_outside_the_plot_are_told():
    fields = a_layer(0)
    fields["histogram"] |= {"counts": [10, 80], "below": 4, "above": 6}
    assert figures.activation(Activation(**fields), 0).caption.endswith(f"{percent(0.1)} of inputs outside the plot")


def test_activation_with_the_least_facts():
    drawn = figures.activation(Activation(name="act", kind="prelu", x=[-1, 0, 1], y=[-0.2, 0, 1]), 0)
    assert drawn.caption == "prelu"
    assert "var(--student)" in drawn.svg
