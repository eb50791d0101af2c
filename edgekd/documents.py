"""Documents in JSON that another machine wrote: of a bounded size and depth, and of the types that they must have."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pydantic

from edgekd.errors import StageError, shown

# The agent's documents are a few hundred kilobytes and 6 levels deep; what is more did not come from the agent.
LIMIT_BYTES = 16 << 20
LIMIT_DEPTH = 16
ANSWERS = "run it again, and see whether anything else answers there in the place of edgekd's agent"


def printable(text: str) -> str:
    """A text that somebody else wrote, without what moves a terminal's cursor."""
    return "".join(character for character in text if character.isprintable())


Text = Annotated[str, pydantic.AfterValidator(printable)]
Count = Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]


class Document(pydantic.BaseModel):
    """What a document must hold. What else there is in it is left out."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def parsed(text: str, source: str, *, limit: int = LIMIT_BYTES, fix: str = ANSWERS) -> dict[str, Any]:
    """The JSON object in a text. Raises StageError when it is too large, too deep or no JSON object."""
    try:
        if len(text) > limit:
            raise ValueError(f"{len(text)} characters, at most {limit} allowed")
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError(f"a JSON {type(document).__name__}, not an object")
        if _depth(document) > LIMIT_DEPTH:
            raise ValueError(f"more than {LIMIT_DEPTH} levels deep")
        return document
    except (ValueError, RecursionError) as error:
        raise _foreign(source, str(error), "expected: a JSON object", fix) from error


def fitting(document: Any, kind: type[Document], source: str) -> dict[str, Any]:
    """What `kind` asks for, out of a document that was parsed. Raises StageError where something is of another type."""
    try:
        return kind.model_validate(document).model_dump(exclude_unset=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        if first["type"] == "missing":
            raise _foreign(source, f"{where} is missing", "expected: all that it writes", ANSWERS) from None
        expected = first["msg"].removeprefix("Input ")
        raise _foreign(source, f"{where} = {shown(first['input'])}", f"expected: it {expected}", ANSWERS) from None


def _foreign(source: str, why: str, allowed: str, fix: str) -> StageError:
    return StageError(f"{source}: not what the agent writes: {why}", allowed=allowed, fix=fix)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)
