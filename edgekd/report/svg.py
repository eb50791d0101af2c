"""From a Matplotlib figure to inline SVG that takes its colours and fonts from the page's style sheet."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Figures are drawn in these stand-in colours, one per role; the style sheet says what each role looks like in
# light, in dark and on paper.
ROLES = {
    name: f"#{number:02x}{number:02x}{number:02x}"
    for number, name in enumerate(
        ("text", "muted", "grid", "student", "teacher", "scratch", "better", "worse", "surface", "finetune"), start=1
    )
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called "$5"
    "path.simplify": False,
    "font.size": 11,
    "text.color": ROLES["text"],
    "axes.facecolor": "none",
    "axes.edgecolor": ROLES["grid"],
    "axes.labelcolor": ROLES["muted"],
    "axes.titlecolor": ROLES["muted"],
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": ROLES["grid"],
    "grid.linewidth": 0.6,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelcolor": ROLES["muted"],
    "ytick.labelcolor": ROLES["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "lines.linewidth": 1.8,
}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Figures drawn inside look the same whatever the user's matplotlibrc says; `name` keeps their ids apart."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})  # type: ignore[arg-type]
        yield


def blank(width: float, height: float) -> Figure:
    """An empty transparent figure; one unit is one pixel at the figure's own size."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False, layout="constrained")


def inline_svg_from_figure(figure: Figure, description: str) -> str:
    """One `<svg>` element as wide as its container, described for screen readers, free of outside references."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The browser draws the text with its own fonts; what Matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    # Only tags are rewritten: a text may well read `id="x"` or `#010101`.
    text = re.sub(r"<[^>]+>", lambda tag: _themed(tag[0], used), text)
    opening = f'<svg viewBox="0 0 {_size(figure)}" role="img" aria-label="{escape(description)}">'
    text = opening + text[text.index(">") + 1 :]
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _size(figure: Figure) -> str:
    width, height = figure.get_size_inches() * 72
    return f"{width:g} {height:g}"


def _themed(tag: str, used_ids: set[str]) -> str:
    """The tag with roles for colours, no fonts, two decimals, and an id only where something refers to it."""
    for role, colour in ROLES.items():
        tag = tag.replace(colour, f"var(--{role})")
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    tag = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used_ids else "", tag)
    tag = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", tag)
    return tag.replace("xlink:href", "href")
