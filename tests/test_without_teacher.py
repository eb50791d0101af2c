"""A recipe that names no teacher: the student alone, from its training to the report."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile

import jsonschema
import pytest
import yaml
from tiny_job import ALONE, SPREAD, TINY, make_job

from edgekd import importing, kit, pipeline, recipe, stage_table, stages
from edgekd.errors import RecipeError
from edgekd.recipe_schema import json_schema
from edgekd.report import Absent
from edgekd.report.assemble import document_from_run
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document

EVERYTHING = (
    "corruptions={kinds: [jpeg], severities: [1], images: 20}", "attack={steps: 1}", "quantize.method=ptq",
    "benchmark.end_to_end=true", "budgets.p99_ms=1000",
)  # fmt: skip
NO_TEACHER = Absent(reason="The recipe names no teacher.")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A job in which all is asked for that a student can do alone, run to its end; and its artifacts."""
    job = make_job(tmp_path_factory.mktemp("alone") / "store", *EVERYTHING, recipe=ALONE)
    return job, pipeline.run(job, "bench")


@pytest.fixture(scope="module")
def document(alone):
    job, artifacts = alone
    return document_from_run(job.store.recorded(job.run_id), artifacts)


def test_nothing_is_made_of_a_teacher(alone):
    job, artifacts = alone
    assert list(artifacts) == [
        "scratch", "student", "attack", "onnx-student", "corrupt", "quantize", "engine-student", "bench",
    ]  # fmt: skip
    again = {
        one.stage: one.action for one in pipeline.plan(make_job(job.store.root, *EVERYTHING, recipe=ALONE), "bench")
    }
    assert again == dict.fromkeys(artifacts, "reuse") | {"bench": "run"}


@pytest.mark.parametrize("command", sorted(stage_table.LAST))
def test_no_command_asks_for_one(tmp_path, command):
    for target in ("local", "jetson"):
        job = make_job(tmp_path, *EVERYTHING, recipe=ALONE, target=target)
        named = [stage.name for stage in stage_table.needed(job, stage_table.last_stage(command, job))]
        assert not [name for name in named if "teacher" in name]
        job.device = "ssh://orin"
        named = [stage.name for stage in stage_table.needed(job, "bench")]
        assert named[-1] == "bench" and "build-teacher" not in named
        assert ("build-student" in named) == (target == "jetson")


def test_the_report_shows_the_student_and_compares_nothing(alone, document):
    measured = alone[1]["bench"].result
    assert document.row("device").score == measured["accuracy"]["student"]["score"]
    assert document.latency.student.p50_ms == measured["latency"]["student"]["p50_ms"]
    assert document.row("device").size_bytes > 0 and document.row("student").params > 0
    assert document.row("teacher").reason == "the recipe names none"
    assert all(row.agreement_with_teacher is None for row in document.ladder)
    for compared in (
        document.verdict.speedup, document.verdict.accuracy_change, document.latency.teacher,
        document.training["teacher"], document.confusion.teacher,
    ):  # fmt: skip
        assert compared == NO_TEACHER
    assert list(document.robustness.clean) == ["student"] and document.robustness.rows[0].teacher is None
    assert [one.network for one in document.attack.networks] == ["scratch", "student"]
    assert set(document.engines) == set(document.end_to_end.models) == {"student"}
    (budget,) = document.verdict.budgets
    assert (budget.name, budget.met) == ("p99_ms", True)


def test_both_pages_say_plainly_that_there_is_none(document):
    html, markdown = html_from_document(document), markdown_from_document(document)
    score = document.metric.text(document.row("device").score)
    assert markdown.startswith(f"# Accuracy {score}, median ")
    assert f", not compared with a teacher, on {document.target_name}" in markdown.splitlines()[0]
    assert "- **Speed-up**: – (The recipe names no teacher.)" in markdown
    assert "## Speed-up from launch to launch\n\nThe recipe names no teacher.\n" in markdown
    assert "| Measure | Student |\n" in markdown and "To teacher" not in markdown
    assert "both models" not in markdown and "both models" not in html
    assert "Not compared with the teacher: The recipe names no teacher." in html
    assert "What the method gave: the distilled student against the same student trained on the labels only" in html
    assert "the student is" not in html


def test_the_command_line_shows_the_student(tiny, main):
    (tiny / "alone.yaml").write_text(ALONE)
    code, out, err = main("distill", "alone.yaml")
    assert code == 0, err
    assert "Student, distilled" in out and "To teacher" not in out and "Teacher" not in out
    assert "NOT MEASURED: Accuracy " in out and ", speed not measured, not compared with a teacher, on local" in out


def test_values_that_are_estimated_are_the_students(tmp_path):
    job = make_job(
        tmp_path / "store", "data.target=slant", "distill.method=scratch", "distill.scratch=false", recipe=ALONE
    )
    artifacts = pipeline.run(job, "student")
    document = document_from_run(job.store.recorded(job.run_id), artifacts)
    assert document.answers[0].teacher is None and len(document.answers[0].student) == 50
    assert "estimated and true" in html_from_document(document)


def test_layers_are_kept_in_float_for_what_the_student_reaches(alone):
    job, _ = alone
    search = ("quantize.auto_mixed=true", "quantize.search_minutes=0.05", "quantize.calibrate=minmax")
    made = pipeline.run(make_job(job.store.root, *EVERYTHING, *search, recipe=ALONE), "quantize")
    found = made["quantize"].result["search"]
    assert found["met"] == (found["score"] >= found["float_score"])
    assert found["tried"][0]["keep_float"] == 0


@pytest.mark.slow
def test_a_student_is_trained_on_with_rounding(tmp_path):
    job = make_job(
        tmp_path / "store", "distill.method=scratch", "quantize.method=qat", "quantize.epochs=1", recipe=ALONE
    )
    made = pipeline.run(job, "quantize")
    assert "teacher" not in made["finetune"].manifest["inputs"] and made["quantize"].result["precision"] == "int8"


def test_a_kit_has_the_student_alone(alone, tmp_path):
    job, _ = alone
    (tmp_path / "board.yaml").write_text("name: my-board\nbackends: ['null']\nboard: {soc: none, memory_gb: [1]}\n")
    carried = make_job(job.store.root, recipe=ALONE, target=str(tmp_path / "board.yaml"))
    made = pipeline.run(carried, "kit")["kit"]
    with tarfile.open(made.file(stages.ARCHIVE)) as archive:
        archive.extractall(tmp_path, filter="data")
    there = tmp_path / kit.FOLDER
    assert [model["name"] for model in json.loads((there / "spec.json").read_text())["models"]] == ["student"]
    assert "This folder holds a student, " in (there / "README.md").read_text()
    assert not (there / "teacher").exists() and not (there / "onnx" / "teacher.onnx").exists()
    finished = subprocess.run([sys.executable, "run.py"], cwd=there, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    imported = importing.job_of_kit(
        job.store, there / "results.json", run_id="29990101-imported", created="now", command="edgekd import"
    )
    found = pipeline.run(imported, "bench")
    document = document_from_run(job.store.recorded("29990101-imported"), found)
    assert document.latency.student.n >= 64 and document.verdict.speedup == NO_TEACHER


# --- what needs a teacher -----------------------------------------------------------------------------------------

STAGED = "distill={method: staged, methods: [angular, {fitnet: {}}, kd], epochs: [1, 1, 1], train: {epochs: 3}}"
COMBINED = "distill={method: combined, methods: [online_peers, {rkd: {distance_weight: 1}}], train: {epochs: 1}}"
SPREAD_STUDENT = f"student={yaml.safe_load(SPREAD)['student']}"


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (("distill.method=kd",), "kd"),
        ((STAGED,), "fitnet, kd"),
        ((COMBINED,), "rkd"),
        (("distill.method=spread", SPREAD_STUDENT), "spread"),
    ],
    ids=["kd", "staged", "combined", "spread"],
)
def test_a_method_that_needs_a_teacher_is_told_before_training(tmp_path, overrides, names):
    with pytest.raises(RecipeError) as caught:
        pipeline.run(make_job(tmp_path / "store", *overrides, recipe=ALONE), "bench")
    assert str(caught.value).splitlines() == [
        f"error: distill needs a teacher for {names}, and there is none",
        "       methods for classification without a teacher: angular, online_peers, scratch",
        "fix:   name a teacher: --set teacher.network=NAME, or --set distill.method=scratch",
    ]
    assert caught.value.key == "distill.method" and not (tmp_path / "store" / "store").exists()


def test_without_images_a_teacher_is_all_that_there_is_to_learn_from(tmp_path):
    nothing = "{source: none, channels: 1, height: 8, width: 8, classes: 10, normalize: {mean: [0.5], std: [0.5]}}"
    with pytest.raises(RecipeError) as caught:
        pipeline.run(make_job(tmp_path, f"data={nothing}", "distill.method=dfad", recipe=ALONE), "student")
    assert str(caught.value).splitlines()[1:] == [
        "       methods for classification without a teacher: none without images",
        "fix:   name a teacher: --set teacher.network=NAME",
    ]


def test_a_method_for_another_task_is_answered_with_those_that_need_none(tmp_path):
    with pytest.raises(RecipeError) as caught:
        pipeline.run(make_job(tmp_path, "data.target=slant", recipe=ALONE), "student")
    assert str(caught.value).splitlines()[1:] == [
        "       methods for regression: scratch",
        "fix:   --set distill.method=scratch",
    ]


def test_rounding_in_the_loop_is_answered_with_a_method_that_needs_none(tmp_path):
    with pytest.raises(RecipeError, match="which looks into the student's modules") as caught:
        pipeline.run(make_job(tmp_path, "quantize.method=qat", recipe=ALONE), "quantize")
    assert caught.value.fix == "set quantize.method = ptq, or distill.method = scratch"


@pytest.mark.parametrize(("name", "limit"), [("speedup", "2"), ("accuracy_drop", "0.01")])
def test_a_budget_against_the_teacher_is_refused(name, limit):
    with pytest.raises(RecipeError) as caught:
        recipe.parse(f"{ALONE}budgets:\n  {name}: {limit}\n", name="alone.yaml")
    line = ALONE.count("\n") + 2
    assert str(caught.value).splitlines() == [
        f"error: alone.yaml:{line}: budgets.{name} = {limit} compares with the teacher, and the recipe names none",
        "       budgets without a teacher: p99_ms, size_bytes",
        f"fix:   --set budgets.{name}=null, or name a teacher: --set teacher.network=NAME",
    ]


# --- the recipe ---------------------------------------------------------------------------------------------------


def test_a_teacher_can_be_left_out_taken_away_and_added():
    left_out, null = recipe.parse(ALONE), recipe.parse(f"{ALONE}teacher: null\n")
    assert left_out.teacher is None and left_out.model_dump() == null.model_dump()
    without = recipe.parse(TINY, overrides=["teacher=null", "distill.method=scratch"])
    assert without.teacher is None and without.student.model_dump() == recipe.parse(TINY).student.model_dump()
    added = recipe.parse(ALONE, overrides=["teacher.network=resnet", "teacher.depth=8"])
    assert added.teacher.options["depth"] == 8
    with pytest.raises(RecipeError, match=r"teacher\.network is missing"):
        recipe.parse(ALONE, overrides=["teacher.depth=8"])


def test_the_schema_lets_it_be_left_out():
    schema, content = json_schema(), yaml.safe_load(ALONE)
    assert "teacher" not in schema["required"]
    for teacher in ({}, {"teacher": None}, {"teacher": {"network": "resnet", "depth": 8}}):
        jsonschema.validate({**content, **teacher}, schema)
    for wrong in ("resnet", {"depth": 8}, {"network": "resnet", "deph": 8}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**content, "teacher": wrong}, schema)
