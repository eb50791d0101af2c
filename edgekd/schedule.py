"""Options that change while a network trains: `temperature: {linear: [4, 1]}` where a number would stand.

Whatever is annotated `float | Schedule` takes either; a number is a constant. The value is a pure function of the share
of the training that is done, so a training that resumes goes on where it was.

    {linear: [from, to]}        in a straight line
    {cosine: [from, to]}        slowly, quickly, slowly: half a period
    {exponential: [from, to]}   by the same factor every epoch; both of one sign, and not 0
    {ramp_up: [from, to]}       exp(-5 (1 - share)^2) of the way (Laine and Aila, ICLR 2017, section 3)
    {step: [a, b, c, ...]}      each for an equal share of the training

A third number is the share of the training at which `to` is reached: `{linear: [4, 1, 0.5]}` is 1 in the second half,
exactly. Without one the last step is a step short of it, as the training is done after that step.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

# start, end and the share of the way, 0 to 1
_CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, share: start + (end - start) * share,
    "cosine": lambda start, end, share: end + (start - end) * (1 + math.cos(math.pi * share)) / 2,
    "exponential": lambda start, end, share: start * (end / start) ** share,
    "ramp_up": lambda start, end, share: start + (end - start) * math.exp(-5 * (1 - share) ** 2),
}
SHAPES = (*_CURVES, "step")
# The type of pydantic's complaint about a schedule: it says more than the one about the number that might stand there.
PROBLEM = "schedule"


def _checked(value: Any) -> Any:
    if not isinstance(value, dict):
        return value  # to be refused by its type
    if len(value) != 1 or next(iter(value)) not in SHAPES:
        named = ", ".join(map(str, value)) or "nothing"
        close = difflib.get_close_matches(named, SHAPES, n=1) if len(value) == 1 else []
        raise _problem(
            f"schedules: {', '.join(SHAPES)}; this names {named}" + (f', closest: "{close[0]}"' if close else "")
        )
    ((shape, numbers),) = value.items()
    if not isinstance(numbers, list) or not all(type(one) in (int, float) and math.isfinite(one) for one in numbers):
        raise _problem(f"{shape} takes a list of numbers")
    if shape == "step":
        if len(numbers) < 2:
            raise _problem("step takes two numbers or more")
    elif len(numbers) not in (2, 3) or not all(0 < until <= 1 for until in numbers[2:]):
        raise _problem(f"{shape} takes [from, to], or [from, to, until] with until above 0 and at most 1")
    elif shape == "exponential" and numbers[0] * numbers[1] <= 0:
        raise _problem("exponential takes two numbers of one sign, and not 0")
    return value


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError(PROBLEM, "{text}", {"text": text})


Schedule = Annotated[
    dict[str, list[float]],
    BeforeValidator(_checked),
    WithJsonSchema({
        "type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
        "properties": {shape: {"type": "array", "items": {"type": "number"}, "minItems": 2} for shape in SHAPES},
    }),
]  # fmt: skip


def is_schedule(value: object) -> bool:
    """Whether an option's value changes while a network trains."""
    return (
        isinstance(value, dict)
        and len(value) == 1
        and all(name in SHAPES and isinstance(numbers, list) for name, numbers in value.items())
    )


def value_at(option: float | Schedule, progress: float) -> float:
    """The value of an option when the share `progress`, 0 to 1, of the training is done."""
    if not isinstance(option, dict):
        return option
    ((shape, numbers),) = option.items()
    if shape == "step":
        return numbers[min(int(progress * len(numbers)), len(numbers) - 1)]
    start, end, until = (*numbers, 1.0)[:3]
    return end if progress >= until else _CURVES[shape](start, end, progress / until)


def values_of(option: float | Schedule) -> list[float]:
    """The numbers between which the option stays: they show whether it is ever negative, or 0."""
    if not isinstance(option, dict):
        return [option]
    ((shape, numbers),) = option.items()
    return numbers if shape == "step" else numbers[:2]
