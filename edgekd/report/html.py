"""The report as one HTML file: no JavaScript, nothing fetched, everything from the run escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgekd.report import (
    answer_figures,
    boards,
    engine_tables,
    figures,
    measuring_figures,
    measuring_tables,
    network_tables,
    quantization_figures,
    quantization_tables,
    robustness_tables,
    tables,
)
from edgekd.report.document import Activation, Document, Latency
from edgekd.report.formatting import flat
from edgekd.report.part import Absent

NO_CURVE = Absent(reason="No layer of the student has a learned activation.")


def html_from_document(document: Document) -> str:
    """The whole page."""
    return _rendered("report.html.jinja", _context(document))


def html_from_boards(document: boards.BoardsDocument) -> str:
    """The page of several boards."""
    context = {
        "document": document,
        "headline": boards.headline(document),
        "reasons": boards.reasons(document),
        "boards": boards.table(document),
        "recipe": flat(document.recipe),
    }
    return _rendered("boards.html.jinja", context)


def _rendered(template: str, context: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("edgekd.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context) + "\n"


def _context(document: Document) -> dict[str, Any]:
    """Everything that the template shows; an `Absent` stands where the run found nothing."""
    return {
        "document": document,
        "headline": tables.headline(document),
        "findings": tables.findings(document),
        "budgets": tables.budgets(document),
        "ladder": tables.ladder(document),
        "ladder_reading": tables.ladder_reading(document),
        "ladder_figure": figures.ladder(document),
        "attack": tables.attack(document),
        "network_sections": network_tables.sections(document),
        "robustness": robustness_tables.tables(document.robustness, document.metric),
        "latency": tables.latency(document),
        "latency_figures": _latency_figures(document),
        "measuring": measuring_tables.passages(document),
        "measuring_figures": measuring_figures.of_measuring(document),
        "launches": tables.launches(document),
        "launches_figure": figures.launches(document),
        "telemetry": document.telemetry if isinstance(document.telemetry, Absent) else figures.telemetry(document),
        "training": tables.training(document),
        "training_figures": figures.training(document),
        "confusion": _absent_or(document.confusion, figures.confusion),
        "answers": _answers(document),
        "changed_classes": _absent_or(document.confusion, tables.changed_classes),
        "activations": _activation_figures(document.activation),
        "quantization": _absent_or(document.quantization, quantization_tables.passages),
        "quantization_figures": _absent_or(document.quantization, quantization_figures.of_quantization),
        "engines": engine_tables.passages(document),
        "budgets_met": _all_met(document),
        "environment_groups": _groups(document.environment),
        "target": flat(document.target),
        "recipe": flat(document.recipe),
        "artifacts": tables.artifacts(document),
        "is_absent": lambda part: isinstance(part, Absent),
    }


def _answers(document: Document) -> list[figures.Drawn]:
    if isinstance(document.answers, Absent):
        return []
    return answer_figures.of_answers(document.answers, document.metric)


def _latency_figures(document: Document) -> list[figures.Drawn]:
    models = {"student": document.latency.student, "teacher": document.latency.teacher}
    timed = {name: model for name, model in models.items() if isinstance(model, Latency) and model.samples_ms}
    return [figures.latency_distribution(timed), figures.latency_over_time(timed)] if timed else []


def _all_met(document: Document) -> bool | None:
    """None where there is no budget, or where one that may still be missed was not measured."""
    met = [budget.met for budget in document.verdict.budgets]
    return None if not met or (None in met and False not in met) else all(met)


def _activation_figures(layers: list[Activation] | Absent) -> list[figures.Drawn] | Absent:
    if isinstance(layers, Absent):
        return layers
    return [figures.activation(layer, index) for index, layer in enumerate(layers)] or NO_CURVE


def _absent_or(part: Any, show: Any) -> Any:
    return part if isinstance(part, Absent) else show(part)


def _groups(environment: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts by their first name; facts without a group come first, under the name "general"."""
    loose = {name: value for name, value in environment.items() if not isinstance(value, dict)}
    groups = [("general", flat(loose))] if loose else []
    return groups + [(name, flat(value)) for name, value in environment.items() if isinstance(value, dict)]
