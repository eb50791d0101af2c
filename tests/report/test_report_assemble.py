"""From a run's record and artifacts to the document: the numbers are those of the artifacts, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import numpy as np
import pytest
from tiny_job import make_job

from edgekd import pipeline
from edgekd.artifact import Artifact, Store
from edgekd.report import Absent
from edgekd.report.assemble import document_from_run
from edgekd.report.quantization import Quantization
from edgekd.stats import wilson


@pytest.fixture(scope="module")
def run(done):
    return pipeline.recorded(Store(done.store), done.run_id)


@pytest.fixture(scope="module")
def quantized(done, tmp_path_factory):
    """The same job with an INT8 student, up to there."""
    store = shutil.copytree(done.store, tmp_path_factory.mktemp("quantized") / "store")
    job = make_job(store, "quantize.method=ptq", "budgets.accuracy_drop=0.5", "budgets.speedup=2")
    pipeline.run(job, "quantize")
    return pipeline.recorded(job.store, job.run_id)


def changed(record: Mapping, **recipe) -> dict:
    return {**record, "recipe": {**record["recipe"], **recipe}}


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
        assert row.score == pytest.approx((predictions == labels).mean())
        assert row.ci95[0] <= row.score <= row.ci95[1]


@pytest.mark.parametrize(("cuts", "times"), [(0, None), (1, "1 time"), (3, "3 times")])
def test_a_benchmark_that_went_on_after_an_interruption_says_so(run, cuts, times) -> None:
    record, artifacts = run
    bench = artifacts["bench"]
    manifest = {**bench.manifest, "result": {**bench.result, "interruptions": cuts}}
    notes = document_from_run(record, {**artifacts, "bench": Artifact(bench.folder, manifest)}).notes
    said = [note for note in notes if "interrupted" in note]
    assert said == ([f"The benchmark was interrupted {times}, and went on behind its last launch."] if times else [])


def test_confusion_counts_every_sample_once(run) -> None:
    document = document_from_run(*run)
    assert np.sum(document.confusion.student) == document.row("device").n
    assert np.trace(document.confusion.student) == round(document.row("device").score * document.row("device").n)


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
    assert document.verdict.status == "NOT_MEASURED"
    assert document.verdict.reasons == ["nothing was measured on a device: edgekd bench"]
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


def test_launches_are_those_of_the_bench(run) -> None:
    record, artifacts = run
    speedup = document_from_run(record, artifacts).verdict.speedup
    assert speedup.by_launch == artifacts["bench"].result["speedup_by_launch"]
    assert speedup.value == pytest.approx(np.median(speedup.by_launch))


def test_a_recipe_without_quantization_says_so(run) -> None:
    record, artifacts = run
    document = document_from_run(record, artifacts)
    assert document.quantization == Absent(reason="The recipe asks for no quantization.")
    assert document.row("quantized").reason == "The recipe asks for no quantization."
    older = {name: section for name, section in record["recipe"].items() if name != "quantize"}
    assert document_from_run({**record, "recipe": older}, artifacts) == document.model_copy(update={"recipe": older})


def test_a_quantization_that_is_not_made_yet_says_so(run) -> None:
    record, artifacts = run
    document = document_from_run(changed(record, quantize={"method": "ptq"}), artifacts)
    assert document.quantization == Absent(reason="Not quantized yet: edgekd quantize.")
    assert document.row("quantized").reason == "not made yet"


def test_the_quantization_is_what_the_stage_recorded(quantized) -> None:
    record, artifacts = quantized
    found, result = document_from_run(record, artifacts).quantization, artifacts["quantize"].result
    for name in set(Quantization.model_fields) - {"accuracy"}:
        assert found.model_dump(mode="json", by_alias=True)[name] == result[name], name
    assert found.layers and found.classes and found.lma


def test_the_cost_is_that_of_the_logits(quantized) -> None:
    record, artifacts = quantized
    document = document_from_run(record, artifacts)
    labels = np.load(artifacts["quantize"].file("test_labels.npy"))
    before, after = (
        np.load(artifacts[stage].file("test_logits.npy")).argmax(1) == labels for stage in ("onnx-student", "quantize")
    )
    found = document.quantization.accuracy
    assert (found.float_score, found.score) == (pytest.approx(before.mean()), pytest.approx(after.mean()))
    assert found.ci95 == wilson(int(after.sum()), len(labels))
    assert found.change.value == pytest.approx(after.mean() - before.mean())
    assert found.change.ci95[0] <= found.change.value <= found.change.ci95[1]
    assert document.row("quantized").score == pytest.approx(after.mean())
    assert document.row("quantized").size_bytes == artifacts["quantize"].result["size"]["bytes"]


@pytest.mark.parametrize(("limit", "met"), [(1.0, True), (-1.0, False)], ids=["met", "missed"])
def test_without_a_device_the_last_model_is_judged(quantized, limit: float, met: bool) -> None:
    record, artifacts = quantized
    document = document_from_run(changed(record, budgets={"accuracy_drop": limit, "speedup": 2.0}), artifacts)
    drop, speedup = document.verdict.budgets
    assert drop.value == pytest.approx(document.row("teacher").score - document.row("quantized").score)
    assert drop.met is met
    assert (speedup.value, speedup.met) == (None, None)
    assert document.verdict.status == "NOT_MEASURED"


def test_a_budget_of_accuracy_is_not_missed_by_rounding(quantized) -> None:
    record, artifacts = quantized
    document = document_from_run(record, artifacts)
    drop = document.row("teacher").score - document.row("quantized").score

    def met(limit: float) -> bool | None:
        budgets = document_from_run(changed(record, budgets={"accuracy_drop": limit}), artifacts).verdict.budgets
        return budgets[0].met

    assert met(drop - 1e-7) is True  # float32 has no more digits
    assert met(drop - 1e-4) is False


def test_without_a_student_there_is_nothing_to_compare(run) -> None:
    record, artifacts = run
    document = document_from_run(record, {name: artifacts[name] for name in ("teacher", "scratch")})
    assert isinstance(document.verdict.accuracy_change, Absent)
    assert isinstance(document.verdict.speedup, Absent)
