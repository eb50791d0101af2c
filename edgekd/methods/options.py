"""Checks that the options of several methods need: bounds that hold for every value of a schedule."""

from __future__ import annotations

from edgekd.errors import RecipeError, shown
from edgekd.schedule import Schedule, values_of


def above_zero(name: str, option: float | Schedule, example: float) -> None:
    """Raise RecipeError, with `example` as the fix, unless the option stays above 0."""
    if min(values_of(option)) <= 0:
        raise _outside(name, option, "above 0", example)


def at_least_zero(name: str, option: float | Schedule, example: float) -> None:
    """Raise RecipeError, with `example` as the fix, if the option is ever negative."""
    if min(values_of(option)) < 0:
        raise _outside(name, option, "at least 0", example)


def from_zero_to_one(name: str, option: float | Schedule, example: float) -> None:
    """Raise RecipeError, with `example` as the fix, unless the option stays from 0 to 1, both allowed."""
    if min(values_of(option)) < 0 or max(values_of(option)) > 1:
        raise _outside(name, option, "from 0 to 1", example)


def a_share(name: str, option: float | Schedule, example: float) -> None:
    """Raise RecipeError, with `example` as the fix, unless the option stays from 0 to below 1."""
    if min(values_of(option)) < 0 or max(values_of(option)) >= 1:
        raise _outside(name, option, "a share, at least 0 and below 1", example)


def _outside(name: str, option: float | Schedule, allowed: str, example: float) -> RecipeError:
    key = f"distill.{name}"
    return RecipeError(
        f"{key} = {shown(option)} is not valid",
        allowed=f"expected: {allowed}",
        fix=f"--set {key}={example:g}",
        key=key,
    )
