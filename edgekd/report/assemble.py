"""From what a run recorded and stored to the document: a pure function, and the only reader of the stages' results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd import stats
from edgekd.artifact import Artifact
from edgekd.report.document import (
    RUNGS,
    Absent,
    AccuracyChange,
    Activation,
    Budget,
    Confusion,
    Document,
    Epoch,
    LadderRow,
    Latencies,
    Latency,
    Network,
    Rung,
    Speedup,
    StageArtifact,
    Telemetry,
    Training,
    Verdict,
)  # fmt: skip

Logits = npt.NDArray[np.float32]
Artifacts = Mapping[str, Artifact]
NOT_BENCHED = Absent(reason="Not measured yet: edgekd bench.")
# From which artifact each rung takes its accuracy, and where its size is to be seen.
SOURCES: dict[Rung, str] = {
    "teacher": "teacher",
    "scratch": "scratch",
    "student": "student",
    "onnx": "onnx-student",
    "engine": "engine-student",
    "device": "bench",
}


def document_from_run(record: Mapping[str, Any], artifacts: Artifacts) -> Document:
    """The report of a run: `record` is its run.json; `artifacts` by stage, as many as there are yet."""
    bench = artifacts.get("bench")
    ladder = [_row(rung, record, artifacts) for rung in RUNGS]
    return Document(
        run_id=record["run_id"],
        created=record["created"],
        command=record["command"],
        recipe=record["recipe"],
        target=record["target"],
        verdict=_verdict(record, ladder, bench),
        ladder=ladder,
        latency=_latencies(bench),
        training=_training(artifacts),
        confusion=_confusion(artifacts),
        activation=_activation(artifacts),
        quantization=Absent(reason="The student was not quantized."),
        telemetry=_telemetry(bench),
        environment=_environment(artifacts),
        artifacts=[_listed(stage, artifact) for stage, artifact in artifacts.items()],
        notes=_notes(artifacts),
    )


def _row(rung: Rung, record: Mapping[str, Any], artifacts: Artifacts) -> LadderRow:
    if rung == "quantized":
        return LadderRow(rung=rung, reason="the student was not quantized")
    artifact = artifacts.get(SOURCES[rung])
    if artifact is None:
        unwanted = rung == "scratch" and not record["recipe"]["distill"]["scratch"]
        return LadderRow(rung=rung, reason="switched off in the recipe" if unwanted else "not made yet")
    if rung == "device":
        found, size = artifact.result["accuracy"]["student"], artifacts["engine-student"].result["size_bytes"]
    else:
        found, size = artifact.result, artifact.result["size_bytes"]
    if "top1" not in found:
        return LadderRow(rung=rung, reason="built on the device; see the row below", size_bytes=size)
    network = artifacts.get("scratch" if rung == "scratch" else "teacher" if rung == "teacher" else "student")
    right = round(found["top1"] * found["n"])
    return LadderRow(
        rung=rung,
        top1=found["top1"],
        n=found["n"],
        ci95=stats.wilson(right, found["n"]),
        agreement_with_teacher=_agreement(artifact, artifacts.get("teacher")),
        size_bytes=size,
        params=network.result["params"] if network else None,
        macs=network.result["macs"] if network else None,
    )


def _predictions(artifact: Artifact) -> npt.NDArray[np.int64]:
    name = "student_logits.npy" if artifact.stage == "bench" else "test_logits.npy"
    logits: Logits = np.load(artifact.file(name), allow_pickle=False)
    return np.asarray(logits.argmax(1))


def _agreement(artifact: Artifact, teacher: Artifact | None) -> float | None:
    if teacher is None:
        return None
    own, teachers = _predictions(artifact), _predictions(teacher)
    return float((own == teachers[: len(own)]).mean())


def _verdict(record: Mapping[str, Any], ladder: list[LadderRow], bench: Artifact | None) -> Verdict:
    if bench is None:
        budgets = _budgets(record["recipe"]["budgets"], ladder, None)
        return Verdict(status="INVALID", reasons=["not measured on a device yet: edgekd bench"], budgets=budgets,
                       speedup=NOT_BENCHED, accuracy_change=NOT_BENCHED)  # fmt: skip
    found = bench.result
    return Verdict(
        status=found["status"],
        reasons=found["reasons"],
        budgets=_budgets(record["recipe"]["budgets"], ladder, found),
        speedup=Speedup(**found["speedup"]),
        accuracy_change=AccuracyChange(**found["accuracy_change"]),
    )


def _budgets(
    limits: Mapping[str, float | None], ladder: list[LadderRow], found: Mapping[str, Any] | None
) -> list[Budget]:
    """Each limit that the recipe sets, against the value measured on the device, or the best one known so far."""
    row = {row.rung: row for row in ladder}
    sizes = [row[rung].size_bytes for rung in ("device", "engine", "onnx", "student") if row[rung].size_bytes]
    values: dict[str, float | None] = {
        "accuracy_drop": -found["accuracy_change"]["value"] if found else None,
        "p99_ms": found["latency"]["student"]["p99_ms"] if found else None,
        "size_bytes": sizes[0] if sizes else None,
        "speedup": found["speedup"]["value"] if found else None,
    }
    budgets = []
    for name, limit in limits.items():
        if limit is not None:
            value = values[name]
            met = value is not None and (value >= limit if name == "speedup" else value <= limit)
            bound: Any = "at least" if name == "speedup" else "at most"
            budgets.append(Budget(name=name, limit=limit, value=value, met=met, bound=bound))
    return budgets


def _latencies(bench: Artifact | None) -> Latencies:
    if bench is None:
        return Latencies(student=NOT_BENCHED, teacher=NOT_BENCHED)
    return Latencies(**{name: _latency(bench, name) for name in ("student", "teacher")})


def _latency(bench: Artifact, name: str) -> Latency:
    """From a samples file, whose rows are launch, block, start_ns, duration_ns; time starts with the first of both."""
    found = bench.result["latency"]
    tables = {model: np.load(bench.file(found[model]["samples_file"]), allow_pickle=False) for model in found}
    first_ns = min(table[0, 2] for table in tables.values())
    return Latency(
        **found[name],
        samples_ms=(tables[name][:, 3] / 1e6).tolist(),
        samples_time_s=((tables[name][:, 2] - first_ns) / 1e9).tolist(),
    )


def _training(artifacts: Artifacts) -> dict[Network, Training | Absent]:
    curves: dict[Network, Training | Absent] = {}
    for name in ("teacher", "scratch", "student"):
        artifact = artifacts.get(name)
        if artifact is None:
            curves[name] = Absent(reason="Not trained in this run.")
        elif "epochs" not in artifact.result:
            curves[name] = Absent(reason="Loaded from a checkpoint.")
        else:
            known = Epoch.model_fields
            epochs = [Epoch(**{k: v for k, v in epoch.items() if k in known}) for epoch in artifact.result["epochs"]]
            curves[name] = Training(epochs=epochs)
    return curves


def _confusion(artifacts: Artifacts) -> Confusion | Absent:
    student = artifacts.get("bench", artifacts.get("student"))
    if student is None:
        return Absent(reason="There is no student yet.")
    classes = artifacts["student"].result["class_names"]
    teacher = artifacts.get("teacher")
    return Confusion(
        classes=classes,
        student=_counts(_predictions(student), student, len(classes)),
        teacher=_counts(_predictions(teacher), teacher, len(classes))
        if teacher
        else Absent(reason="There is no teacher."),
    )


def _counts(predictions: npt.NDArray[np.int64], artifact: Artifact, k: int) -> list[list[int]]:
    labels = np.load(artifact.file("test_labels.npy"), allow_pickle=False)
    return np.bincount(labels * k + predictions, minlength=k * k).reshape(k, k).tolist()


def _activation(artifacts: Artifacts) -> list[Activation] | Absent:
    if "student" not in artifacts:
        return Absent(reason="There is no student yet.")
    layers = json.loads(artifacts["student"].file("activations.json").read_text(encoding="utf-8"))
    if not layers:
        return Absent(reason="The student's activation has no learned segments.")
    return [Activation(**_with_histogram(layer)) for layer in layers]


def _with_histogram(layer: dict[str, Any]) -> dict[str, Any]:
    inputs = {key: value for key, value in layer["inputs"].items() if key != "name"}
    return {key: value for key, value in layer.items() if key != "inputs"} | {"histogram": inputs}


def _telemetry(bench: Artifact | None) -> Telemetry | Absent:
    if bench is None:
        return NOT_BENCHED
    return Telemetry(**bench.result["telemetry"])


def _environment(artifacts: Artifacts) -> dict[str, Any]:
    newest = list(artifacts.values())[-1].manifest if artifacts else {}
    bench = artifacts.get("bench")
    measured = {"device": bench.result["device"], "engines": bench.result["engines"]} if bench else {}
    return {**measured, "host": newest.get("host", {}), "versions": newest.get("versions", {})}


def _listed(stage: str, artifact: Artifact) -> StageArtifact:
    files = artifact.manifest["files"]
    size = sum(file["size_bytes"] for file in files)
    return StageArtifact(
        stage=stage, key=artifact.key, sha256=artifact.digest, size_bytes=size, files=[f["path"] for f in files]
    )


def _notes(artifacts: Artifacts) -> list[str]:
    notes: list[str] = []
    for artifact in artifacts.values():
        notes += [note for note in artifact.result.get("notes", []) if note not in notes]
    return notes
