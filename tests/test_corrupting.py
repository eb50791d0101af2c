"""`edgekd eval --corruptions`: the stage, the command, and what the report says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_job import make_job

from edgekd import pipeline, stage_table
from edgekd.data.corruptions import corrupted
from edgekd.errors import DataError, RecipeError
from edgekd.report.assemble import document_from_run
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document
from edgekd.stages.exporting import reference
from edgekd.stages.job import MODEL

SLANT = ("data.target=slant", "distill.method=regression", "distill.scratch=false", "student.activation=relu")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The tiny job for real values, evaluated on some corruptions; and its artifacts."""
    given = "corruptions={kinds: [gaussian_noise, jpeg, contrast_down], severities: [1, 5], images: 40}"
    job = make_job(tmp_path_factory.mktemp("corrupted") / "store", given, *SLANT)
    return job, pipeline.run(job, "corrupt")


def test_both_networks_are_scored_on_the_same_corrupted_images(evaluated, tmp_path):
    job, artifacts = evaluated
    result = artifacts["corrupt"].result
    assert result["n"] == 40 and result["metric"]["name"] == "mae"
    assert [(row["kind"], row["severity"]) for row in result["rows"]] == [
        (kind, severity) for kind in ("gaussian_noise", "jpeg", "contrast_down") for severity in (1, 5)
    ]
    images, judge = job.dataset.test.images[:40], job.dataset.judge("test", 40)
    for name in ("teacher", "student"):
        run = reference(artifacts[f"onnx-{name}"].file(MODEL), tmp_path, threads=1)
        expected = judge.score(run(job.dataset.normalize(corrupted(images, "jpeg", 5))))
        assert result["rows"][3][name] == pytest.approx(expected, rel=1e-6)
        assert result["clean"][name] == pytest.approx(judge.score(run(job.dataset.normalize(images))), rel=1e-6)


def test_the_report_tells_the_means_of_each_category(evaluated):
    job, artifacts = evaluated
    record = job.store.recorded(job.run_id)
    document = document_from_run(record, artifacts)
    rows = artifacts["corrupt"].result["rows"]
    mean = np.mean([row["student"] for row in rows if row["category"] == "digital"])
    markdown, html = markdown_from_document(document), html_from_document(document)
    assert f"| {document.metric.text(mean)} |" in next(
        line for line in markdown.splitlines() if line.startswith("| digital")
    )
    assert "MAE, ° by corruption and severity" in html and "gaussian_noise" in html
    assert "estimated and true" in html and "See the confusion matrix." not in html
    assert document.metric.unit == "°" and document.answers[0].name == "slant"
    upto = {name: artifact for name, artifact in artifacts.items() if name != "corrupt"}
    assert document_from_run(record, upto).robustness.reason == "Not measured yet: edgekd eval."


def test_the_command_asks_for_all_of_them(tiny, main):
    overrides = ("--set", "corruptions.kinds=[jpeg]", "--set", "corruptions.severities=[2]")
    code, out, err = main("eval", "tiny.yaml", "--corruptions", *overrides, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [(row["kind"], row["severity"]) for row in document["robustness"]["rows"]] == [("jpeg", 2)]
    assert document["ladder"][3]["score"] is not None and document["metric"]["name"] == "top1"


def test_without_the_flag_it_scores_the_images_as_they_are(tiny, main):
    job = make_job(tiny / "store")
    assert [stage.name for stage in stage_table.needed(job, "corrupt")][-1] == "onnx-student"
    asked = make_job(tiny / "store", "corruptions={}")
    assert asked.recipe.corruptions.kinds == [] and asked.recipe.corruptions.severities == [1, 2, 3, 4, 5]
    assert [stage.name for stage in stage_table.needed(asked, "corrupt")][-1] == "corrupt"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("corruptions={kinds: [jpg]}",), RecipeError, '"jpg" is not a known corruption'),
        (
            ("corruptions={}", "data={source: digit_volumes, train_limit: 100, test_limit: 30}"),
            DataError,
            "corruptions are of pictures, and these images are 1x8x8x8",
        ),
        (("attack={}", *SLANT), RecipeError, "attack asks for accuracy under attack, and the task of digits is"),
        (("budgets.accuracy_drop=2",), RecipeError, "budgets.accuracy_drop = 2 is no share of the samples"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_training(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        pipeline.run(make_job(tmp_path / "store", *overrides), "corrupt")
