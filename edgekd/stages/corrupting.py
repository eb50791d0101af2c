"""The stage that corrupts the test images, and sees what the exported networks make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import registry
from edgekd.data.corruptions import category, corrupted
from edgekd.stages.exporting import reference
from edgekd.stages.job import MODEL, Inputs, Job


def corrupt(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Score all subjects, as they were exported, on the test images as they are and under every corruption."""
    spec = job.recipe.corruptions
    assert spec is not None
    judge, test = job.dataset.judge("test", spec.images), job.dataset.test
    test = replace(test, images=test.images[: len(judge.labels)], labels=judge.labels)
    run = {}
    for name in job.subjects:
        (work / name).mkdir(exist_ok=True)
        run[name] = reference(inputs[f"onnx-{name}"].file(MODEL), work / name, threads=1)
    size = 1 if job.recipe.export.batch == "static" else 100

    def scores(images: Any) -> dict[str, float]:
        parts = [job.dataset.normalize(images[at : at + size]) for at in range(0, len(images), size)]
        return {name: judge.score(np.concatenate([one(part) for part in parts])) for name, one in run.items()}

    kinds = spec.kinds or registry.names("corruption")
    wanted = [(kind, severity) for kind in kinds for severity in spec.severities]
    clean, rows = scores(test.images), []
    for number, (kind, severity) in enumerate(wanted):
        job.on_progress(number / len(wanted), f"{kind}, severity {severity}")
        found = scores(corrupted(test.images, kind, severity))
        rows.append({"kind": kind, "category": category(kind), "severity": severity, **found})
    return {"n": len(judge.labels), "clean": clean, "rows": rows, **job.task.described()}
