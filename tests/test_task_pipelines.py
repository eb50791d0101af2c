"""Every task goes from the data to the report, by every quantizer and on every backend, in its own metric."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from tiny_job import make_job

from edgekd import pipeline, registry
from edgekd import target as targets
from edgekd.errors import RecipeError
from edgekd.report.assemble import document_from_run
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document
from edgekd.stages.job import MODEL

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = {"teacher": "{network: unet, channels: 6, train: {epochs: 1}}", "student": "{network: unet, channels: 4}"}
# With 8 segments torch's exporter takes half as long again.
LMA = {"student.activation": "{lma: {k: 4}}"}
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
    Case("regression", f"{{source: digits, target: slant, {SMALL}}}", "regression", LMA, "MAE, °"),
    Case("segmentation", f"{{source: digits, target: mask, {SMALL}, augment: {{crop: 1}}}}", "kd", UNET, "Dice"),
    Case("segmentation", f"{{source: digit_volumes, {SMALL}}}", "growing_assistant", UNET, "Dice"),
    Case(
        "embedding", f"{{source: digits, task: {{embedding: {{dimension: 8}}}}, {SMALL}}}", "embedding", LMA, "Recall@1"
    ),
]


def test_every_task_has_a_case():
    assert {case.task for case in CASES} | {"classification"} == set(registry.names("task"))


# Of the engine's answers to those of the graph as it is written, root mean square, in units of the answers'. Where
# codes are rounded once more, as ONNX Runtime wants it, single ones move.
TOLERANCE = {"fp32": 0.01, "fp16": 0.05, "int8": 0.2}
BACKENDS = [name for name in registry.names("backend") if name != "null"]  # null computes nothing
# A backend sees graphs: of one quantizer for each precision, of the one that packs weights, and of the one whose graph
# torch has rounded, it has seen all kinds.
KINDS = ("none", "ptq", "fp16")
OTHER_GRAPHS = {("quantized_distillation", "tvm"), ("qat", "tvm"), ("qat", "openvino")}
PAIRS = [
    (quantizer, backend)
    for quantizer in registry.names("quantizer")
    for backend in BACKENDS
    if quantizer in KINDS or backend == "onnxruntime" or (quantizer, backend) in OTHER_GRAPHS
]
OPTIONS = {"ptq": ", calibrate: minmax", "qat": ", epochs: 1", "quantized_distillation": ", epochs: 1"}


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    """A store for every case, in which the networks are trained once."""
    folder = tmp_path_factory.mktemp("tasks")
    return lambda case: folder / str(CASES.index(case))


def job_of(case, store, quantizer, backend):
    given = {"data": case.data, **case.networks, "distill.method": case.method, "distill.scratch": "false"}
    given["export.form"] = "step_sum"  # every backend computes it: one export serves all
    given["quantize"] = f"{{method: {quantizer}, calibration_images: 60{OPTIONS.get(quantizer, '')}}}"
    job = make_job(store, *(f"{key}={value}" for key, value in given.items()))
    job.target = targets.with_backend(job.target, backend)
    if reason := job.backend.available():
        pytest.skip(f"{backend}: {reason}")
    return job


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.method}")
def test_a_task_from_the_data_to_the_report(store_of, case):
    job = job_of(case, store_of(case), "ptq", "onnxruntime")
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
        assert case.title in page and "Top-1" not in page and "Confusion" not in page
    names = {row.name for row in document.quantization.classes}
    assert names == (set() if case.task == "regression" else set(job.dataset.class_names))


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "backend"), PAIRS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.method}")
def test_a_task_by_a_quantizer_on_a_backend(store_of, case, quantizer, backend):
    job = job_of(case, store_of(case), quantizer, backend)
    precision = job.quantizer().precision
    if precision not in job.backend.precisions:
        with pytest.raises(
            RecipeError, match=f"quantize.method = {quantizer} makes {precision}, which backend {backend}"
        ):
            pipeline.run(job, "engine-student")
        return
    made = pipeline.run(job, "engine-student")
    engine, written = made["engine-student"], made["onnx-student" if quantizer == "none" else "quantize"]
    if job.backend.builds_on == "device":
        assert engine.result["evidence"].startswith(("linted", "compiled_by_"))  # and nothing was rejected
        return
    found, expected = (np.load(one.file("test_logits.npy")) for one in (engine, written))
    assert found.shape == expected.shape
    assert np.sqrt(np.mean((found - expected) ** 2)) <= TOLERANCE[precision] * np.sqrt(np.mean(expected**2))
    assert engine.result["metric"] == written.result["metric"]
