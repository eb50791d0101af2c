"""The recipe: what to make. YAML in, a checked and complete `Recipe` out, with errors that name the line.

A section names one registered thing (`method: kd`) and holds that thing's options beside its own keys. Where a thing
stands inside a section it is written `lma` or, with options, `{lma: {k: 4}}` (a `Choice`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import yaml
from pydantic import Field

from edgekd import registry
from edgekd.errors import RecipeError, unknown

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parent / "recipes"
DEFAULT_FILE = Path("edgekd.yaml")

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(pydantic.BaseModel):
    """A part of the recipe: unknown keys are errors, values are immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Named(Section):
    """A section that names a registered thing: keys that are not its own are that thing's options."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The named thing's options, complete once the recipe is loaded."""
        return dict(self.model_extra or {})


class Choice(NamedTuple):
    """A registered thing named inside a section, with its options."""

    name: str
    options: dict[str, Any]


def choice_from_yaml(value: str | dict[str, Any]) -> Choice:
    """Read `name` or `{name: {option: value}}`; the recipe's check has made sure that it is one of the two."""
    if isinstance(value, str):
        return Choice(value, {})
    ((name, options),) = value.items()
    return Choice(name, dict(options or {}))


class Augment(Section):
    """Random changes to training images, drawn anew for every sample and epoch."""

    crop: Annotated[int, Field(ge=0)] = Field(0, description="pad by this many pixels, then crop back at random")
    flip: bool = Field(False, description="mirror left and right, half of the time")
    seed: int = Field(0, description="the augmentation is a pure function of this seed, the epoch and the sample")


class Normalize(Section):
    """What is subtracted and divided by, per channel, on the 0 to 1 scale."""

    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]


class Data(Named):
    """The images to learn from and to be measured on."""

    source: str = Field(description="the format, see: edgekd list datasets")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of train kept for every choice")
    train_limit: Positive | None = Field(None, description="use at most this many training images")
    test_limit: Positive | None = Field(None, description="use at most this many test images")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the validation split and the limits")
    normalize: Normalize | None = Field(None, description="null measures mean and std on train")
    augment: Augment = Augment()


class Train(Section):
    """How a network is trained. Everything is counted in epochs; validation accuracy makes every choice."""

    epochs: Positive = 30
    batch_size: Positive = Field(128, description="samples a step and process")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["constant", "step", "cosine", "plateau"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="epochs in which lr rises linearly from 0")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.5, 0.75], description="step: where lr falls, as shares of the epochs"
    )
    gamma: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="step and plateau: the factor by which lr falls")
    patience: Positive = Field(10, description="plateau: epochs without a gain of 0.1 points before lr falls")
    ema: Fraction = Field(0.0, description="decay of a moving average of the weights; 0 is off")
    keep: Literal["best", "last"] = Field("best", description="which epoch's weights are kept, by validation accuracy")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 is autocast; weights stay fp32")
    accumulate: Positive = Field(1, description="batches whose gradients are added up to one step")
    clip: Annotated[float, Field(gt=0)] | None = Field(None, description="limit of the gradient's norm")
    channels_last: bool = False
    compile: bool = Field(False, description="torch.compile the network")
    tensorboard: bool = Field(False, description="write TensorBoard event files (needs the extra of that name)")


class Network(Named):
    """A network and how it is trained."""

    network: str = Field(description="see: edgekd list networks; or timm:NAME, torchvision:NAME, module:callable")
    activation: str | dict[str, dict[str, Any]] = Field("relu", description="see: edgekd list activations")


class Teacher(Network):
    """The teacher: trained here, or loaded from a checkpoint."""

    checkpoint: Path | None = Field(None, description="a safetensors file or a torch state dict")
    train: Train = Train()


class Student(Network):
    """The network that will run on the board. It is trained by the distill section."""


class Distill(Named):
    """How the student learns from the teacher."""

    method: str = Field("kd", description="see: edgekd list methods")
    scratch: bool = Field(True, description="also train the student without the teacher, as a baseline")
    cache_teacher: bool = Field(
        False, description="keep the teacher's logits on disk, by sample and augmentation: pays when students share a teacher"
    )
    train: Train = Train()


class Export(Section):
    """From torch to ONNX."""

    opset: Annotated[int, Field(ge=18, le=23)] | None = Field(None, description="null: the target's")
    batch: Literal["static", "dynamic"] = "dynamic"
    form: str = Field("auto", description="the ONNX form of multi-segment activations; auto: the backend's favourite")
    tolerance: Annotated[float, Field(gt=0)] = Field(1e-3, description="largest allowed difference of a logit")


class Benchmark(Section):
    """How long and how to measure on the device."""

    mode: Literal["single_stream"] = "single_stream"
    seconds: Annotated[float, Field(gt=0)] = Field(10.0, description="measuring time, both models together")
    accuracy_samples: Positive | None = Field(None, description="test images for accuracy on the device; null: all")


class Budgets(Section):
    """What the result must reach; a budget that is missed ends the run with exit code 5. null is no budget."""

    accuracy_drop: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="largest loss of accuracy against the teacher, 0.01 is one point"
    )
    p99_ms: Annotated[float, Field(gt=0)] | None = Field(None, description="largest 99th percentile of the latency")
    size_bytes: Positive | None = Field(None, description="largest size of the student's file")
    speedup: Annotated[float, Field(gt=0)] | None = Field(None, description="smallest speed-up over the teacher")


class Recipe(Section):
    """What to make: data, teacher, student, how to distill, export and measure, and what must be reached."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data
    teacher: Teacher
    student: Student
    distill: Distill = Distill()
    export: Export = Export()
    benchmark: Benchmark = Benchmark()
    budgets: Budgets = Budgets()


# Which key of a section names its thing, and of which kind that is.
NAMED = {"data": ("source", "dataset"), "teacher": ("network", "network"), "student": ("network", "network"),
         "distill": ("method", "method")}  # fmt: skip
CHOICES = {("teacher", "activation"): "activation", ("student", "activation"): "activation"}


def load(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a file, or by the name of a shipped one; None is ./edgekd.yaml.

    `overrides` are `key=value` lines that win over the file. Raises RecipeError, with file and line where there is one.
    """
    file = find(source)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}", fix="name a readable UTF-8 file, or see: edgekd list recipes") from error
    return parse(text, name=str(file), overrides=overrides)


def find(source: str | Path | None) -> Path:
    """The file of a recipe. Raises RecipeError when there is none."""
    if source is None:
        if DEFAULT_FILE.exists():
            return DEFAULT_FILE
        raise RecipeError("there is no ./edgekd.yaml here", fix="write one with: edgekd init, or name one: edgekd run digits")
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"the recipe {path} does not exist", fix="see: edgekd list recipes, or write one: edgekd init")
        return path
    if str(source) not in shipped():
        raise unknown("recipe", source, shipped(), noun="recipe", fix="see: edgekd list recipes, or name a .yaml file")
    return SHIPPED / f"{source}.yaml"


def shipped() -> list[str]:
    """The names of the recipes that come with edgekd."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def parse(text: str, *, name: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """Check a recipe's text. Raises RecipeError with `name` and the line at fault."""
    raw, lines = _yaml(text, name)
    for override in overrides:
        lines.pop(_override(raw, override), None)
    try:
        return _checked(raw)
    except RecipeError as error:
        key = error.key
        while key and key not in lines:  # a missing key is reported at the line of the section that lacks it
            key = key.rpartition(".")[0]
        error.position = f"{name}:{lines[key]}: " if key else f"{name}: "
        raise


def json_schema() -> dict[str, Any]:
    """The recipe as a JSON Schema for editors, with the options of everything that is installed."""
    schema = Recipe.model_json_schema()
    for section, (key, kind) in NAMED.items():
        definition = schema["$defs"][section.capitalize()]
        definition["additionalProperties"] = True
        own = set(definition["properties"])
        if kind != "network":
            definition["properties"][key]["enum"] = registry.names(kind)
        definition["allOf"] = [
            {
                "if": {"properties": {key: {"const": entry.name}}, "required": [key]},
                "then": {
                    "properties": {**dict.fromkeys(own, True), **entry.model.model_json_schema().get("properties", {})},
                    "additionalProperties": False,
                },
            }
            for entry in registry.entries(kind)
        ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "edgekd recipe", **schema}


def _checked(raw: dict[str, Any]) -> Recipe:
    version = raw.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RecipeError(
            f"schema_version = {version} is newer than this edgekd",
            allowed=f"this edgekd reads schema_version {SCHEMA_VERSION}",
            fix="upgrade edgekd: pip install -U edgekd",
            key="schema_version",
        )
    try:
        recipe = Recipe.model_validate(raw)
    except pydantic.ValidationError as error:
        raise _recipe_error(error) from None
    return _completed(recipe)


def _completed(recipe: Recipe) -> Recipe:
    """Fill in and check the options of every registered thing that the recipe names."""
    update: dict[str, Any] = {}
    for section, (key, kind) in NAMED.items():
        part: Named = getattr(recipe, section)
        name = getattr(part, key)
        if kind == "network" and ":" in name:
            continue  # the user's own callable: its options are its own affair
        options = registry.entry(kind, name, f"{section}.{key}").validate(part.options, section)
        update[section] = part.model_copy(update=options)
    for (section, key), kind in CHOICES.items():
        part = update.get(section, getattr(recipe, section))
        where = f"{section}.{key}"
        value = getattr(part, key)
        if isinstance(value, dict) and len(value) != 1:
            raise RecipeError(f"{where} must name one {kind}", allowed="NAME, or {NAME: {option: value}}", key=where)
        name, options = choice_from_yaml(value)
        checked = registry.entry(kind, name, where).validate(options, f"{where}.{name}")
        update[section] = part.model_copy(update={key: {name: checked}})
    return recipe.model_copy(update=update)


def _recipe_error(error: pydantic.ValidationError) -> RecipeError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    section, _, last = key.rpartition(".")
    if first["type"] == "extra_forbidden":
        known = _fields(first["loc"][:-1])
        found = unknown(section or "recipe", last, known, noun="key", fix="correct the key, or see: edgekd schema")
        found.key = key
        return found
    if first["type"] == "missing":
        return RecipeError(f"{key} is missing", allowed=_expected(first["loc"]), fix=f"add {key}, or see: edgekd init", key=key)
    return RecipeError(
        f"{key} = {first['input']!r} is not valid" if key else "the recipe is not a mapping of keys to values",
        allowed=f"{_expected(first['loc'])}   ({first['msg']})",
        fix="correct the value, or see: edgekd schema",
        key=key,
    )


def _section(location: tuple[int | str, ...]) -> type[pydantic.BaseModel]:
    section: type[pydantic.BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)):
            break
        section = field.annotation
    return section


def _fields(location: tuple[int | str, ...]) -> list[str]:
    return list(_section(location).model_fields)


def _expected(location: tuple[int | str, ...]) -> str:
    for end in range(len(location), 0, -1):
        field = _section(location[: end - 1]).model_fields.get(str(location[end - 1]))
        if field is not None:
            description = f": {field.description}" if field.description else ""
            return f"expected {registry.typename(field.annotation)}{description}"
    return "expected another value"


def _yaml(text: str, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Plain data, and the line of every dotted key."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[str, int] = {}
        if node is not None:
            _lines(node, "", lines, name)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"{name}{line}: {problem}", allowed="a recipe is a YAML mapping", fix="correct the YAML") from None
    except (ValueError, RecursionError, TypeError) as error:  # what PyYAML lets through: impossible dates, deep nesting
        raise RecipeError(f"{name}: {error}", allowed="a recipe is a YAML mapping", fix="correct the YAML") from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values", fix="see: edgekd init")
    return raw, lines


def _lines(node: yaml.Node, prefix: str, lines: dict[str, int], name: str, depth: int = 0) -> None:
    if depth > 20 or len(lines) > 10_000:  # aliases of aliases grow without limit
        raise RecipeError(f"{name}:{node.start_mark.line + 1}: nested too deeply", fix="a recipe has at most five levels")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{getattr(key, 'value', '')}"
            line = key.start_mark.line + 1
            if dotted in lines:
                raise RecipeError(f"{name}:{line}: {dotted} is given twice", fix=f"keep one; the first is on line {lines[dotted]}")
            lines[dotted] = line
            _lines(value, f"{dotted}.", lines, name, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{prefix}{index}"] = value.start_mark.line + 1


def _override(raw: dict[str, Any], override: str) -> str:
    """Apply one `a.b=value` to the raw recipe, and return its key.

    Naming another thing (`distill.method=dkd`) drops the options of the old one: they meant something there only.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override} is not key=value", fix="for example: --set distill.temperature=4")
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"--set {override}: the value is not YAML", fix="quote it for your shell") from error
    at: Any = raw
    for part in parts[:-1]:
        inner = at.get(part)
        if isinstance(inner, str):  # activation: lma, and now activation.lma.k=4
            inner = {inner: {}}
        at[part] = inner = {} if inner is None else inner
        if not isinstance(inner, Mapping):
            raise RecipeError(f"--set {key}: {part} has no keys in it", fix=f"set the whole of {part}")
        at = inner
    section, last = parts[0], parts[-1]
    if len(parts) == 2 and section in NAMED and NAMED[section][0] == last and at.get(last) != value:
        own = _section((section,)).model_fields
        for stale in [option for option in at if option not in own]:
            del at[stale]
    at[last] = value
    return key
