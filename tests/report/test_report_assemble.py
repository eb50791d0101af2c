"""From a run's record and artifacts to the document: the numbers are those of the artifacts, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd import pipeline
from edgekd.artifact import Store
from edgekd.report import Absent
from edgekd.report.assemble import document_from_run


@pytest.fixture(scope="module")
def run(done):
    return pipeline.recorded(Store(done.store), done.run_id)


def test_every_rung_has_the_accuracy_of_its_logits(run) -> None:
    record, artifacts = run
    document = document_from_run(record, artifacts)
    labels = np.load(artifacts["teacher"].file("test_labels.npy"))
    for rung, stage, name in (
        ("teacher", "teacher", "test_logits.npy"),
        ("student", "student", "test_logits.npy"),
        ("onnx", "onnx-student", "test_logits.npy"),
        ("device", "bench", "student_logits.npy"),
    ):
        predictions = np.load(artifacts[stage].file(name)).argmax(1)
        row = document.row(rung)
        assert row.n == len(labels)
        assert row.top1 == pytest.approx((predictions == labels).mean())
        assert row.ci95[0] <= row.top1 <= row.ci95[1]


def test_confusion_counts_every_sample_once(run) -> None:
    document = document_from_run(*run)
    assert np.sum(document.confusion.student) == document.row("device").n
    assert np.trace(document.confusion.student) == round(document.row("device").top1 * document.row("device").n)


def test_latency_samples_are_those_of_the_file(run) -> None:
    _, artifacts = run
    document = document_from_run(*run)
    for name in ("student", "teacher"):
        durations = np.load(artifacts["bench"].file(f"{name}_latency.npy"))[:, 3] / 1e6
        found = getattr(document.latency, name)
        assert found.n == len(durations)
        assert set(np.round(found.samples_ms, 9)) <= set(np.round(durations, 9))
        assert found.p50_ms == pytest.approx(np.median(durations))


def test_a_report_of_a_half_finished_run_says_what_is_missing(run) -> None:
    record, artifacts = run
    upto = {name: artifacts[name] for name in ("teacher", "scratch", "student")}
    document = document_from_run(record, upto)
    assert document.row("device").reason == "not made yet"
    assert document.verdict.status == "INVALID"
    assert document.verdict.reasons == ["not measured on a device yet: edgekd bench"]
    assert isinstance(document.latency.student, Absent)
    assert document.activation[0].kind == "lma"


@pytest.mark.parametrize(
    ("budget", "limit", "met"),
    [
        ("p99_ms", 1e-9, False), ("p99_ms", 1e9, True), ("size_bytes", 1, False), ("speedup", 1e9, False),
        ("speedup", 1e-9, True), ("accuracy_drop", 1.0, True),
    ],
)  # fmt: skip
def test_budgets_are_judged_on_the_right_side(run, budget: str, limit: float, met: bool) -> None:
    record, artifacts = run
    recipe = {**record["recipe"], "budgets": {**record["recipe"]["budgets"], budget: limit}}
    (found,) = document_from_run({**record, "recipe": recipe}, artifacts).verdict.budgets
    assert (found.name, found.limit, found.met) == (budget, limit, met)


def test_a_baseline_that_was_switched_off_is_said_to_be(run) -> None:
    record, artifacts = run
    recipe = {**record["recipe"], "distill": {**record["recipe"]["distill"], "scratch": False}}
    without = {name: artifact for name, artifact in artifacts.items() if name != "scratch"}
    assert (
        document_from_run({**record, "recipe": recipe}, without).row("scratch").reason == "switched off in the recipe"
    )
