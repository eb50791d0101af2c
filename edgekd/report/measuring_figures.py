"""The figures about how the engines were asked."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from edgekd.report.document import Document, Latency
from edgekd.report.figures import LINE_STYLES, LOG_FROM_RATIO, PERCENT, PLAIN, WIDTH, Drawn, Key
from edgekd.report.formatting import milliseconds
from edgekd.report.measuring import EndToEnd, Fps, Offline, Sustained
from edgekd.report.svg import ROLES, blank, drawing, inline_svg_from_figure


def _keys(models: Iterable[str]) -> tuple[Key, ...]:
    return tuple(Key(model, model) for model in models)


def of_measuring(document: Document) -> dict[str, Drawn]:
    """The figures by the name of the passage that they belong to."""
    drawn = _of_mode(document)
    if document.end_to_end:
        drawn["end_to_end"] = steps(document.end_to_end)
    return drawn


def _of_mode(document: Document) -> dict[str, Drawn]:
    match document.mode:
        case Offline() as mode:
            return {mode.name: throughput(mode)}
        case Sustained() as mode:
            return {mode.name: over_minutes(mode)}
        case Fps() as mode:
            latencies = {"student": document.latency.student, "teacher": document.latency.teacher}
            known = {name: one for name, one in latencies.items() if isinstance(one, Latency) and one.samples_ms}
            return {mode.name: deadlines(mode, known)} if known else {}
    return {}


def throughput(mode: Offline) -> Drawn:
    """Samples a second by batch size, on logarithmic axes: a straight rise is a batch that costs nothing."""
    with drawing("throughput"):
        figure = blank(WIDTH, 240)
        axes = figure.add_subplot()
        for model, rows in mode.sweep.items():
            batches, rates = [row.batch for row in rows], [row.throughput_per_s for row in rows]
            axes.plot(batches, rates, color=ROLES[model], linestyle=LINE_STYLES[model], marker="o", markersize=4)
            best = batches.index(mode.best_batch[model])
            axes.plot(batches[best], rates[best], "o", color=ROLES[model], markersize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator([row.batch for row in next(iter(mode.sweep.values()))]))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(PLAIN)
        axes.set_title("samples per second")
        axes.set_xlabel("batch size")
        svg = inline_svg_from_figure(figure, "Throughput by batch size; see the table")
    return Drawn("Throughput by batch size", "The large dot is each model's best batch size.", svg, _keys(mode.sweep))


def deadlines(mode: Fps, latencies: dict[str, Latency]) -> Drawn:
    """The share of frames answered within a time from their arrival, and the deadline."""
    deadline = 1e3 / mode.fps
    every = np.concatenate([one.samples_ms for one in latencies.values()])
    with drawing("deadlines"):
        figure = blank(WIDTH, 230)
        axes = figure.add_subplot()
        for model, one in latencies.items():
            sample = np.sort(one.samples_ms)
            share = np.arange(1, len(sample) + 1) / len(sample)
            axes.step(sample, share, where="post", color=ROLES[model], linestyle=LINE_STYLES[model])
        axes.axvline(deadline, color=ROLES["worse"], linewidth=1.4)
        if max(every.max(), deadline) / min(every.min(), deadline) >= LOG_FROM_RATIO:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_title("share of frames answered")
        axes.set_xlabel("time since the frame arrived, ms")
        svg = inline_svg_from_figure(figure, "Share of frames answered by the time since they arrived; see the table")
    caption = f"What lies right of the line missed its deadline of {milliseconds(deadline)}."
    return Drawn("Frames answered in time", caption, svg, (*_keys(latencies), Key("worse", "deadline")))


def over_minutes(mode: Sustained) -> Drawn:
    """The models' median latency by window, and below it the hottest sensor, where there is one."""
    minutes = [(window.start_s + window.end_s) / 120 for window in mode.windows]
    hot = [window.temperature_c for window in mode.windows]
    measured = any(value is not None for value in hot)
    with drawing("over-minutes"):
        figure = blank(WIDTH, 330 if measured else 210)
        axes, *below = np.atleast_1d(figure.subplots(1 + measured, 1, sharex=True))
        for model in mode.slower:
            values = [window.p50_ms[model] for window in mode.windows]
            axes.plot(minutes, values, color=ROLES[model], linestyle=LINE_STYLES[model], marker="o", markersize=3)
        axes.set_ylim(bottom=0)
        axes.set_title("median latency, ms")
        for lower in below:
            lower.plot(minutes, np.array(hot, float), color=ROLES["worse"], marker="o", markersize=3)
            lower.yaxis.set_major_locator(MaxNLocator(4))
            lower.set_title("hottest sensor, °C")
        for one in (axes, *below):
            one.yaxis.set_major_formatter(PLAIN)
            one.xaxis.set_major_formatter(PLAIN)
        (axes, *below)[-1].set_xlabel("minutes since the start")
        svg = inline_svg_from_figure(figure, "Median latency and temperature over the minutes; see the table")
    caption = "Each dot is a window" + (" in which both models were timed in turn." if len(mode.slower) > 1 else ".")
    caption += "" if measured else " No sensor tells the temperature."
    return Drawn("Latency over minutes", caption, svg, _keys(mode.slower))


def steps(found: EndToEnd) -> Drawn:
    """The median of every step, the models beside each other."""
    names = list(found.models["student"].steps_ms)
    with drawing("steps"):
        figure = blank(WIDTH, 40 * len(names) + 46)
        axes = figure.add_subplot()
        for row, model in enumerate(found.models):
            values = list(found.models[model].steps_ms.values())
            places = np.arange(len(names)) + 0.36 * row - 0.18
            axes.barh(places, values, height=0.32, color=ROLES[model], alpha=0.75)
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {milliseconds(value)}", va="center", fontsize=10.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1.3 * max(max(one.steps_ms.values()) for one in found.models.values()))
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.set_xlabel("median, ms")
        svg = inline_svg_from_figure(figure, "Time by step from the stored image to the answer; see the table")
    return Drawn("Time by step", "Medians of one image at a time.", svg, _keys(found.models))
