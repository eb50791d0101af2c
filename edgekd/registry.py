"""Names to callables: tasks, data sets, corruptions, networks, activations, methods, quantizers, backends, ...

A registered thing is a function or class under `@register(kind)`. Its positional parameters are what edgekd gives it;
its keyword-only parameters are the user's options, and their annotations and defaults are the only list of options
there is: validation, `edgekd list`, the JSON Schema, the manifest and the tests all read them.

They are read from the source, without importing it. So `edgekd list` and the check of a recipe work on an install
without torch, take milliseconds, and cannot be broken by a plugin that does not import.

Packages come in by an entry point in the group `edgekd` that names a package; edgekd's own things use the same door.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from edgekd import schedule
from edgekd.errors import EdgekdError, MissingError, RecipeError, shown, unknown, unknown_key

T = typing.TypeVar("T", bound=Callable[..., Any])
KINDS = (
    "task", "dataset", "corruption", "network", "activation", "method", "quantizer", "backend", "transport", "mode",
)  # fmt: skip
GROUP = "edgekd"
Location = tuple[int | str, ...]  # of a value in nested data: keys and indices


def _completed_method(value: Any) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
    elif isinstance(value, str):
        name, options = value, {}
    else:
        raise ValueError("NAME, or {NAME: {option: value}}")
    where = "distill.methods"
    return {name: entry("method", name, where).validate(options or {}, f"{where}.{name}")}


# A method as an option of another one, `kd` or `{kd: {temperature: 2}}`: checked and completed to the second form.
MethodChoice = typing.Annotated[
    dict[str, dict[str, Any]],
    pydantic.BeforeValidator(_completed_method),
    pydantic.WithJsonSchema({"type": ["string", "object"], "maxProperties": 1}),
]


def _completed_network(value: Any) -> Any:
    section = {"network": value} if isinstance(value, str) else value
    if not isinstance(section, dict) or not isinstance(section.get("network"), str):
        raise ValueError("NAME, or {network: NAME, option: value}")
    own = {"network": section["network"], "activation": "relu", "checkpoint": None}
    own |= {key: section[key] for key in own if section.get(key) is not None}
    options = {key: value for key, value in section.items() if key not in own}
    if ":" not in own["network"]:  # of somebody else's network, the options are its own affair
        options = entry("network", own["network"]).validate(options, f"network {own['network']}", also=own)
    if not isinstance(own["checkpoint"], str | None):
        raise ValueError("checkpoint is the path of a file")
    activation = {own["activation"]: {}} if isinstance(own["activation"], str) else own["activation"]
    if not isinstance(activation, dict) or len(activation) != 1:
        raise ValueError("activation is NAME, or {NAME: {option: value}}")
    ((name, chosen),) = activation.items()
    own["activation"] = {name: entry("activation", name).validate(chosen or {}, f"activation.{name}")}
    own["checkpoint"] = None if own["checkpoint"] is None else Path(own["checkpoint"])
    return own | options


# A network as an option of another thing, written like the recipe's teacher: checked and completed, with
# `activation` and `checkpoint`.
NetworkChoice = typing.Annotated[
    dict[str, Any],
    pydantic.BeforeValidator(_completed_network),
    pydantic.WithJsonSchema({"type": ["string", "object"]}),
]
# What an option's annotation may be made of; it is evaluated in this namespace and no other.
_TYPES: dict[str, Any] = {
    "Literal": typing.Literal, "Path": Path, "Schedule": schedule.Schedule, "MethodChoice": MethodChoice,
    "NetworkChoice": NetworkChoice,
    **{t.__name__: t for t in (bool, int, float, str, list, tuple, dict)},
}  # fmt: skip


def register(kind: str, name: str = "") -> Callable[[T], T]:
    """Mark a function or class as a thing of `kind`. The mark is read from the source: at run time it does nothing."""
    del kind, name
    return lambda thing: thing


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a registered thing."""

    name: str
    annotation: Any
    default: Any = ...

    @property
    def required(self) -> bool:
        """Whether the user must give it."""
        return self.default is ...


@dataclass(frozen=True)
class Entry:
    """A registered thing, known without importing it."""

    kind: str
    name: str
    module: str
    attribute: str
    doc: str
    options: Mapping[str, Option]
    source: str

    def load(self) -> Callable[..., Any]:
        """Import the thing. Raises MissingError when a package that it needs is not installed, or does not import."""
        try:
            thing: Callable[..., Any] = getattr(importlib.import_module(self.module), self.attribute)
            return thing
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            raise MissingError(
                f'{self.kind} "{self.name}" cannot be imported: {str(error).splitlines()[0]}',
                allowed=f"it needs the Python package {error.name!r}"
                if missing
                else "a package that it needs is broken",
                fix="pip install 'edgekd[train]', and see: edgekd doctor",
            ) from error

    def validate(self, options: Mapping[str, Any], where: str = "", also: Iterable[str] = ()) -> dict[str, Any]:
        """Check and complete `options`. Raises RecipeError that names the option as `where`.option.

        also: keys that may stand beside the options, to be proposed when one of them is misspelt.
        """
        where, see = where or self.name, f"see: edgekd list {self.kind}s"
        for key in options:
            if key not in self.options:
                raise unknown_key(where, key, [*self.options, *also], of=f"{self.kind} {self.name}", fix=see)
        try:
            return self.model.model_validate_json(json.dumps(options, default=str)).model_dump()
        except pydantic.ValidationError as error:
            raise invalid(error, options, self._expected, where, fix=see) from None

    def _expected(self, location: Location) -> str:
        return typename(self.options[str(location[0])].annotation)

    @functools.cached_property
    def model(self) -> type[pydantic.BaseModel]:
        """The options as a pydantic model, strict about unknown keys."""
        fields: Any = {o.name: (o.annotation, o.default) for o in self.options.values()}
        config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
        return pydantic.create_model(self.name, __config__=config, __doc__=self.doc, **fields)


def typename(annotation: Any) -> str:
    """An annotation as a user would write it: `int`, `"sgd" | "adamw"`, `list of float`, `schedule`, `null`."""
    for kind, name in ((schedule.Schedule, "schedule"), (MethodChoice, "method"), (NetworkChoice, "network")):
        if annotation == kind:
            return name
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(shown(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(typename(one) for one in inner)
    if origin is typing.Annotated:
        return typename(inner[0])
    if origin in (list, tuple):
        return f"list of {typename(inner[0])}"
    if annotation is types.NoneType:
        return "null"
    if (origin or annotation) is dict or issubclass(annotation, pydantic.BaseModel):
        return "mapping"
    return str(annotation.__name__).lower()


def invalid(
    error: pydantic.ValidationError, content: Any, expected: Callable[[Location], str], where: str = "", *, fix: str
) -> RecipeError:
    """The first of pydantic's complaints about `content`, which stands at the key `where`.

    expected: what belongs at a place in `content`, in words.
    """
    problems = error.errors()
    first = next((one for one in problems if one["type"] == schedule.PROBLEM), problems[0])
    location = _location(first, content)
    key = ".".join([where, *map(str, location)] if where else map(str, location))
    if first["type"] == "missing":
        return RecipeError(
            f"{key} is missing", allowed=f"expected: {expected(location)}", fix=f"add {key}, or {fix}", key=key
        )
    reason = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return RecipeError(
        f"{key} = {shown(first['input'])} is not valid",
        allowed=f"expected: {expected(location)}   ({reason})",
        fix=f"correct {key}, or {fix}",
        key=key,
    )


def _location(problem: Any, content: Any) -> Location:
    """Where in `content` a problem of pydantic's is: its path without the branches of unions that pydantic puts in."""
    path: list[int | str] = []
    for part in problem["loc"]:
        if (isinstance(content, Mapping) and part in content) or (isinstance(content, list) and isinstance(part, int)):
            path.append(part)
            content = content[part]
    if problem["type"] == "missing":
        path.append(problem["loc"][-1])
    return tuple(path)


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_table()[kind])


def entries(kind: str) -> list[Entry]:
    """The registered things of a kind, sorted by name."""
    return [_table()[kind][name] for name in names(kind)]


def entry(kind: str, name: str, where: str = "") -> Entry:
    """Look a name up. Raises RecipeError with the known names and the closest one."""
    try:
        return _table()[kind][name]
    except KeyError:
        raise unknown(where or kind, name, names(kind), noun=kind, fix=f"see: edgekd list {kind}s") from None


def create(kind: str, name: str, *given: Any, options: Mapping[str, Any] | None = None, where: str = "") -> Any:
    """Validate the options, import the thing and call it with what edgekd gives it."""
    found = entry(kind, name, where)
    checked = found.validate(options or {}, where)
    return found.load()(*given, **checked)


@functools.cache
def _table() -> dict[str, dict[str, Entry]]:
    table: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
    packages = {"edgekd", *(point.value for point in importlib.metadata.entry_points(group=GROUP))}
    for package in sorted(packages):
        for found in _scan(package):
            previous = table[found.kind].setdefault(found.name, found)
            if previous is not found:
                raise EdgekdError(
                    f"{found.kind} {found.name!r} is registered twice",
                    allowed=f"{previous.source} and {found.source}",
                    fix="rename one of them, or uninstall the package that it comes from",
                )
    return table


def _scan(package: str) -> Iterator[Entry]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise EdgekdError(
            f"the entry point {package!r} in the group {GROUP!r} names no package",
            allowed="it must name a package that is installed",
            fix=f"pip uninstall {package}, or install it again",
        )
    roots = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files: list[tuple[Path, Path | None]] = [(file, root) for root in roots for file in sorted(root.rglob("*.py"))]
    for file, root in files or [(Path(spec.origin), None)]:
        parts = file.relative_to(root).with_suffix("").parts if root else ()
        module = ".".join((package, *(part for part in parts if part != "__init__")))
        try:
            yield from _entries(file, module)
        except (SyntaxError, ValueError, TypeError, NameError) as error:
            raise EdgekdError(
                f"{file}: what is registered there cannot be read: {error}",
                allowed=f"kinds: {', '.join(KINDS)}; options of {', '.join(_TYPES)} and None, with literal defaults",
                fix=f"correct the file, or uninstall {package}",
            ) from error


def _entries(file: Path, module: str) -> Iterator[Entry]:
    text = file.read_text(encoding="utf-8")
    if "@register(" not in text:
        return
    for node in ast.parse(text, str(file)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "register":
                    kind, name = ([ast.literal_eval(argument) for argument in mark.args] + [node.name])[:2]
                    if kind not in KINDS:
                        raise ValueError(f"line {node.lineno}: {kind!r} is not a kind")
                    doc = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                    yield Entry(kind, name, module, node.name, doc, _options(node), f"{file}:{node.lineno}")


def _options(node: ast.FunctionDef | ast.ClassDef) -> dict[str, Option]:
    if isinstance(node, ast.ClassDef):
        inits = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
        if not inits:
            return {}
        node = inits[0]
    options = {}
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.annotation is None:
            raise ValueError(f"line {argument.lineno}: the option {argument.arg!r} has no annotation")
        annotation = eval(ast.unparse(argument.annotation), {"__builtins__": {}}, _TYPES)
        value = ... if default is None else ast.literal_eval(default)
        options[argument.arg] = Option(argument.arg, annotation, value)
    return options
