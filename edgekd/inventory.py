"""The user's boards: `devices.yaml` names them, so that one can say `--device desk-pi` or `--device tag:lab`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from edgekd.errors import RecipeError, unknown
from edgekd.recipe import Section, checked, read_text
from edgekd.yamlfile import mapping_from_yaml

FILE = Path("devices.yaml")
TAG, ALL = "tag:", "all"
_FIX = "see docs/boards.md: Several boards"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Listed(Section):
    """One device of the inventory."""

    url: str = Field(description="as in --device: ssh://[USER@]HOST[:PORT][?OPTION=VALUE]")
    target: str | None = Field(None, description="where it is measured as: a target's name or file")
    tags: list[Name] = Field([], description="for --device tag:TAG")


class Inventory(Section):
    """All of `devices.yaml`."""

    devices: dict[Name, Listed]


@dataclass(frozen=True)
class Place:
    """A device that a command line means: its name in reports, and the target that the inventory gives it."""

    name: str
    url: str
    target: str | None = None


def listed() -> dict[str, Listed]:
    """The devices of ./devices.yaml by name; none where there is no such file. Raises RecipeError, with its line."""
    if not FILE.exists():
        return {}
    content, origin = mapping_from_yaml(read_text(FILE, "the inventory", _FIX), str(FILE))
    try:
        return checked(Inventory, content, fix=_FIX).devices
    except RecipeError as error:
        origin.locate(error)
        raise


def places(given: Sequence[str], *, repeated: bool = False) -> list[Place]:
    """The devices that the values of --device mean: URLs, names, `tag:TAG` and `all` of the inventory.

    Each once, or `repeated` as often as it is meant.

    Raises RecipeError for what is not there.
    """
    found = [place for text in given for place in _meant(text)]
    if not repeated:
        once: dict[tuple[str, str | None], Place] = {}
        for place in found:
            once.setdefault((place.url, place.target), place)
        found = list(once.values())
    names = [place.name for place in found]
    return [
        place if names.count(place.name) == 1 else Place(f"{place.name}-{number}", place.url, place.target)
        for number, place in enumerate(found, start=1)
    ]


def _meant(text: str) -> list[Place]:
    if ":" in text and not text.startswith(TAG):
        return [Place(_name_from_url(text), text)]
    known = {name: Place(name, one.url, one.target) for name, one in listed().items()}
    tags = sorted({TAG + tag for one in listed().values() for tag in one.tags})
    if text in known:
        return [known[text]]
    tagged = [known[name] for name, one in listed().items() if text == ALL or text.removeprefix(TAG) in one.tags]
    if (text == ALL or text.startswith(TAG)) and tagged:
        return tagged
    fix = f"give a URL, as in ssh://pi@raspberrypi.local, or name it in ./{FILE}"
    raise unknown("--device", text, [*known, *tags, *([ALL] if known else [])], noun="device", fix=fix)


def _name_from_url(url: str) -> str:
    """`pi-desk-local` of ssh://pi@desk.local:22?python=...: fit for a file's name."""
    address = url.partition("?")[0]
    address = address.partition("://")[2] or address
    return re.sub(r"[^A-Za-z0-9]+", "-", address).strip("-")
