"""Figures of single answers: estimated against true values, and the score class by class."""

from __future__ import annotations

import numpy as np

from edgekd.report.answers import ClassScores, Estimates
from edgekd.report.figures import MAX_CLASSES_DRAWN, PERCENT, TICK_LABEL_LENGTH, WIDTH, Drawn, Key, short
from edgekd.report.part import Metric
from edgekd.report.svg import ROLES, blank, drawing, inline_svg_from_figure

BAR_HEIGHT = 22


def of_answers(answers: list[Estimates] | ClassScores, metric: Metric) -> list[Drawn]:
    """One figure of all classes, or one for each value that is estimated."""
    if isinstance(answers, ClassScores):
        return [_classes(answers, metric)]
    return [_estimates(one, metric) for one in answers]


def _networks(answers: Estimates | ClassScores) -> list[str]:
    """Whose answers they are."""
    return ["student"] if answers.teacher is None else ["student", "teacher"]


def _keys(answers: Estimates | ClassScores) -> tuple[Key, ...]:
    return tuple(Key(name, name) for name in _networks(answers))


def _estimates(values: Estimates, metric: Metric) -> Drawn:
    unit = f", {metric.unit}" if metric.unit else ""
    with drawing(f"estimates-{values.name}"):
        figure = blank(WIDTH, WIDTH)
        axes = figure.add_subplot()
        drawn = {name: getattr(values, name) for name in reversed(_networks(values))}  # the student on top
        for name, estimated in drawn.items():
            axes.plot(values.true, estimated, ".", color=ROLES[name], markersize=3, alpha=0.6)
        ends = np.quantile([values.true, *drawn.values()], [0, 1])
        axes.plot(ends, ends, color=ROLES["muted"], linewidth=1, zorder=1)
        axes.set_xlabel(f"true{unit}")
        axes.set_ylabel(f"estimated{unit}")
        axes.set_aspect("equal")
        svg = inline_svg_from_figure(figure, f"Estimated against true {values.name}")
    caption = f"{len(values.true):,} test samples; on the line, what was estimated is true."
    return Drawn(f"{values.name[:1].upper()}{values.name[1:]}, estimated and true", caption, svg, _keys(values))


def _classes(scores: ClassScores, metric: Metric) -> Drawn:
    known = [at for at, n in enumerate(scores.n) if n]
    shown = sorted(known, key=lambda at: scores.student[at] or 0.0)[:MAX_CLASSES_DRAWN]
    with drawing("answers-classes"):
        figure = blank(WIDTH, BAR_HEIGHT * len(shown) + 46)
        axes = figure.add_subplot()
        networks = _networks(scores)
        for place, name in enumerate(reversed(networks)):
            heights = [getattr(scores, name)[at] or 0.0 for at in shown]
            offset = 0.4 * place - 0.2 * (len(networks) - 1)
            axes.barh(np.arange(len(shown)) + offset, heights, height=0.38, color=ROLES[name], alpha=0.75)
        names = [f"{short(scores.names[at], TICK_LABEL_LENGTH)} ({scores.n[at]})" for at in shown]
        axes.set_yticks(range(len(shown)), names, color=ROLES["text"])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(PERCENT)
        axes.grid(axis="y", visible=False)
        svg = inline_svg_from_figure(figure, f"{metric.label} of every class, of {' and '.join(networks)}")
    subset = "" if len(shown) == len(known) else f" Shown: the {MAX_CLASSES_DRAWN} of {len(known)} with the lowest."
    caption = f"The student's lowest first; in brackets, test samples that have the class.{subset}"
    return Drawn(f"{metric.label} by class", caption, svg, _keys(scores))
