"""From what a run recorded and stored to the document: a pure function, and the only reader of the stages' results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd import registry, stats, tasks
from edgekd.artifact import Artifact
from edgekd.bench.latencies import DURATION, START, of_batch
from edgekd.report import answered, evidence
from edgekd.report.answered import answers_of, labels_of
from edgekd.report.document import (
    NETWORKS,
    RUNGS,
    Activation,
    Attack,
    Budget,
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
from edgekd.report.networks import Angles, Spread, SpreadRun
from edgekd.report.part import Absent, AccuracyChange, Metric
from edgekd.report.quantization import Quantization
from edgekd.report.robustness import Robustness
from edgekd.tasks import ROUNDING, Task

Array = npt.NDArray[Any]
Artifacts = Mapping[str, Artifact]
NOT_BENCHED = Absent(reason="Not measured yet: edgekd bench.")
NO_TEACHER = Absent(reason="The recipe names no teacher.")
UNSCORED = Absent(reason="There are no test images: the recipe's data are none, and name no test.")
NOT_ASKED_FOR = "The recipe asks for no quantization."
# From which artifact each rung takes its accuracy, and where its size is to be seen.
SOURCES: dict[Rung, str] = {
    "teacher": "teacher",
    "scratch": "scratch",
    "student": "student",
    "onnx": "onnx-student",
    "quantized": "quantize",
    "engine": "engine-student",
    "device": "bench",
}


def document_from_run(record: Mapping[str, Any], artifacts: Artifacts) -> Document:
    """The report of a run: `record` is its run.json; `artifacts` by stage, as many as there are yet."""
    bench = artifacts.get("bench")
    task = _task(artifacts)
    ladder = [_row(task, rung, record, artifacts) for rung in RUNGS]
    return Document(
        run_id=record["run_id"],
        created=record["created"],
        command=record["command"],
        recipe=record["recipe"],
        target=record["target"],
        metric=Metric.model_validate(asdict(task.metric)),
        agree=task.agree,
        verdict=_verdict(task, record, ladder, artifacts),
        ladder=ladder,
        attack=_attack(record, artifacts, ladder),
        angles=_angles(record, artifacts),
        spread=_spread(artifacts),
        spread_run=_spread_run(artifacts),
        robustness=_robustness(record, artifacts),
        latency=_latencies(record, bench),
        mode=bench.result["mode"] if bench else NOT_BENCHED,
        end_to_end=bench.result["end_to_end"] if bench else None,
        loadgen=bench.result.get("loadgen") if bench else None,
        training=_training(record, artifacts),
        confusion=answered.confusion(task, artifacts, _no_teacher(record)) if _scored(record) else UNSCORED,
        answers=answered.of_samples(task, artifacts) if _scored(record) else UNSCORED,
        activation=_activation(artifacts),
        quantization=_quantization(task, record, artifacts),
        engines=evidence.engines(artifacts),
        evidence=[one for one in evidence.claims(artifacts) if one.subject != "accuracy" or _scored(record)],
        telemetry=_telemetry(bench),
        environment=_environment(artifacts),
        artifacts=[_listed(stage, artifact) for stage, artifact in artifacts.items()],
        notes=_notes(artifacts),
    )


def _row(task: Task, rung: Rung, record: Mapping[str, Any], artifacts: Artifacts) -> LadderRow:
    artifact = artifacts.get(SOURCES[rung])
    if artifact is None:
        return LadderRow(rung=rung, reason=_why_not(rung, record["recipe"]))
    result = artifact.result
    if rung == "device":
        found, size = result["accuracy"]["student"], evidence.engine_size(artifacts)
    elif rung == "quantized":
        found, size = result, result["size"]["bytes"]
    else:
        found, size = result, evidence.engine_size(artifacts) if rung == "engine" else result.get("size_bytes")
    if not _scored(record):
        return LadderRow(rung=rung, reason="no test images", size_bytes=size)
    if "score" not in found:
        return LadderRow(rung=rung, reason="runs on the device alone; see the row below", size_bytes=size)
    network = artifacts.get("scratch" if rung == "scratch" else "teacher" if rung == "teacher" else "student")
    return LadderRow(
        rung=rung,
        score=found["score"],
        n=found["n"],
        ci95=found["ci95"],
        also=_also(task, artifact, artifacts.get("student", artifact)),
        agreement_with_teacher=_agreement(task, artifact, artifacts.get("teacher")),
        size_bytes=size,
        params=network.result["params"] if network else None,
        macs=network.result["macs"] if network else None,
    )


def _why_not(rung: Rung, recipe: Mapping[str, Any]) -> str:
    if rung == "teacher" and recipe["teacher"] is None:
        return "the recipe names none"
    if rung == "scratch" and recipe["data"]["source"] == "none":
        return "no images to train on"
    if rung == "scratch" and not recipe["distill"]["scratch"]:
        return "switched off in the recipe"
    return NOT_ASKED_FOR if rung == "quantized" and not _quantizes(recipe) else "not made yet"


def _scored(record: Mapping[str, Any]) -> bool:
    """Whether the run has labelled test images."""
    data = record["recipe"]["data"]
    return data["source"] != "none" or data["test"] is not None


def _no_teacher(record: Mapping[str, Any]) -> Absent | None:
    """What stands in the place of every comparison with the teacher where the recipe names none."""
    return NO_TEACHER if record["recipe"]["teacher"] is None else None


def _quantizes(recipe: Mapping[str, Any]) -> bool:
    # Recipes of runs from before there was quantization have no such section.
    return bool(recipe.get("quantize", {"method": "none"})["method"] != "none")


def _task(artifacts: Artifacts) -> Task:
    """What the networks of a run were asked for; classification where there is none yet."""
    choices = [one.result["task"] for one in artifacts.values() if "task" in one.result]
    choice: dict[str, dict[str, Any]] = choices[0] if choices else {"classification": {}}
    ((name, options),) = choice.items()
    task: Task = registry.create("task", name, options=options)
    return task


def _agreement(task: Task, artifact: Artifact, teacher: Artifact | None) -> float | None:
    if teacher is None:
        return None
    own = answers_of(artifact)
    return task.agreement(own, answers_of(teacher)[: len(own)])


def _also(task: Task, artifact: Artifact, labelled: Artifact) -> dict[str, float]:
    answers = answers_of(artifact)
    return task.also(answers, labels_of(labelled)[: len(answers)])


def _change(task: Task, labels: Array, first: Artifact, second: Artifact) -> AccuracyChange:
    """From one model's answers to those of another, on the same samples."""
    before, after = (task.quality(answers_of(artifact), labels) for artifact in (first, second))
    return AccuracyChange.model_validate(tasks.change(before, after))


def _verdict(task: Task, record: Mapping[str, Any], ladder: list[LadderRow], artifacts: Artifacts) -> Verdict:
    limits = record["recipe"]["budgets"]
    if "bench" not in artifacts:
        change = _change_so_far(task, record, ladder, artifacts) if _scored(record) else UNSCORED
        return Verdict(
            status="NOT_MEASURED",
            reasons=["nothing was measured on a device: edgekd bench"],
            budgets=_budgets(task, limits, ladder, change, None),
            speedup=_no_teacher(record) or NOT_BENCHED,
            accuracy_change=change,
        )
    found, alone = artifacts["bench"].result, _no_teacher(record)
    change = alone or (AccuracyChange(**found["accuracy_change"]) if _scored(record) else UNSCORED)
    return Verdict(
        status=found["status"],
        reasons=found["reasons"],
        budgets=_budgets(task, limits, ladder, change, found),
        speedup=alone or Speedup(**found["speedup"], by_launch=found["speedup_by_launch"]),
        accuracy_change=change,
    )


def _change_so_far(
    task: Task, record: Mapping[str, Any], ladder: list[LadderRow], artifacts: Artifacts
) -> AccuracyChange | Absent:
    """Of the last model on the way to the device that was measured here."""
    if (alone := _no_teacher(record)) is not None:
        return alone
    last = [row.rung for row in ladder if row.score is not None][-1:]
    if "teacher" not in artifacts or not last or last[0] in ("teacher", "scratch"):
        return Absent(reason="There are no teacher and student yet to compare.")
    teacher = artifacts["teacher"]
    return _change(task, labels_of(teacher), teacher, artifacts[SOURCES[last[0]]])


def _budgets(
    task: Task,
    limits: Mapping[str, float | None],
    ladder: list[LadderRow],
    change: AccuracyChange | Absent,
    found: Mapping[str, Any] | None,
) -> list[Budget]:
    """Each limit that the recipe sets, against the value measured on the device, or the last one known so far."""
    sizes = [row.size_bytes for row in ladder if row.rung not in ("teacher", "scratch") and row.size_bytes]
    values: dict[str, float | None] = {
        "accuracy_drop": None if isinstance(change, Absent) else -task.metric.goodness(change.value),
        "p99_ms": found["latency"]["student"]["p99_ms"] if found else None,
        "size_bytes": sizes[-1] if sizes else None,
        "speedup": found["speedup"]["value"] if found and found["speedup"] else None,
    }
    budgets = []
    for name, limit in limits.items():
        if limit is not None:
            value = values[name]
            rounding = ROUNDING if name == "accuracy_drop" else 0.0
            met = None if value is None else value >= limit if name == "speedup" else value <= limit + rounding
            bound: Any = "at least" if name == "speedup" else "at most"
            budgets.append(Budget(name=name, limit=limit, value=value, met=met, bound=bound))
    return budgets


def _robustness(record: Mapping[str, Any], artifacts: Artifacts) -> Robustness | Absent:
    if record["recipe"].get("corruptions") is None:
        return Absent(reason="Not asked for: edgekd eval --corruptions.")
    if "corrupt" not in artifacts:
        return Absent(reason="Not measured yet: edgekd eval.")
    result = artifacts["corrupt"].result
    return Robustness.model_validate({name: result[name] for name in Robustness.model_fields})


def _attack(record: Mapping[str, Any], artifacts: Artifacts, ladder: list[LadderRow]) -> Attack | Absent:
    if record["recipe"]["attack"] is None:
        return Absent(reason="The recipe asks for no attack.")
    if "attack" not in artifacts:
        return Absent(reason="Not attacked yet: edgekd distill.")
    result, clean = artifacts["attack"].result, {str(row.rung): row.score for row in ladder}
    found = result["networks"]
    networks = [
        {"network": name, "top1": clean[name], **found[name]}
        | {"robust_ci95": stats.wilson(round(found[name]["robust_top1"] * found[name]["n"]), found[name]["n"])}
        for name in NETWORKS
        if name in found
    ]
    return Attack.model_validate({**result, "networks": networks})


def _angles(record: Mapping[str, Any], artifacts: Artifacts) -> list[Angles] | Absent:
    """Of every network, where the method looks at them."""
    distill = record["recipe"]["distill"]
    methods = [distill["method"], *(name for one in distill.get("methods", []) for name in one)]
    if "angular" not in methods:
        return Absent(reason="The recipe's method does not look at angles.")
    found = []
    for network in ("teacher", "scratch", "student"):
        result = artifacts[network].result if network in artifacts else {}
        if angles := result.get("class_angles"):
            closest = [result["class_names"][number] for number in angles["closest"]]
            found.append(Angles(network=network, **angles | {"closest": tuple(closest)}))
    return found or Absent(reason="No network has a linear classifier.")


def _spread(artifacts: Artifacts) -> Spread | Absent:
    if "parts" not in artifacts:
        return Absent(reason="The student is not spread over several boards.")
    result = artifacts["parts"].result
    return Spread.model_validate({name: result[name] for name in Spread.model_fields})


def _spread_run(artifacts: Artifacts) -> SpreadRun | Absent:
    if "boards" not in artifacts:
        return Absent(reason="Not run on several boards: edgekd bench --device FIRST --device SECOND ...")
    return SpreadRun.model_validate(artifacts["boards"].result)


def _quantization(task: Task, record: Mapping[str, Any], artifacts: Artifacts) -> Quantization | Absent:
    if not _quantizes(record["recipe"]):
        return Absent(reason=NOT_ASKED_FOR)
    if "quantize" not in artifacts:
        return Absent(reason="Not quantized yet: edgekd quantize.")
    artifact = artifacts["quantize"]
    result, labels = artifact.result, labels_of(artifact)
    found = result["accuracy"]
    accuracy = found | {
        "float_ci95": artifacts["onnx-student"].result["ci95"],
        "ci95": result["ci95"],
        "change": _change(task, labels, artifacts["onnx-student"], artifact),
    }
    fields = {name: result[name] for name in Quantization.model_fields}
    return Quantization.model_validate(fields | {"accuracy": accuracy})


def _latencies(record: Mapping[str, Any], bench: Artifact | None) -> Latencies:
    alone = _no_teacher(record)
    if bench is None:
        return Latencies(student=NOT_BENCHED, teacher=alone or NOT_BENCHED)
    return Latencies(student=_latency(bench, "student"), teacher=alone or _latency(bench, "teacher"))


def _latency(bench: Artifact, name: str) -> Latency:
    """From a samples file, see edgekd.bench.latencies; time starts with the first of all models."""
    found = bench.result["latency"]
    tables = {
        model: of_batch(np.load(bench.file(one["samples_file"]), allow_pickle=False), one["samples_per_query"])
        for model, one in found.items()
    }
    first_ns = min(table[0, START] for table in tables.values())
    return Latency(
        **found[name],
        energy=bench.result.get("energy", {}).get(name, []),
        samples_ms=(tables[name][:, DURATION] / 1e6).tolist(),
        samples_time_s=((tables[name][:, START] - first_ns) / 1e9).tolist(),
    )


def _training(record: Mapping[str, Any], artifacts: Artifacts) -> dict[Network, Training | Absent]:
    curves: dict[Network, Training | Absent] = {}
    for name in NETWORKS:
        artifact = artifacts.get(name)
        if artifact is None and name == "finetune":
            continue  # most recipes have none
        if artifact is None:
            alone = _no_teacher(record) if name == "teacher" else None
            curves[name] = alone or Absent(reason="Not trained in this run.")
        elif "epochs" not in artifact.result:
            curves[name] = Absent(reason="Loaded from a checkpoint.")
        else:
            known = Epoch.model_fields
            epochs = [Epoch(**{k: v for k, v in epoch.items() if k in known}) for epoch in artifact.result["epochs"]]
            curves[name] = Training(epochs=epochs)
    return curves


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
    for stage, artifact in artifacts.items():
        if target := artifact.result.get("target"):
            notes.append(
                f"On the target domain, {target['name']}: {stage} {target['text']}, {target['n']} test images."
            )
    if cuts := (artifacts["bench"].result.get("interruptions", 0) if "bench" in artifacts else 0):
        notes.append(
            f"The benchmark was interrupted {cuts} time{'s' * (cuts > 1)}, and went on behind its last launch."
        )
    return notes
