"""The figures about quantization: what each layer and each class lost."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, MaxNLocator

from edgekd.report.figures import PLAIN, WIDTH, Drawn, Key, short
from edgekd.report.formatting import NO_LOSS_DB, decibels, points
from edgekd.report.quantization import Quantization
from edgekd.report.quantization_tables import worst_layer
from edgekd.report.svg import ROLES, blank, drawing, inline_svg_from_figure

MAX_BARS = 40
BAR_HEIGHT = 18
LABEL_LENGTH = 22
POINTS = FuncFormatter(lambda value, _: f"{100 * value:.4g}".replace("-", "−"))


def of_quantization(part: Quantization) -> dict[str, Drawn]:
    """The figures by the name of the passage that they belong to."""
    drawn = {}
    if part.layers:
        drawn["layers"] = layers(part)
    if any(row.change for row in part.classes):
        drawn["classes"] = classes(part)
    return drawn


def layers(part: Quantization) -> Drawn:
    """Output SQNR of every layer, from the first on top to the last; of very deep networks, the worst ones."""
    lowest = sorted(part.layers, key=lambda row: row.output_sqnr_db)[:MAX_BARS]
    shown = [row for row in part.layers if row in lowest]
    worst = worst_layer(part)
    bad = [row is worst or bool(row.suggestion) for row in shown]
    svg = _bars(
        "quantization-layers",
        [row.layer for row in shown],
        [0.0 if row.output_sqnr_db >= NO_LOSS_DB else row.output_sqnr_db for row in shown],
        [decibels(row.output_sqnr_db) for row in shown],
        ["worse" if marked else "student" for marked in bad],
        "output SQNR, dB",
    )
    subset = "" if len(shown) == len(part.layers) else f" Shown: the {MAX_BARS} of {len(part.layers)} that lost most."
    caption = f"Signal to noise of each layer's output, with all that was lost before it; higher is better.{subset}"
    keys = (Key("worse", "worst, or with advice above"),) if any(bad) else ()
    return Drawn("Output by layer", caption, svg, keys)


def classes(part: Quantization) -> Drawn:
    """Change of the score of every class that changed most, the largest loss on top."""
    known = [(row.name, row.change) for row in part.classes if row.change is not None]
    largest = sorted(known, key=lambda pair: -abs(pair[1]))[:MAX_BARS]
    shown = sorted(largest, key=lambda pair: pair[1])
    svg = _bars(
        "quantization-classes",
        [name for name, _ in shown],
        [change for _, change in shown],
        [points(change).removesuffix(" points") for _, change in shown],
        ["worse" if change < 0 else "better" for _, change in shown],
        f"change of {part.metric.of_class}, points",
    )
    subset = "" if len(shown) == len(known) else f" Shown: the {MAX_BARS} of {len(known)} that changed most."
    keys = (Key("worse", "worse than in float"), Key("better", "better than in float"))
    return Drawn(
        "Change by class",
        f"After quantization minus before, {part.metric.of_class} on the test samples.{subset}",
        svg,
        keys,
    )


def _bars(
    name: str, labels: Sequence[str], values: Sequence[float], texts: Sequence[str], roles: Sequence[str], axis: str
) -> str:
    """Horizontal bars from the top down, each with its label on the left and its value on the right."""
    with drawing(name):
        figure = blank(WIDTH, BAR_HEIGHT * len(labels) + 46)
        axes = figure.add_subplot()
        axes.barh(range(len(labels)), values, height=0.62, color=[ROLES[role] for role in roles], alpha=0.75)
        for y, text in enumerate(texts):
            axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=10.5)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), [short(label, LABEL_LENGTH) for label in labels], color=ROLES["text"])
        axes.axvline(0, color=ROLES["muted"], linewidth=1)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(POINTS if axis.endswith("points") else PLAIN)
        axes.set_xlabel(axis)
        return inline_svg_from_figure(figure, f"Bars: {axis}, by name; see the table")
