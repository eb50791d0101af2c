"""From the answers that the stages stored to the report's parts on single answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.artifact import Artifact
from edgekd.report.answers import ClassScores, Estimates
from edgekd.report.document import MAX_SAMPLES, Confusion
from edgekd.report.part import Absent
from edgekd.tasks import Task
from edgekd.tasks.regression import Regression

Array = npt.NDArray[Any]
Artifacts = Mapping[str, Artifact]


def answers_of(artifact: Artifact) -> Array:
    """What a stage's network answered for the test samples, [N, ...]."""
    name = "student_logits.npy" if artifact.stage == "bench" else "test_logits.npy"
    answers: Array = np.load(artifact.file(name), allow_pickle=False)
    return answers


def labels_of(artifact: Artifact) -> Array:
    """What would have been right, [N, ...]."""
    labels: Array = np.load(artifact.file("test_labels.npy"), allow_pickle=False)
    return labels


def confusion(task: Task, artifacts: Artifacts, no_teacher: Absent | None) -> Confusion | Absent:
    """The student's, and the teacher's where there is one; no_teacher: what stands in its place."""
    if task.name != "classification":
        return Absent(reason=f"The task is {task.name}: the answers to it are told in another way.")
    student = artifacts.get("bench", artifacts.get("student"))
    if student is None:
        return Absent(reason="There is no student yet.")
    classes = artifacts["student"].result["class_names"]
    return Confusion(
        classes=classes,
        student=_counts(student, len(classes)),
        teacher=no_teacher or _counts(artifacts["teacher"], len(classes)),
    )


def of_samples(task: Task, artifacts: Artifacts) -> ClassScores | list[Estimates] | Absent:
    """Of tasks that have no confusion matrix: the score class by class, or the values that were estimated."""
    if task.name == "classification":
        return Absent(reason="See the confusion matrix.")
    if "student" not in artifacts:
        return Absent(reason="There is no student yet.")
    names = tuple(artifacts["student"].result["class_names"])
    answers = {"student": answers_of(artifacts.get("bench", artifacts["student"]))}
    n = len(answers["student"])
    labels = labels_of(artifacts["student"])[:n]
    if "teacher" in artifacts:
        answers["teacher"] = answers_of(artifacts["teacher"])[:n]
    if isinstance(task, Regression):
        every = max(1, n // MAX_SAMPLES)
        values = {name: task.values(own)[::every].T.tolist() for name, own in {"true": labels, **answers}.items()}
        return [
            Estimates(name=name, **{one: columns[at] for one, columns in values.items()})
            for at, name in enumerate(names)
        ]
    by_class = {name: task.by_class(own, labels, names) for name, own in answers.items()}
    if not by_class["student"]:
        return Absent(reason=f"The task is {task.name}, which has no classes.")
    scores = {name: [score for _, score in rows] for name, rows in by_class.items()}
    return ClassScores(names=list(names), n=[n for n, _ in by_class["student"]], **scores)


def _counts(artifact: Artifact, k: int) -> list[list[int]]:
    labels, predictions = labels_of(artifact), answers_of(artifact).argmax(1)
    return np.bincount(labels * k + predictions, minlength=k * k).reshape(k, k).tolist()
