"""What the stages make: real ones, on the cheapest job."""

from __future__ import annotations

import hashlib
import json
import logging
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_job import make_job

from edgekd import networks, pipeline, stages
from edgekd.artifact import LOG, Artifact
from edgekd.data import Shape
from edgekd.errors import CheckpointError, ExportError, StageError
from edgekd.stages import exporting


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, Artifact]:
    """Of every stage up to the export."""
    return pipeline.run(make_job(tmp_path_factory.mktemp("stages") / "store"), "onnx-student")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """own_module(name, source): a module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    return write


@pytest.mark.parametrize("stage", ["teacher", "scratch", "student"])
def test_a_trained_networks_result(stage, artifacts):
    artifact, result = artifacts[stage], artifacts[stage].result
    network = networks.build(
        "resnet", {"depth": 8, "width": 0.25}, Shape(1, 8, 8), 10,
        ("relu" if stage == "teacher" else "lma", {}), 0,
    )  # fmt: skip
    networks.load_weights(network, artifact.file(stages.WEIGHTS))
    logits, labels = np.load(artifact.file(stages.LOGITS)), np.load(artifact.file(stages.LABELS))
    assert logits.shape == (50, 10) and logits.dtype == np.float32
    assert result["score"] == (logits.argmax(1) == labels).mean() and result["n"] == 50
    assert result["params"] == networks.count_params(network)
    assert result["macs"] == networks.count_macs(network, Shape(1, 8, 8))
    assert result["size_bytes"] == artifact.file(stages.WEIGHTS).stat().st_size
    assert result["class_names"] == [str(number) for number in range(10)]
    assert artifact.manifest["spec"]["seed"] == 0
    assert result["kept_epoch"] == 1 and [epoch["epoch"] for epoch in result["epochs"]] == [1]
    assert [path.name for path in artifact.file(LOG).iterdir()] == ["metrics.jsonl"]
    curves = json.loads(artifact.file(stages.CURVES).read_text())
    assert len(curves) == (0 if stage == "teacher" else 7)
    assert all(sum(curve["inputs"]["counts"]) > 0 and curve["cuts"] for curve in curves)
    _, facts = networks.read_weights(artifact.file(stages.WEIGHTS))
    assert (facts["network"], facts["outputs"], facts["shape"]) == ("resnet", [10], [1, 8, 8])


@pytest.mark.parametrize("subject", ["teacher", "student"])
def test_an_exported_networks_result(subject, artifacts):
    artifact, result = artifacts[f"onnx-{subject}"], artifacts[f"onnx-{subject}"].result
    assert result["parity"]["samples"] == result["n"] == 50
    assert result["parity"]["agreement"] == 1.0
    assert result["parity"]["max_relative_error"] <= result["parity"]["tolerance"] == 1e-3
    assert result["parity"]["unexplained"] == 0
    torch_logits, logits = (np.load(artifacts[stage].file(stages.LOGITS)) for stage in (subject, f"onnx-{subject}"))
    assert result["parity"]["max_abs_error"] == pytest.approx(np.abs(logits - torch_logits).max(), rel=1e-6)
    assert result["score"] == artifacts[subject].result["score"]
    assert "BatchNormalization" not in result["operators"]
    metadata = {prop.key: prop.value for prop in onnx.load(artifact.file(stages.MODEL)).metadata_props}
    assert json.loads(metadata["class_names"]) == [str(number) for number in range(10)]
    assert json.loads(metadata["input_size"]) == [1, 8, 8]
    assert metadata["input_layout"] == "NCHW"
    assert metadata["preprocessing"] == "(pixel / 255 - mean) / std"
    assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == 1
    assert metadata["Image.BitmapPixelFormat"] == "Gray8"
    spec = json.dumps(artifacts[subject].manifest["spec"], sort_keys=True)
    assert metadata["edgekd.recipe_sha256"] == hashlib.sha256(spec.encode()).hexdigest()


def test_the_onnx_file_alone_is_enough_to_classify(artifacts, tmp_path):
    """With onnxruntime and what the file says of itself, from pixels to a class name."""
    import onnxruntime

    dataset = make_job(tmp_path).dataset
    model = artifacts["onnx-student"].file(stages.MODEL)
    session = onnxruntime.InferenceSession(str(model))
    metadata = session.get_modelmeta().custom_metadata_map
    mean, std = (np.float32(json.loads(metadata[key])).reshape(-1, 1, 1) for key in ("mean", "std"))
    x = (dataset.test.images.astype(np.float32) / 255 - mean) / std
    (logits,) = session.run(None, {"images": x})
    names = np.array(json.loads(metadata["class_names"]))[logits.argmax(1)]
    expected = np.load(artifacts["student"].file(stages.LOGITS)).argmax(1)
    assert names.tolist() == [dataset.class_names[label] for label in expected]


# --- a teacher from a checkpoint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_teacher_from_a_checkpoint(kind, artifacts, tmp_path):
    trained = artifacts["teacher"].file(stages.WEIGHTS)
    file = tmp_path / f"teacher.{kind}"
    if kind == "pt":
        torch.save({"state_dict": networks.read_weights(trained)[0], "epoch": 3}, file)
    else:
        file.write_bytes(trained.read_bytes())
    job = make_job(tmp_path / "store", f"teacher.checkpoint={file}", "distill.scratch=false")
    made = pipeline.run(job, "student")
    np.testing.assert_array_equal(
        np.load(made["teacher"].file(stages.LOGITS)), np.load(artifacts["teacher"].file(stages.LOGITS))
    )
    assert "epochs" not in made["teacher"].result
    assert made["teacher"].result["score"] == artifacts["teacher"].result["score"]
    # The same teacher makes the same student, wherever it comes from.
    assert made["student"].digest == artifacts["student"].digest


def test_a_checkpoint_of_another_network(artifacts, tmp_path):
    file = artifacts["teacher"].file(stages.WEIGHTS)
    job = make_job(tmp_path / "store", f"teacher.checkpoint={file}", "teacher.depth=14")
    with pytest.raises(CheckpointError, match="does not fit the network in"):
        pipeline.run(job, "teacher")
    assert not list((tmp_path / "store" / "store").glob("*/*"))


# --- notes --------------------------------------------------------------------------------------------------------


HALF_TRACEABLE = """
    import torch
    from torch import nn

    class Half(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.act = nn.ReLU()
            self.fc = nn.Linear(64, num_classes)

        def forward(self, x):
            if x.sum() > 1e9:
                x = x * 2
            return self.fc(self.act(torch.relu(x.flatten(1))))
"""


def test_what_an_activation_swap_had_to_leave_is_told_once_and_kept(own_module, tmp_path, caplog):
    own_module("halfway", HALF_TRACEABLE)
    job = make_job(
        tmp_path / "store", "student.network=halfway:Half", "student.activation=lma", "distill.method=scratch"
    )
    logger = logging.getLogger("edgekd.networks")
    before = logger.level, logger.propagate, list(logger.handlers)
    for _ in range(2):
        job.build("student")
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith("student: network halfway:Half keeps its own activation relu()")
    made = pipeline.run(job, "scratch")
    assert told.removeprefix("student: ") in made["scratch"].result["notes"]
    assert not any("keeps its own" in note for note in made["teacher"].result["notes"])


def test_notes_are_kept_when_warnings_are_not_shown(own_module, tmp_path):
    own_module("halfway", HALF_TRACEABLE)
    job = make_job(tmp_path / "store", "student.network=halfway:Half", "student.activation=lma")
    logger = logging.getLogger("edgekd")
    logger.setLevel(logging.ERROR)
    try:
        job.build("student")
    finally:
        logger.setLevel(logging.NOTSET)
    assert len(job.notes["student"]) == 1


# --- what fails ---------------------------------------------------------------------------------------------------


def damaged(artifact: Artifact, folder: Path, change) -> Artifact:
    """The artifact as it would be had training measured something else."""
    folder.mkdir()
    for file in artifact.folder.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    logits = np.load(folder / stages.LOGITS)
    change(logits)
    np.save(folder / stages.LOGITS, logits)
    return replace(artifact, folder=folder)


def test_a_graph_that_differs_from_torch_is_not_stored(artifacts, tmp_path):
    def change(logits: np.ndarray) -> None:
        logits[31, 4] += 0.5

    inputs = {"student": damaged(artifacts["student"], tmp_path / "student", change)}
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    with pytest.raises(ExportError, match=r"student.onnx differs from torch by 0.5 at test sample 31 \(agreement"):
        stages.onnx("student", make_job(tmp_path / "store"), inputs, tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out" / stages.LOGITS).exists()


def test_a_graph_that_onnx_runtime_cannot_run(artifacts, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()

    def run(images):
        raise RuntimeError("Non-zero status code returned while running Reshape node.\nand more")

    monkeypatch.setattr(exporting, "reference", lambda model, work, threads: run)
    with pytest.raises(ExportError) as caught:
        stages.onnx("student", make_job(tmp_path / "store"), artifacts, tmp_path / "out", tmp_path / "work")
    assert str(caught.value) == (
        "error: ONNX Runtime cannot run student.onnx: Non-zero status code returned while running Reshape node.\n"
        "       it was exported for a dynamic batch, opset 20\n"
        "fix:   set export.batch = static, or try another export.opset"
    )


@pytest.mark.parametrize(
    "overrides", [("data.train_limit=20", "distill.train.batch_size=1"), ("teacher.train.batch_size=1",)]
)
def test_a_batch_of_one_is_refused_before_training(overrides, tmp_path):
    job = make_job(tmp_path / "store", *overrides)
    with pytest.raises(StageError, match="batch normalisation, which learns nothing from a batch of one sample"):
        pipeline.run(job, "student")


# --- distill.cache_teacher ----------------------------------------------------------------------------------------


def test_cached_teacher_logits_are_shared_by_students(tmp_path, monkeypatch):
    overrides = ("distill.cache_teacher=true", "data.augment.crop=1", "distill.scratch=false")
    job = make_job(tmp_path / "store", *overrides)
    first = pipeline.run(job, "student")["student"]
    (folder,) = (tmp_path / "store" / "cache" / "teacher-logits").iterdir()
    times = [file.stat().st_mtime_ns for file in folder.iterdir()]
    second = pipeline.run(make_job(tmp_path / "store", *overrides, "student.width=0.5"), "student")["student"]
    assert second.digest != first.digest
    assert [file.stat().st_mtime_ns for file in folder.iterdir()] == times
    pipeline.run(make_job(tmp_path / "store", *overrides, "data.augment.seed=1"), "student")
    pipeline.run(make_job(tmp_path / "store", *overrides, "distill.train.precision=bf16"), "student")
    assert len(list(folder.parent.iterdir())) == 3  # other images, other rounding: other logits


def test_layers_are_counted_on_as_many_images_as_memory_allows(artifacts):
    curves = json.loads(artifacts["student"].file(stages.CURVES).read_text())
    row = curves[0]["inputs"]
    # 20 validation images through the first layer, of 4 channels at 8x8.
    assert sum(row["counts"]) + row["below"] + row["above"] == 20 * 4 * 64
