"""Names to callables: data sets, networks, activations, methods, backends, transports.

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
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from edgekd.errors import EdgekdError, MissingError, RecipeError, unknown

T = typing.TypeVar("T", bound=Callable[..., Any])
KINDS = ("dataset", "network", "activation", "method", "backend", "transport")
GROUP = "edgekd"
# What an option's annotation may be made of; it is evaluated in this namespace and no other.
_TYPES: dict[str, Any] = {
    "Literal": typing.Literal, "Path": Path,
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
        """Import the thing. Raises MissingError when a package that it needs is not installed."""
        try:
            thing: Callable[..., Any] = getattr(importlib.import_module(self.module), self.attribute)
            return thing
        except ModuleNotFoundError as error:
            raise MissingError(
                f'{self.kind} "{self.name}" needs the Python package {error.name!r}, which is not installed',
                fix="pip install 'edgekd[train]'",
            ) from error

    def validate(self, options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Check and complete `options`. Raises RecipeError that names the option as `where`.option."""
        where = where or self.name
        for key in options:
            if key not in self.options:
                fix = f"see: edgekd list {self.kind}s"
                error = unknown(where, key, self.options, noun=f"option of {self.kind} {self.name!r}", fix=fix)
                error.key = f"{where}.{key}"
                raise error
        try:
            return self.model(**options).model_dump()
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            option = ".".join(str(part) for part in first["loc"])
            kind = self.options[str(first["loc"][0])].annotation
            key = f"{where}.{option}"
            missing = first["type"] == "missing"
            raise RecipeError(
                f"{key} is required by {self.kind} {self.name!r}" if missing else f"{key} = {first['input']!r} is not valid",
                allowed=f"expected: {typename(kind)}" + ("" if missing else f"   ({first['msg']})"),
                fix=f"--set {key}=..., or see: edgekd list {self.kind}s",
                key=key,
            ) from None

    @functools.cached_property
    def model(self) -> type[pydantic.BaseModel]:
        """The options as a pydantic model, strict about unknown keys."""
        fields: Any = {o.name: (o.annotation, o.default) for o in self.options.values()}
        config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
        return pydantic.create_model(self.name, __config__=config, __doc__=self.doc, **fields)


def typename(annotation: Any) -> str:
    """An annotation as a user would write it: `int`, `"sgd" | "adamw"`."""
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(annotation))
    return getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_table()[kind])


def entries(kind: str) -> list[Entry]:
    return [_table()[kind][name] for name in names(kind)]


def entry(kind: str, name: str, where: str = "") -> Entry:
    """Look a name up. Raises RecipeError with the known names and the closest one."""
    try:
        return _table()[kind][name]
    except KeyError:
        raise unknown(where or kind, name, _table()[kind], noun=kind, fix=f"see: edgekd list {kind}s") from None


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
        raise EdgekdError(f"the entry point {package!r} in the group {GROUP!r} names no package", fix=f"pip uninstall {package}")
    roots = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files: list[tuple[Path, Path | None]] = [(file, root) for root in roots for file in sorted(root.rglob("*.py"))]
    files = files or [(Path(spec.origin), None)]
    for file, root in files:
        text = file.read_text(encoding="utf-8")
        if "@register(" not in text:
            continue
        parts = file.relative_to(root).with_suffix("").parts if root else ()
        module = ".".join((package, *(part for part in parts if part != "__init__")))
        for node in ast.parse(text, str(file)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield from _entries_of(node, module, file)


def _entries_of(node: ast.FunctionDef | ast.ClassDef, module: str, file: Path) -> Iterator[Entry]:
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "register":
            kind, name = ([ast.literal_eval(argument) for argument in mark.args] + [""])[:2]
            doc = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
            source = f"{file}:{node.lineno}"
            yield Entry(kind, name or node.name, module, node.name, doc, _options(node, source), source)


def _options(node: ast.FunctionDef | ast.ClassDef, source: str) -> dict[str, Option]:
    if isinstance(node, ast.ClassDef):
        inits = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
        if not inits:
            return {}
        node = inits[0]
    options = {}
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.annotation is None:
            raise EdgekdError(f"{source}: option {argument.arg!r} has no annotation")
        annotation = eval(ast.unparse(argument.annotation), {"__builtins__": {}}, _TYPES)
        value = ... if default is None else ast.literal_eval(default)
        options[argument.arg] = Option(argument.arg, annotation, value)
    return options
