"""How numbers are written: three significant digits, a true minus sign, a unit after every quantity."""

from __future__ import annotations

import math
from typing import Any

DASH = "–"
MINUS = "−"
# The unit suffixes of names, and how they are shown. A name without one carries a plain number.
UNITS = {
    "_ms": "ms",
    "_bytes": "bytes",
    "_per_s": "/s",
    "_s": "s",
    "_mj": "mJ",
    "_mw": "mW",
    "_w": "W",
    "_c": "°C",
    "_hz": "Hz",
    "_share": "%",
}
ACRONYMS = ("cpu", "gpu", "ram", "rss", "soc")
# What stands for infinity in the account of a quantization: signal without noise.
NO_LOSS_DB = 200
RATIOS = ("accuracy", "top1", "agreement")


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, without exponent from 0.0001 to a million: 0.0421, 4.21, 421, 42,100."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    rounded = round(value, digits - 1 - magnitude)
    # Rounding may carry into the next power of ten (9.996 becomes 10.0, not 10.00).
    magnitude = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS)


def milliseconds(value: float) -> str:
    """4.21 ms."""
    return f"{number(value)} ms"


def percent(ratio: float) -> str:
    """0.9152 as 91.52%."""
    return f"{100 * ratio:.2f}%"


def points(change: float) -> str:
    """A difference of two ratios in percentage points, always with its sign: −0.40 points."""
    text = f"{100 * change:+.2f}".replace("-", MINUS)
    return f"{'0.00' if text in ('+0.00', MINUS + '0.00') else text} points"


def signed(difference: float) -> str:
    """A difference with its sign: +0.421, −0.421, 0."""
    return f"{'+' if difference > 0 else ''}{number(difference)}"


def times(value: float) -> str:
    """A ratio of two quantities: 4.21x."""
    return f"{number(value)}x"


def prefix(value: float) -> tuple[float, str]:
    """Divisor and decimal prefix that bring a large value into the range 1 to 1000."""
    return next(
        ((10.0**power, sign) for power, sign in ((9, "G"), (6, "M"), (3, "k")) if abs(value) >= 10**power), (1, "")
    )


def size(count: float) -> str:
    """Bytes in decimal units: 1.21 MB."""
    divisor, sign = prefix(count)
    return f"{number(count / divisor)} {sign}B" if sign else f"{count:.0f} bytes"


def count(value: int) -> str:
    """A short count: 812, 78.7 k, 1.72 M, 41.3 G."""
    divisor, sign = prefix(value)
    return f"{number(value / divisor)} {sign}" if sign else str(value)


def decibels(ratio_db: float) -> str:
    """Signal to noise in dB, 31.2, where the unit is told elsewhere; `exact` where nothing was lost."""
    return "exact" if ratio_db >= NO_LOSS_DB else f"{ratio_db:.1f}".replace("-", MINUS)


def p_value(p: float) -> str:
    """p = 0.21, and p < 0.001 where more digits would say nothing."""
    return "p < 0.001" if p < 0.001 else f"p = {number(p, 2)}"


def label(name: str) -> tuple[str, str]:
    """A name with unit suffix as words and unit: `cpu_temperature_c` gives ("CPU temperature", "°C")."""
    suffix, unit = next(((suffix, unit) for suffix, unit in UNITS.items() if name.endswith(suffix)), ("", ""))
    words = name.removesuffix(suffix).split("_")
    text = " ".join(word.upper() if word in ACRONYMS else word for word in words)
    return text[:1].upper() + text[1:], unit


def quantity(name: str, value: float) -> str:
    """A value by the unit in its name: `p99_ms` 4.21 ms, `size_bytes` 1.21 MB, `speedup` 4.21x, `top1` 91.52%."""
    _, unit = label(name)
    if unit == "bytes":
        return size(value)
    if unit == "%":
        return percent(value)
    if unit == "Hz":
        divisor, sign = prefix(value)
        return f"{number(value / divisor)} {sign}Hz"
    if name == "speedup":
        return times(value)
    if not unit and any(word in name for word in RATIOS) and -1 <= value <= 1:
        return percent(value).replace("-", MINUS)
    if float(value).is_integer() and not unit:
        return f"{value:,.0f}"
    return f"{number(value)} {unit}".strip()


def fact(value: Any) -> str:
    """A fact of a recipe or an environment, as plain text."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(fact(item) for item in value) or DASH
    return str(value)


def flat(facts: dict[str, Any], parent: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text), in their own order."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{parent}{name}.")
        else:
            rows.append((f"{parent}{name}", DASH if value == {} else fact(value)))
    return rows
