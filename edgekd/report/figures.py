"""The figures of the report, each one inline SVG about 400 units wide so that its text is legible on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from edgekd.report.document import RUNGS, Activation, Confusion, Document, Latency, Training
from edgekd.report.formatting import label, milliseconds, number, percent, prefix, quantity, times
from edgekd.report.part import Absent
from edgekd.report.svg import ROLES, blank, drawing, inline_svg_from_figure
from edgekd.report.tables import RUNG_LABELS

WIDTH = 400
LINE_STYLES = {"student": "-", "teacher": "--", "scratch": ":", "finetune": "-."}
NETWORK_LABELS = {
    "student": "student",
    "teacher": "teacher",
    "scratch": "student, labels only",
    "finetune": "student, with rounding",
}
# Above this spread a linear axis would squeeze the faster model against zero.
LOG_FROM_RATIO = 3
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
PLAIN = FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", "−"))
MAX_CLASSES_DRAWN = 30
WORST_CLASSES_DRAWN = 20
MAX_CLASSES_NUMBERED = 12
TICK_LABEL_LENGTH = 12


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend: the role that colours it, its line style, and its name."""

    role: str
    text: str


@dataclass(frozen=True)
class Drawn:
    """A figure as the page shows it: title, what to read from it, legend, and the SVG."""

    title: str
    caption: str
    svg: str
    keys: tuple[Key, ...] = ()


def ladder(document: Document) -> Drawn | Absent:
    """The score with 95% interval at every rung, and the change from one rung to the next."""
    metric = document.metric
    if all(row.score is None for row in document.ladder):
        return Absent(reason="No rung was measured, so there is nothing to draw.")
    with drawing("ladder"):
        figure = blank(WIDTH, 36 * len(RUNGS) + 26)
        axes = figure.add_axes((0.31, 26 / (36 * len(RUNGS) + 26), 0.39, 1 - 34 / (36 * len(RUNGS) + 26)))
        figure.set_layout_engine("none")
        before: float | None = None
        trail: list[tuple[float, int]] = []
        drawn: list[str] = []
        for y, rung in enumerate(RUNGS):
            row = document.row(rung)
            if row is None or row.score is None or row.ci95 is None:
                axes.text(1.06, y, "not measured", transform=axes.get_yaxis_transform(), va="center", c=ROLES["muted"])
                continue
            drawn.append(rung if rung in ("teacher", "scratch") else "student")
            colour = ROLES[drawn[-1]]
            axes.plot(row.ci95, (y, y), color=colour, linewidth=2.5, alpha=0.55)
            axes.plot(row.score, y, "o", color=colour, markersize=7)
            axes.text(1.06, y, metric.text(row.score), transform=axes.get_yaxis_transform(), va="center")
            if before is not None:
                change = metric.bare(row.score - before)
                axes.text(1.76, y, change, transform=axes.get_yaxis_transform(), va="center", ha="right")
            if rung != "scratch":
                before = row.score
                trail.append((row.score, y))
        if trail:
            axes.plot(*zip(*trail, strict=True), color=ROLES["muted"], linewidth=1, zorder=1)
        axes.set_ylim(len(RUNGS) - 0.5, -0.5)
        axes.set_yticks(range(len(RUNGS)), [RUNG_LABELS[rung] for rung in RUNGS], color=ROLES["text"])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PERCENT if metric.share else PLAIN)
        svg = inline_svg_from_figure(figure, f"{metric.title} at every rung with 95% intervals; see the table")
    apart = " (for the student on labels only: from the teacher)" if {"teacher", "scratch"} <= {*drawn} else ""
    caption = f"{metric.title} with 95% interval, and the change from the rung before{apart}."
    return Drawn(f"Where {metric.noun} went", caption, svg, _network_keys(dict.fromkeys(drawn)))


def latency_distribution(models: dict[str, Latency]) -> Drawn:
    """Histogram and cumulative share of both models' latencies on one axis, with p50, p90 and p99 marked."""
    values = {name: np.sort(np.asarray(model.samples_ms)) for name, model in models.items()}
    low = min(v[0] for v in values.values())
    high = max(model.p99_ms for model in models.values()) * 1.1
    logarithmic = high / low >= LOG_FROM_RATIO
    scale, unscale = (np.log, np.exp) if logarithmic else (np.asarray, np.asarray)
    # Room on both sides for the percentiles' labels.
    pad = 0.5 * (scale(high) - scale(low))
    edges = unscale(np.linspace(scale(low), scale(high), 49))
    fastest = min(models, key=lambda name: models[name].p50_ms)
    with drawing("latency-distribution"):
        figure = blank(WIDTH, 290)
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (1, 2.4)})
        for name, sample in values.items():
            colour = ROLES[name]
            share = np.histogram(sample, edges)[0] / len(sample)
            top.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            top.stairs(share, edges, color=colour, linestyle=LINE_STYLES[name], linewidth=1.2)
            cumulative = np.arange(1, len(sample) + 1) / len(sample)
            bottom.step(sample, cumulative, where="post", color=colour, linestyle=LINE_STYLES[name])
            _mark_percentiles(bottom, models[name], colour, left=name == fastest)
        if logarithmic:
            bottom.set_xscale("log")
            bottom.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
        else:
            bottom.xaxis.set_major_locator(MaxNLocator(5))
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.set_xlim(unscale(scale(low) - pad), unscale(scale(high) + pad))
        bottom.xaxis.set_major_formatter(PLAIN)
        bottom.set_ylim(-0.04, 1.16)
        bottom.set_xlabel("latency of one inference, ms" + (" (log scale)" if logarithmic else ""))
        top.yaxis.set_major_locator(NullLocator())
        top.set_title("how often")
        bottom.set_title("share of inferences no slower")
        bottom.yaxis.set_major_locator(FixedLocator([0, 0.5, 0.9, 1]))
        bottom.yaxis.set_major_formatter(PERCENT)
        svg = inline_svg_from_figure(figure, "Distribution of latencies with p50, p90 and p99; see the table")
    hidden = sum(int((v > high).sum()) for v in values.values())
    caption = f"{_of_samples(models)}" + (f" {hidden} of them lie above the axis." if hidden else "")
    return Drawn("Latency distribution", caption, svg, _network_keys(models))


def _mark_percentiles(axes: Axes, model: Latency, colour: str, *, left: bool) -> None:
    for share, text, value in ((0.5, "p50", model.p50_ms), (0.9, "p90", model.p90_ms), (0.99, "p99", model.p99_ms)):
        axes.plot(value, share, "o", color=colour, markersize=4.5)
        # The curve rises to the right: labels go up and left of it, or down and right; right of p99 it is flat.
        above = share > 0.95 and not left
        axes.annotate(
            f"{text} {milliseconds(value)}",
            (value, share),
            (-6, -3) if left else (2, 5) if above else (6, 3),
            textcoords="offset points",
            ha="right" if left else "left",
            va="bottom" if left or above else "top",
            fontsize=10.5,
            bbox={"facecolor": ROLES["surface"], "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )


def latency_over_time(models: dict[str, Latency]) -> Drawn:
    """Each sample at the time when it was taken: drift, throttling and outliers show here."""
    every = np.concatenate([model.samples_ms for model in models.values()])
    with drawing("latency-over-time"):
        figure = blank(WIDTH, 290)
        axes = figure.add_subplot()
        for name, model in models.items():
            _dots(axes, model.samples_time_s, model.samples_ms, ROLES[name])
        axes.autoscale_view()
        if every.max() / every.min() >= LOG_FROM_RATIO:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PLAIN)
        axes.set_title("latency, ms")
        axes.set_xlabel("time in the session, s")
        svg = inline_svg_from_figure(figure, "Latency of each inference over the time of the session")
    both = ", both models interleaved in one session" if len(models) > 1 else ""
    caption = f"One dot per inference{both}. {_of_samples(models)}"
    return Drawn("Latency over time", caption, svg, _network_keys(models))


def launches(document: Document) -> Drawn | Absent:
    """The speed-up of every launch of fresh processes beside the median and its interval."""
    speedup = document.verdict.speedup
    if isinstance(speedup, Absent):
        return speedup
    if not speedup.by_launch:
        return Absent(reason="The run did not record the speed-up of single launches.")
    with drawing("launches"):
        figure = blank(WIDTH, 170)
        axes = figure.add_subplot()
        axes.axhspan(*speedup.ci95, color=ROLES["student"], alpha=0.16, linewidth=0)
        axes.axhline(speedup.value, color=ROLES["student"], linewidth=1)
        axes.plot(range(1, len(speedup.by_launch) + 1), speedup.by_launch, "o", color=ROLES["student"], markersize=6)
        axes.margins(0.08, 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.set_title("speed-up, x")
        axes.set_xlabel("launch")
        svg = inline_svg_from_figure(figure, "Speed-up of every launch; see the table")
    caption = f"One dot per launch of fresh processes. Line and band: {times(speedup.value)} with its 95% interval."
    return Drawn("Speed-up by launch", caption, svg)


def _dots(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    """A cloud of dots as one path of zero-length strokes: a twentieth of the bytes of one marker per dot."""
    vertices = np.repeat(np.column_stack((x, y)), 2, axis=0)
    codes = np.tile([Path.MOVETO, Path.LINETO], len(x))
    patch = PathPatch(Path(vertices, codes), fill=False, edgecolor=colour, linewidth=2.2, alpha=0.45, capstyle="round")
    axes.add_patch(patch)


def _of_samples(models: dict[str, Latency]) -> str:
    return " ".join(
        f"{NETWORK_LABELS[name].capitalize()}: {len(model.samples_ms):,} of {model.n:,} samples, evenly spaced in time."
        if len(model.samples_ms) < model.n
        else f"{NETWORK_LABELS[name].capitalize()}: {model.n:,} samples."
        for name, model in models.items()
    )


def _network_keys(names: Iterable[str]) -> tuple[Key, ...]:
    return tuple(Key(name, NETWORK_LABELS[name]) for name in names)


def telemetry(document: Document) -> list[Drawn]:
    """One figure per sensor over the time of the benchmark."""
    if isinstance(document.telemetry, Absent):
        return []
    drawn = []
    for name, readings in document.telemetry.series.items():
        words, unit = label(name)
        values = np.array([np.nan if value is None else value for value in readings], dtype=float)
        known = values[~np.isnan(values)]
        divisor, sign = prefix(known.max(initial=0)) if unit in ("Hz", "bytes") else (0.01 if unit == "%" else 1, "")
        unit = sign + {"bytes": "B"}.get(unit, unit) if sign else unit
        with drawing(f"telemetry-{name}"):
            figure = blank(WIDTH, 150)
            axes = figure.add_subplot()
            axes.plot(
                document.telemetry.time_s,
                values / divisor,
                color=ROLES["muted"],
                marker="." if len(values) < 3 else None,
            )
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter(PLAIN)
            axes.set_xlabel("time in the session, s")
            svg = inline_svg_from_figure(figure, f"{words} over the time of the session")
        caption = (
            "The sensor gave no reading."
            if not len(known)
            else f"Constant at {quantity(name, known[0])}."
            if known.min() == known.max()
            else f"From {quantity(name, known.min())} to {quantity(name, known.max())}."
        )
        drawn.append(Drawn(f"{words}, {unit}" if unit else words, caption, svg))
    return drawn


def training(document: Document) -> list[Drawn]:
    """Loss and score per epoch of every network that was trained in this run."""
    runs = {name: run for name, run in document.training.items() if isinstance(run, Training)}
    if not runs:
        return []
    noun = f"{document.metric.noun[:1].upper()}{document.metric.noun[1:]}"
    drawn = []
    for title, names, caption in (
        ("Training loss", ("train_loss",), "Mean over the epoch; with a teacher the loss is another one."),
        (noun, ("val_score", "train_score"), "Strong: validation split. Faint, where known: training set."),
    ):
        with drawing(title):
            figure = blank(WIDTH, 230)
            axes = figure.add_subplot()
            for network, run in runs.items():
                for field, alpha in zip(names, (1, 0.4), strict=False):
                    _plot_epochs(axes, run, field, ROLES[network], LINE_STYLES[network], alpha)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_formatter(PERCENT if title == noun and document.metric.share else PLAIN)
            axes.set_xlabel("epoch")
            svg = inline_svg_from_figure(figure, f"{title} per epoch of {', '.join(runs)}")
        drawn.append(Drawn(title, caption, svg, _network_keys(runs)))
    return drawn


def _plot_epochs(axes: Axes, run: Training, field: str, colour: str, linestyle: str, alpha: float) -> None:
    pairs = [(epoch.epoch, getattr(epoch, field)) for epoch in run.epochs if getattr(epoch, field) is not None]
    if pairs:
        marker = "o" if len(pairs) == 1 else None
        axes.plot(*zip(*pairs, strict=True), color=colour, linestyle=linestyle, alpha=alpha, marker=marker)


def confusion(matrix: Confusion) -> list[Drawn]:
    """The student's confusion matrix and, where the teacher's is known, what changed against it."""
    student = np.asarray(matrix.student)
    shown, subset = _classes_drawn(matrix.classes, student)
    names = [short(matrix.classes[c], TICK_LABEL_LENGTH) for c in shown]
    picked = student[np.ix_(shown, shown)]
    samples = np.maximum(student.sum(axis=1)[shown], 1)[:, None]
    svg = _matrix("confusion", names, picked, picked / samples, np.full(picked.shape, "student"), signed=False)
    caption = f"Rows: true class. Columns: predicted class. Shade: share of the true class.{subset}"
    drawn = [Drawn("Confusion matrix of the student", caption, svg)]
    if not isinstance(matrix.teacher, Absent):
        change = (student - np.asarray(matrix.teacher))[np.ix_(shown, shown)]
        good = np.where(np.eye(len(shown), dtype=bool), change > 0, change < 0)
        strength = np.abs(change) / max(1, np.abs(change).max())
        svg = _matrix("confusion-change", names, change, strength, np.where(good, "better", "worse"), signed=True)
        caption = f"Student minus teacher, in samples, on the same test set.{subset}"
        keys = (Key("better", "better than the teacher"), Key("worse", "worse than the teacher"))
        drawn.append(Drawn("What changed against the teacher", caption, svg, keys))
    return drawn


def _classes_drawn(classes: list[str], student: np.ndarray) -> tuple[list[int], str]:
    """All classes while they fit, else those with the most errors, and a sentence that says so."""
    if len(classes) <= MAX_CLASSES_DRAWN:
        return list(range(len(classes))), ""
    errors = student.sum(axis=1) - np.diag(student)
    worst = sorted(np.argsort(-errors, kind="stable")[:WORST_CLASSES_DRAWN].tolist())
    return worst, f" Shown: the {WORST_CLASSES_DRAWN} of {len(classes)} classes with the most errors."


def _matrix(
    name: str, classes: list[str], values: np.ndarray, strength: np.ndarray, roles: np.ndarray, *, signed: bool
) -> str:
    """K x K cells: shade by `strength` [K, K] from 0 to 1, colour by `roles` [K, K], numbers where they fit."""
    k = len(classes)
    with drawing(name):
        figure = blank(WIDTH, WIDTH)
        axes = figure.add_subplot()
        for (row, column), value in np.ndenumerate(values):
            if value == 0:
                continue
            shade = float(strength[row, column]) ** 0.6
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, color=ROLES[str(roles[row, column])], alpha=shade, linewidth=0))
            if k <= MAX_CLASSES_NUMBERED:
                colour = ROLES["surface" if shade > 0.55 else "text"]
                text = f"{value:+d}".replace("-", "−") if signed else str(value)
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10.5)
        axes.set_xlim(-0.5, k - 0.5)
        axes.set_ylim(k - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        axes.xaxis.tick_top()
        axes.tick_params(top=False, labelsize=10.5 if k <= WORST_CLASSES_DRAWN else 8)
        axes.set_xticks(range(k), classes, rotation=0 if max(map(len, classes)) <= 3 else 90)
        axes.set_yticks(range(k), classes)
        return inline_svg_from_figure(figure, "Counts by true class (rows) and predicted class (columns)")


def short(name: str, length: int) -> str:
    """A name that fits beside an axis: printable, cut to `length` characters."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= length else name[: length - 1] + "…"


def activation(layer: Activation, index: int) -> Drawn:
    """The learned function of one layer, ReLU beside it, and the inputs that it meets behind it."""
    x, y = np.asarray(layer.x), np.asarray(layer.y)
    with drawing(f"activation-{index}"):
        figure = blank(200, 150)
        axes = figure.add_subplot()
        axes.plot(x, np.maximum(x, 0), color=ROLES["muted"], linestyle=":", linewidth=1.2)
        for piece in _pieces(x, layer.cuts):
            axes.plot(x[piece], y[piece], color=ROLES["student"])
        axes.set_xlim(x.min(), x.max())
        bottom, top = axes.get_ylim()
        axes.vlines([c for c in layer.cuts if x.min() < c < x.max()], bottom, top, color=ROLES["grid"], linewidth=0.8)
        if layer.histogram is not None:
            counts = np.asarray(layer.histogram.counts)
            edges = np.linspace(layer.histogram.low, layer.histogram.high, len(counts) + 1)
            heights = bottom + 0.75 * (top - bottom) * counts / max(1, counts.max())
            axes.stairs(heights, edges, baseline=bottom, fill=True, color=ROLES["muted"], alpha=0.28)
        axes.set_ylim(bottom, top)
        axes.set_xlim(x.min(), x.max())
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(3))
            axis.set_major_formatter(PLAIN)
        svg = inline_svg_from_figure(figure, f"Learned activation of layer {layer.name}")
    return Drawn(layer.name, _facts(layer), svg)


def _pieces(x: np.ndarray, cuts: list[float]) -> list[np.ndarray]:
    """Indices of the samples of each segment, so that a jump is drawn as a jump; a cut belongs to the left segment."""
    ends = np.searchsorted(x, sorted(cuts), side="right")
    return [piece for piece in np.split(np.arange(len(x)), ends) if len(piece)]


def _facts(layer: Activation) -> str:
    facts = [layer.kind]
    if layer.continuous is not None:
        facts[0] += ", continuous" if layer.continuous else ", not continuous"
    facts += [f"k\u00a0{layer.k}"] if layer.k is not None else []
    facts += [
        f"{name}\u00a0{number(value)}"
        for name, value in (("μ", layer.mu), ("σ", layer.sigma), ("largest jump", layer.max_jump))
        if value is not None
    ]
    if layer.histogram is not None and (outside := layer.histogram.below + layer.histogram.above):
        facts.append(f"{percent(outside / (outside + sum(layer.histogram.counts)))} of inputs outside the plot")
    return " · ".join(facts)
