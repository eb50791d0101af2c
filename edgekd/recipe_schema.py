"""The recipe as a JSON Schema, by which editors complete and check it."""

from __future__ import annotations

from typing import Any

from edgekd import registry
from edgekd.recipe import CHOICES, NAMED, Recipe


def json_schema() -> dict[str, Any]:
    """The recipe as a JSON Schema for editors, with the options of everything that is installed."""
    schema = Recipe.model_json_schema()
    for section, (key, kind) in NAMED.items():
        definition = schema["$defs"][section.capitalize()]
        definition["additionalProperties"] = True
        own = definition["properties"]
        default = own[key].get("default")
        names = {"enum": registry.names(kind)}
        # A network with a colon is somebody else's: its options are its own affair.
        own[key] |= {"anyOf": [names, {"pattern": ":"}]} if kind == "network" else names
        definition["allOf"] = [
            {
                "if": {"properties": {key: {"const": entry.name}}, "required": [key] if entry.name != default else []},
                "then": _options_schema(entry, dict.fromkeys(own, True)),
            }
            for entry in registry.entries(kind)
        ]
    for (section, key), kind in CHOICES.items():
        one = {
            "type": "object",
            "properties": {entry.name: _options_schema(entry, {}) for entry in registry.entries(kind)},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        }
        own = schema["$defs"][section.capitalize()]["properties"][key]
        nothing = [{"type": "null"}] if own.get("default", "") is None else []
        own |= {"anyOf": [{"enum": registry.names(kind)}, one, *nothing]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "edgekd recipe"}


def _options_schema(entry: registry.Entry, beside: dict[str, Any]) -> dict[str, Any]:
    """The options of a registered thing, and the keys that stand beside them."""
    schema = entry.model.model_json_schema()
    options = {"properties": {**beside, **schema["properties"]}, "required": schema.get("required", [])}
    return {"type": ["object", "null"], "additionalProperties": False, **options}
