"""Every task goes from the data to the report: trained, exported, quantized, measured, in its own metric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from tiny_job import make_job

from edgekd import pipeline, registry
from edgekd.report.assemble import document_from_run
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document
from edgekd.stages.job import MODEL

UNET = {"teacher": "{network: unet, channels: 6, train: {epochs: 1}}", "student": "{network: unet, channels: 4}"}
SMALL = "train_limit: 120, test_limit: 40"


@dataclass(frozen=True)
class Case:
    """How the tiny job is changed for a task."""

    task: str
    data: str
    method: str
    networks: dict[str, str]
    title: str


CASES = [
    Case("regression", f"{{source: digits, target: slant, {SMALL}}}", "regression", {}, "MAE, °"),
    Case("segmentation", f"{{source: digits, target: mask, {SMALL}, augment: {{crop: 1}}}}", "kd", UNET, "Dice"),
    Case("segmentation", f"{{source: digit_volumes, {SMALL}}}", "growing_assistant", UNET, "Dice"),
    Case(
        "embedding", f"{{source: digits, task: {{embedding: {{dimension: 8}}}}, {SMALL}}}", "embedding", {}, "Recall@1"
    ),
]


def test_every_task_has_a_case():
    assert {case.task for case in CASES} | {"classification"} == set(registry.names("task"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.method}")
def test_a_task_from_the_data_to_the_report(tmp_path, case):
    given = {"data": case.data, **case.networks, "distill.method": case.method, "distill.scratch": "false"}
    given |= {"quantize": "{method: ptq, calibrate: minmax, calibration_images: 60}"}
    job = make_job(tmp_path / "store", *(f"{key}={value}" for key, value in given.items()))
    artifacts = pipeline.run(job, "bench")
    task, test = job.task, job.dataset.test
    assert task.name == case.task
    for stage in ("teacher", "student", "onnx-student", "quantize", "engine-student"):
        result, answers = artifacts[stage].result, np.load(artifacts[stage].file("test_logits.npy"))
        assert answers.shape == (40, *job.dataset.outputs) and answers.dtype == np.float32
        assert result["score"] == pytest.approx(task.score(answers, test.labels))
        assert result["task"] == task.choice and result["metric"]["name"] == task.metric.name
    assert artifacts["onnx-student"].result["parity"]["agreement"] > 0.98
    model = onnx.load(artifacts["onnx-student"].file(MODEL))
    shape = [dimension.dim_value for dimension in model.graph.output[0].type.tensor_type.shape.dim][1:]
    assert tuple(shape) == job.dataset.outputs
    measured = artifacts["bench"].result["accuracy"]
    assert measured["student"]["score"] == pytest.approx(
        artifacts["engine-student"].result["score"], rel=0.02, abs=0.01
    )
    document = document_from_run(job.store.recorded(job.run_id), artifacts)
    assert document.row("device").score == measured["student"]["score"]
    for page in (markdown_from_document(document), html_from_document(document)):
        assert case.title in page and "Top-1" not in page
    names = {row.name for row in document.quantization.classes}
    assert names == (set() if case.task == "regression" else set(job.dataset.class_names))
