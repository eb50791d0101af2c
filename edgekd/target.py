"""Targets: where the student must run. One YAML file in `targets/` (or the user's own) is one target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import Field

from edgekd import registry
from edgekd.errors import RecipeError, unknown
from edgekd.recipe import Choice, Section, choice_from_yaml

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """`targets/` or `calib/`: beside the package in a checkout, inside it when installed from a wheel."""
    installed = _PACKAGE / "shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


class Target(Section):
    """A place to run: the device, and what compiles for it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str = ""
    device: str = Field("local:", description="URL of the machine; --device wins over it")
    backends: Annotated[list[str | dict[str, dict[str, Any]]], Field(min_length=1)] = Field(
        description="in order of preference: NAME, or {NAME: {option: value}}"
    )
    threads: Annotated[int, Field(ge=1)] = Field(1, description="threads of one inference")
    opset: Annotated[int, Field(ge=18, le=23)] = Field(20, description="the newest ONNX opset that its backends read")

    @property
    def choices(self) -> list[Choice]:
        """The backends with their options, the preferred one first."""
        return [choice_from_yaml(backend) for backend in self.backends]


def names() -> list[str]:
    """The shipped targets."""
    return sorted(file.stem for file in shipped_folder("targets").glob("*.yaml"))


def load(source: str) -> Target:
    """A shipped target by name, or the user's own by the path of its YAML. Raises RecipeError."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if source not in names():
            raise unknown("target", source, names(), noun="target", fix="see: edgekd list targets, or name a .yaml file")
        path = shipped_folder("targets") / f"{source}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"the target {path} cannot be read: {error.strerror}", fix="see: edgekd list targets") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"the target {path} is not YAML: {error}", fix="correct the file") from error
    try:
        target = Target.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{path}: {key or 'the target'}: {first['msg'].lower()}",
            allowed=f"keys: {', '.join(Target.model_fields)}",
            fix="correct the file; the shipped targets are examples: edgekd list targets",
        ) from None
    for index, (name, options) in enumerate(target.choices):
        registry.entry("backend", name, f"{path}: backends.{index}").validate(options, f"{path}: backends.{name}")
    return target
