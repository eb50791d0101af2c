"""Targets: where the student must run. One YAML file in `targets/` (or the user's own) is one target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from edgekd import registry
from edgekd.errors import RecipeError, unknown
from edgekd.recipe import Choice, Section, checked, checked_choice, choice_from_yaml, read_text
from edgekd.yamlfile import mapping_from_yaml, value_from_yaml

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """`targets/` or `calib/`: beside the package in a checkout, inside it when installed from a wheel."""
    installed = _PACKAGE / "shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


class Board(Section):
    """What is known of a board before it is reached; what is not known is left out. The board's own files win."""

    soc: str = Field(description="the chip, as the board's device tree names it")
    memory_gb: Annotated[list[int], Field(min_length=1)] = Field(description="of the models sold, the largest first")
    jetpack: str | None = None
    l4t: str | None = None
    cuda: str | None = None
    python: Annotated[str | None, Field(pattern=r"^3\.\d+$")] = Field(None, description="that of its operating system")
    compute_capability: Annotated[str | None, Field(pattern=r"^\d+\.\d$")] = None
    multiprocessors: Annotated[int | None, Field(ge=1)] = None
    dla_cores: Annotated[int | None, Field(ge=0)] = Field(None, description="deep learning accelerators beside the GPU")
    power_rails: list[str] = Field([], description="whose sum is the power of the whole module")


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
    board: Board | None = None

    @property
    def choices(self) -> list[Choice]:
        """The backends with their options, the preferred one first."""
        return [choice_from_yaml(backend) for backend in self.backends]


# Names that people use for a board of a family.
ALIASES = {"jetson": "jetson-orin-nano"}


def names() -> list[str]:
    """The shipped targets, without aliases."""
    return sorted(file.stem for file in shipped_folder("targets").glob("*.yaml"))


def load(source: str, backend: str | None = None) -> Target:
    """A shipped target by name or alias, or the user's own by the path of its YAML; with another backend, if one is
    named, see `with_backend`.

    Raises RecipeError, with its line.
    """
    source = ALIASES.get(source, source)
    path, fix = Path(source), "see: edgekd list targets, or name a .yaml file"
    if path.suffix not in (".yaml", ".yml"):
        if source not in names():
            raise unknown("target", source, names(), noun="target", fix=fix)
        path = shipped_folder("targets") / f"{source}.yaml"
    content, origin = mapping_from_yaml(read_text(path, "the target", fix), str(path))
    try:
        target = checked(Target, content, fix="see the shipped targets: edgekd list targets")
        complete = [checked_choice(one, "backend", f"backends.{index}") for index, one in enumerate(target.backends)]
    except RecipeError as error:
        origin.locate(error)
        raise
    target = _on_its_board(target, complete)
    return target if backend is None else with_backend(target, backend)


def with_backend(target: Target, text: str) -> Target:
    """The target with another backend, written as in a target's file; what is not said of it is as the target has it.

    Raises RecipeError for a backend or an option that does not exist.
    """
    own = dict(target.choices)
    backend = value_from_yaml(text, "--backend") if text.startswith("{") else {text: {}}
    backend = {
        name: {**own.get(name, {}), **(options or {})} if isinstance(options or {}, dict) else options
        for name, options in backend.items()
    }
    return _on_its_board(target, [checked_choice(backend, "backend", "--backend")])


def _on_its_board(target: Target, backends: list[dict[str, Any]]) -> Target:
    """The target with these backends; the preferred one says what its options mean on the target's board.

    Raises RecipeError for what the board has not got.
    """
    ((name, options),) = backends[0].items()
    preferred: Any = registry.entry("backend", name).load()  # a subclass of Backend
    return target.model_copy(update={"backends": [{name: preferred.on_board(options, target)}, *backends[1:]]})
