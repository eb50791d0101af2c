"""Everything that can go wrong, as one tree. Every error carries what the user needs to go on.

EdgekdError             1    a fault of edgekd itself
├── RecipeError         2    a recipe, an option or a command line that cannot be meant
├── MissingError        3    a backend, device or optional package that is not here
├── StageError          4    a stage that failed
│   ├── DataError            the user's data cannot be used as it is
│   ├── CheckpointError      weights that are absent, unsafe or do not fit the network
│   ├── StoreError           the store is corrupt, full or not writable
│   ├── ExportError          the exported graph does not compute what the network computes
│   ├── ConnectionLost       the device was there and is gone; the job's folder stays on it, to go on from
│   ├── DiskFull             the device has no space left; what was measured stays on it, to go on from
│   └── BoardFailed          of several boards, some were not measured; its exit code is theirs where all have one
├── BudgetMissed        5    everything ran; a budget of the recipe is not met
└── ResultInvalid       6    everything ran; the measurement does not hold
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

# What an error shows of a value, and of a list of names.
SHOWN_CHARACTERS = 60
SHOWN_NAMES = 30


class EdgekdError(Exception):
    """An error in three parts: `what` went wrong, what is `allowed`, and the `fix` to try next.

    `key` is the recipe's dotted key at fault, if one is: whoever knows the recipe's file puts its line into `position`.
    """

    exit_code = 1

    def __init__(self, what: str, *, allowed: str = "", fix: str = "", key: str = "") -> None:
        super().__init__(what)
        self.what, self.allowed, self.fix, self.key = what, allowed, fix, key
        self.position = ""

    def __str__(self) -> str:
        lines = [f"error: {self.position}{self.what}"]
        if self.allowed:
            lines.append(f"       {self.allowed}")
        if self.fix:
            lines.append(f"fix:   {self.fix}")
        return "\n".join(lines)


class RecipeError(EdgekdError):
    exit_code = 2


class MissingError(EdgekdError):
    exit_code = 3


class StageError(EdgekdError):
    exit_code = 4


class DataError(StageError):
    pass


class CheckpointError(StageError):
    pass


class StoreError(StageError):
    pass


class ExportError(StageError):
    pass


class ConnectionLost(StageError):
    pass


class DiskFull(StageError):
    pass


class BoardFailed(StageError):
    pass


class BudgetMissed(EdgekdError):
    exit_code = 5


class ResultInvalid(EdgekdError):
    exit_code = 6


def unknown(
    where: str, value: object, known: Iterable[str], *, noun: str, fix: str = "", listed: bool = False
) -> RecipeError:
    """The error for a name that does not exist, or for one of a list: it shows known names and the closest one."""
    names, close = sorted(known), _closest(value, known)
    write = f'write "{close}" in {where}' if listed else f'set {where} = "{close}"'
    advice = [write if "." in where else f'use "{close}"'] if close else []
    return RecipeError(
        f"{where} = {shown(value)} is not a known {noun}",
        allowed=_known(names, close),
        fix=", or ".join([*advice, fix] if fix else advice),
        key=where,
    )


def unknown_key(section: str, key: str, known: Iterable[str], *, of: str = "", fix: str = "") -> RecipeError:
    """The error for a key that a section of the recipe does not have; `of` names the thing whose options are meant."""
    prefix = f"{section}." if section else ""
    names, close = sorted(known), _closest(key, known)
    advice = [f"write {prefix}{close}"] if close else []
    return RecipeError(
        f"{prefix}{key} is not a known key" + (f" or option of {of}" if of else ""),
        allowed=_known(names, close),
        fix=", or ".join([*advice, fix] if fix else advice),
        key=f"{prefix}{key}",
    )


def _closest(value: object, known: Iterable[str]) -> str:
    """The known name that was probably meant; empty when none is close."""
    return (difflib.get_close_matches(str(value), list(known), n=1) or [""])[0]


def shown(value: object) -> str:
    """A value as a recipe spells it, cut to fit into an error."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _known(names: list[str], close: str) -> str:
    more = f", and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"known: {', '.join(names[:SHOWN_NAMES]) or 'none'}{more}" + (f'   (closest: "{close}")' if close else "")
