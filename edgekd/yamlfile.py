"""YAML as recipes and targets are written in: plain data, and the place where each key was given.

Scalars are read by the core schema of YAML 1.2, as editors do: `1e-3` is a number, and `no`, `1:30` and
`2020-01-01` are text, which YAML 1.1 would make a boolean, 90 and a date.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from edgekd.errors import EdgekdError, RecipeError, shown

# Aliases of aliases grow without limit, and PyYAML recurses: what a person writes stays far below these.
MAX_DEPTH = 20
MAX_VALUES = 20_000

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
# What no name, path or number contains, and what the operating system refuses in a path.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass
class Origin:
    """Where the keys of a file were given: their lines, and those that the command line set."""

    name: str
    lines: dict[str, int] = field(default_factory=dict)
    overridden: set[str] = field(default_factory=set)

    def override(self, key: str) -> None:
        """`key` was set on the command line, with everything in it."""
        self.lines = {known: line for known, line in self.lines.items() if not f"{known}.".startswith(f"{key}.")}
        self.overridden.add(key)

    def of(self, key: str) -> str:
        """The start of an error about `key`. A key that is missing belongs to the section that lacks it."""
        while key:
            if key in self.overridden:
                return "--set: "
            if key in self.lines:
                return f"{self.name}:{self.lines[key]}: "
            if any(other.startswith(f"{key}.") for other in self.overridden):
                return "--set: "
            key = key.rpartition(".")[0]
        return f"{self.name}: "

    def locate(self, error: EdgekdError) -> None:
        """Say in the error where its key was given."""
        error.position = error.position or self.of(error.key)


def mapping_from_yaml(text: str, name: str) -> tuple[dict[str, Any], Origin]:
    """The content of a file, and where its keys are. Raises RecipeError, with `name` and the line at fault."""
    origin = Origin(name)
    content = _read(text, origin)
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds {shown(content)}"
        raise RecipeError(
            f"{name} {found}",
            allowed="expected: keys with values, such as `seed: 0`",
            fix="see how a recipe looks: edgekd init",
        )
    return content, origin


def value_from_yaml(text: str, name: str) -> Any:
    """One value, as it stands behind a colon. Raises RecipeError."""
    return _read(text, Origin(name))


def _read(text: str, origin: Origin) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Plain(loader, origin).value(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "this is not YAML"
        raise _refused(f"{origin.name}{line}: {problem}") from None
    except RecursionError:
        raise _refused(f"{origin.name}: nested too deeply") from None


def _refused(what: str) -> RecipeError:
    plain = "expected: YAML of text, numbers, true, false, null, lists, and mappings with text as keys"
    return RecipeError(what, allowed=plain, fix="correct the YAML; text in quotes is always text")


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the core schema's idea of what a scalar is."""


_Loader.yaml_implicit_resolvers = {  # None: whatever the first character is
    None: [(_TAG + kind, re.compile(rf"^(?:{pattern})$")) for kind, pattern in _SCALARS.items()]
}


class _Plain:
    """Turns YAML nodes into plain data of which no two places share a part, and notes the lines of the keys."""

    def __init__(self, loader: _Loader, origin: Origin) -> None:
        self.loader, self.origin, self.values = loader, origin, 0

    def value(self, node: yaml.Node, key: str = "", depth: int = 0) -> Any:
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise self._refuse(node, "nested too deeply" if depth > MAX_DEPTH else "too many values")
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._at(item, f"{key}.{index}", item, depth) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in ("null", "bool", "int", "float", "str"):
            return self._scalar(node)
        raise self._refuse(node, f"the tag {shown(node.tag)} is not allowed")

    def _mapping(self, node: yaml.MappingNode, prefix: str, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(part, yaml.MappingNode):
                        raise self._refuse(part, "<< takes a mapping, or a list of mappings")
                    merged = {**self.value(part, "<<", depth + 1), **merged}
                continue
            name = self._scalar(key_node) if key_node.tag == f"{_TAG}str" else None
            if not isinstance(name, str) or not name.isprintable():
                raise self._refuse(key_node, "a key is not printable text")
            key = f"{prefix}.{name}" if prefix else name
            if name in own:
                raise self._refuse(key_node, f"{key} is given twice, first on line {self.origin.lines[key]}")
            own[name] = self._at(value_node, key, key_node, depth)
        return {**merged, **own}

    def _at(self, node: yaml.Node, key: str, start: yaml.Node, depth: int) -> Any:
        self.origin.lines[key] = start.start_mark.line + 1
        return self.value(node, key, depth + 1)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError) as error:  # `!!int x`, or more digits than Python reads
            raise self._refuse(node, f"{shown(node.value)} is not {node.tag.removeprefix(_TAG)}") from error
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            raise self._refuse(node, f"{shown(value)} holds a control character")
        return value

    def _refuse(self, node: yaml.Node, problem: str) -> RecipeError:
        return _refused(f"{self.origin.name}:{node.start_mark.line + 1}: {problem}")
