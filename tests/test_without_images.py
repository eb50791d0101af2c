"""Recipes without a data set: from a teacher's checkpoint to a report, and what they are refused."""

from __future__ import annotations

import pytest
from tiny_job import TINY, make_job

from edgekd import pipeline, stages
from edgekd.errors import RecipeError, StageError
from edgekd.report.assemble import document_from_run
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document

DATA = """\
data:
  {source: none, channels: 1, height: 8, width: 8, classes: 10, samples: 80, normalize: {mean: [0.3], std: [0.4]}}"""
RECIPE = TINY.replace("data: {source: digits, train_limit: 200, test_limit: 50}", DATA).replace(
    "activation: lma", "activation: relu"
)
DFAD = ("distill.method=dfad", "distill.latent=8", "distill.student_steps=2", "distill.train.batch_size=20")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of the tiny job's teacher, as an override."""
    made = pipeline.run(make_job(tmp_path_factory.mktemp("teacher") / "store"), "teacher")["teacher"]
    return f"teacher.checkpoint={made.file(stages.WEIGHTS)}"


def without_images(store, teacher, *overrides: str):
    return make_job(store, *DFAD, teacher, *overrides, recipe=RECIPE)


def document(job, artifacts):
    return document_from_run(job.store.recorded(job.run_id), artifacts)


def test_without_any_image_speed_is_measured_and_nothing_is_scored(teacher, tmp_path):
    job = without_images(tmp_path / "store", teacher)
    artifacts = pipeline.run(job, "bench")
    assert set(artifacts) == {
        "teacher", "student", "onnx-teacher", "onnx-student", "engine-teacher", "engine-student", "bench",
    }  # fmt: skip
    assert "score" not in artifacts["student"].result
    assert "val_score" not in artifacts["student"].result["epochs"][0]
    assert artifacts["student"].result["epochs"][0]["train_loss_discrepancy"] > 0
    found = document(job, artifacts)
    assert {row.rung: row.reason for row in found.ladder} == {
        "teacher": "no test images", "scratch": "no images to train on", "student": "no test images",
        "onnx": "no test images", "quantized": "The recipe asks for no quantization.", "engine": "no test images",
        "device": "no test images",
    }  # fmt: skip
    reason = "There are no test images: the recipe's data are none, and name no test."
    assert found.verdict.accuracy_change.reason == found.confusion.reason == reason
    assert found.latency.student.p50_ms > 0
    assert "accuracy" not in {claim.subject for claim in found.evidence}
    for page in (markdown_from_document(found), html_from_document(found)):
        assert "there are no training images: the method makes its own" in page
        assert "no test images" in page


def test_test_images_alone_score_the_student(teacher, tmp_path):
    job = without_images(
        tmp_path / "store", teacher, "data.test={digits: {}}", "data.test_limit=50", "attack={steps: 1}"
    )
    artifacts = pipeline.run(job, "attack")
    found = document(job, artifacts)
    assert found.row("teacher").n == found.row("student").n == 50
    assert [row.network for row in found.attack.networks] == ["teacher", "student"]
    assert found.confusion.student


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["teacher.checkpoint=null"], [
            "error: the teacher cannot be trained: data.source = none has no images",
            "       expected: a teacher that was trained elsewhere",
            "fix:   --set teacher.checkpoint=FILE"]),
        (["distill.method=kd"], [
            "error: the method kd learns from images, and data.source = none has none",
            "       methods that make their own: dfad",
            "fix:   --set distill.method=dfad, or name a data set"]),
        (["distill.train.schedule=plateau"], [
            "error: train.schedule = plateau follows the validation split, and there are no images to validate on",
            "       expected: constant, step or cosine",
            "fix:   --set distill.train.schedule=cosine"]),
        (["quantize.method=ptq"], [
            "error: quantize.method = ptq needs images, and data.source = none has none",
            "       expected: none, where there is nothing to measure ranges on",
            "fix:   --set quantize.method=none"]),
        (["attack={}"], [
            "error: attack needs test images, and data.source = none names none",
            "       expected: data.test, {NAME: {option: value}}",
            "fix:   set attack = null, or name test images"]),
        (["data.height=30"], [
            "error: the generator of dfad cannot make images of 30x8 pixels",
            "       expected: two sides that are multiples of 4, beyond 32 pixels of 16: it doubles them",
            "fix:   use a teacher for images of 32x8 pixels, or another method"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)  # fmt: skip
def test_what_needs_images(overrides, lines, teacher, tmp_path):
    with pytest.raises(RecipeError) as caught:
        pipeline.run(without_images(tmp_path / "store", teacher, *overrides), "quantize")
    assert str(caught.value).splitlines() == lines


def test_a_batch_of_one_is_found_before_the_teacher_is_trained(tmp_path):
    job = make_job(tmp_path / "store", "distill.train.batch_size=1")
    with pytest.raises(StageError) as caught:
        pipeline.run(job, "student")
    assert str(caught.value).startswith("error: the network has batch normalisation, which learns nothing from a batch")
    assert not list(tmp_path.rglob("manifest.json"))
