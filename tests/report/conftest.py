"""The fixture document, whole, in brief and as the report takes it."""

from __future__ import annotations

import pytest
from report_parts import a_report, a_training

from edgekd.report import Document


@pytest.fixture
def report() -> dict:
    return a_report()


@pytest.fixture
def brief() -> dict:
    """A report that has every part but is quick to draw."""
    report = a_report()
    for model in report["latency"].values():
        model |= {"samples_ms": [], "samples_time_s": []}
    report["training"] = {name: a_training(2, 0.9, 0) for name in report["training"]}
    report["confusion"] = {"classes": ["cat", "dog"], "student": [[8, 2], [1, 9]], "teacher": [[9, 1], [0, 10]]}
    report["activation"] = report["activation"][:1]
    report["telemetry"] = {"time_s": [0.0, 1.0], "series": {"cpu_hz": [2.4e9, None]}}
    return report


@pytest.fixture(scope="session")
def document() -> Document:
    return Document.model_validate(a_report())
