"""The recipe: what to make. YAML in, a checked and complete `Recipe` out, with errors that name the line.

A section names one registered thing (`method: kd`) and holds that thing's options beside its own keys. Where a thing
stands inside a section it is written `lma` or, with options, `{lma: {k: 4}}` (a `Choice`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import pydantic
from pydantic import Field, PrivateAttr

from edgekd import registry
from edgekd.errors import RecipeError, shown, unknown, unknown_key
from edgekd.registry import Location
from edgekd.yamlfile import Origin, mapping_from_yaml, value_from_yaml

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parent / "recipes"
DEFAULT_FILE = Path("edgekd.yaml")

Positive = Annotated[int, Field(ge=1, lt=1 << 31)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(pydantic.BaseModel):
    """A part of the recipe: unknown keys and values of another type are errors, values are immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Named(Section):
    """A section that names a registered thing: keys that are not its own are that thing's options."""

    model_config = pydantic.ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The named thing's options, complete once the recipe is loaded."""
        return dict(self.model_extra or {})


Chosen = str | dict[str, dict[str, Any]]  # a registered thing inside a section, as the recipe has it


class Choice(NamedTuple):
    """A registered thing named inside a section, with its options."""

    name: str
    options: dict[str, Any]


def choice_from_yaml(value: str | dict[str, Any]) -> Choice:
    """Read `name` or `{name: {option: value}}`; `checked_choice` has made sure that it is one of the two."""
    if isinstance(value, str):
        return Choice(value, {})
    ((name, options),) = value.items()
    return Choice(name, dict(options or {}))


class Augment(Section):
    """Random changes to training images, drawn anew for every sample and epoch."""

    crop: Annotated[int, Field(ge=0)] = Field(0, description="pad by this many pixels, then crop back at random")
    flip: bool = Field(False, description="mirror left and right, half of the time")
    seed: Seed = Field(0, description="the augmentation is a pure function of this seed, the epoch and the sample")


class Normalize(Section):
    """What is subtracted and divided by, per channel, on the 0 to 1 scale."""

    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]


class Data(Named):
    """The images to learn from and to be measured on."""

    source: str = Field(description="the format, see: edgekd list datasets")
    task: Chosen | None = Field(
        None, description="NAME or {NAME: {option: value}}, see: edgekd list tasks; null is the source's own"
    )
    target_domain: Chosen | None = Field(
        None, description="NAME or {NAME: {option: value}}: where the student will be used; its images have no labels"
    )
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of train kept for every choice")
    train_limit: Positive | None = Field(None, description="use at most this many training images")
    test_limit: Positive | None = Field(None, description="use at most this many test images")
    seed: Seed = Field(0, description="of the validation split and the limits")
    normalize: Normalize | None = Field(None, description="null measures mean and std on train")
    augment: Augment = Augment()


class Train(Section):
    """How a network is trained. Everything is counted in epochs; the validation score makes every choice."""

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
    gamma: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="step and plateau: lr falls by this factor")
    patience: Positive = Field(10, description="plateau: epochs without a gain of 0.1 points before lr falls")
    ema: Fraction = Field(0.0, description="decay of a moving average of the weights; 0 is off")
    keep: Literal["best", "last"] = Field("best", description="which epoch's weights are kept, by validation score")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 is autocast; weights stay fp32")
    accumulate: Positive = Field(1, description="batches whose gradients are added up to one step")
    clip: Annotated[float, Field(gt=0)] | None = Field(None, description="limit of the gradient's norm")
    channels_last: bool = False
    compile: bool = Field(False, description="torch.compile the network")
    tensorboard: bool = Field(False, description="write TensorBoard event files (needs the extra of that name)")


class Network(Named):
    """A network and how it is trained."""

    network: str = Field(description="see: edgekd list networks; or timm:NAME, torchvision:NAME, module:callable")
    activation: Chosen = Field("relu", description="NAME or {NAME: {option: value}}, see: edgekd list activations")


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
        False,
        description="keep the teacher's logits on disk, by sample and augmentation: pays when students share a teacher",
    )
    train: Train = Train()


class Attack(Section):
    """What the networks must withstand when their accuracy under attack is measured: PGD on the test images."""

    epsilon: Annotated[float, Field(gt=0, le=255)] = Field(8.0, description="largest change of a pixel, of 255")
    step_size: Annotated[float, Field(gt=0, le=255)] = Field(2.0, description="change of a pixel in a step, of 255")
    steps: Positive = Field(20, description="steps along the sign of the gradient, from a random start")


class Corruptions(Section):
    """What test images must be told in spite of: how much of the score is left on corrupted ones."""

    kinds: list[str] = Field([], description="see: edgekd list corruptions; none named is all")
    severities: Annotated[list[Annotated[int, Field(ge=1, le=5)]], Field(min_length=1)] = Field(
        [1, 2, 3, 4, 5], description="from 1, slight, to 5"
    )
    images: Positive | None = Field(None, description="how many test images; null: all")


class Export(Section):
    """From torch to ONNX."""

    opset: Annotated[int, Field(ge=18, le=23)] | None = Field(None, description="null: the target's")
    batch: Literal["static", "dynamic"] = "dynamic"
    form: str = Field("auto", description="the ONNX form of multi-segment activations; auto: the backend's favourite")
    tolerance: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="largest allowed difference of a logit, as a share of the sample's largest"
    )


class Quantize(Named):
    """How the student gets smaller than float32."""

    method: str = Field("none", description="see: edgekd list quantizers")
    calibration: str | None = Field(None, description="a calibration set, by name or file; null draws one from train")
    calibration_images: Positive = Field(512, description="null calibration: how many images, of all classes")
    calibration_seed: Seed = Field(0, description="null calibration: which images")


class Benchmark(Named):
    """How to measure on the device."""

    mode: str = Field("single_stream", description="how the engines are asked, see: edgekd list modes")
    launches: Annotated[int, Field(ge=6)] = Field(9, description="fresh processes, each of which gives a ratio")
    lock_clocks: bool = Field(False, description="fix the device's clocks meanwhile; needs root there")
    end_to_end: bool = Field(False, description="also time the way from stored images to answers, by steps")
    loadgen: bool = Field(False, description="also time both with MLPerf's LoadGen, on this machine")
    accuracy_samples: Positive | None = Field(None, description="test images for accuracy on the device; null: all")


class Budgets(Section):
    """What the result must reach; a budget that is missed ends the run with exit code 5. null is no budget."""

    accuracy_drop: Annotated[float, Field(ge=0)] | None = Field(
        None, description="largest loss against the teacher in the task's metric: 0.01 is one point of a share"
    )
    p99_ms: Annotated[float, Field(gt=0)] | None = Field(None, description="largest 99th percentile of the latency")
    size_bytes: Positive | None = Field(None, description="largest size of the student's file")
    speedup: Annotated[float, Field(gt=0)] | None = Field(None, description="smallest speed-up over the teacher")


class Recipe(Section):
    """What to make: data, teacher, student, how to distill, export, quantize and measure, and what must be reached."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    seed: Seed = 0
    data: Data
    teacher: Teacher | None = Field(None, description="null for methods that learn without one")
    student: Student
    distill: Distill = Distill()
    corruptions: Corruptions | None = Field(
        None, description="{} corrupts the test images in 13 ways; null corrupts nothing"
    )
    attack: Attack | None = Field(None, description="{} is PGD-20 within 8/255; null attacks nothing")
    export: Export = Export()
    quantize: Quantize = Quantize()
    benchmark: Benchmark = Benchmark()
    budgets: Budgets = Budgets()

    _origin: Origin = PrivateAttr(default_factory=lambda: Origin("recipe"))

    @property
    def origin(self) -> Origin:
        """Where its keys were given: an error that names a key can be located long after the recipe was read."""
        return self._origin


# Which key of a section names its thing, and of which kind that is.
NAMED = {"data": ("source", "dataset"), "teacher": ("network", "network"), "student": ("network", "network"),
         "distill": ("method", "method"), "quantize": ("method", "quantizer"),
         "benchmark": ("mode", "mode")}  # fmt: skip
CHOICES = {("data", "task"): "task", ("data", "target_domain"): "dataset", ("teacher", "activation"): "activation",
           ("student", "activation"): "activation"}  # fmt: skip


def load(source: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a file, or by the name of a shipped one; None is ./edgekd.yaml.

    `overrides` are `key=value` lines that win over the file. Raises RecipeError, with file and line where there is one.
    """
    file = find(source)
    text = read_text(file, "the recipe", "name a file that you may read, or see: edgekd list recipes")
    return parse(text, name=str(file), overrides=overrides)


def read_text(file: Path, what: str, fix: str) -> str:
    """The text of a file that the user named. Raises RecipeError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(
            f"{what} {file} cannot be read: {reason}", allowed="expected: a YAML file in UTF-8", fix=fix
        ) from error


def find(source: str | Path | None) -> Path:
    """The file of a recipe. Raises RecipeError when there is none."""
    names = f"a .yaml file, or one of: {', '.join(shipped())}"
    if source is None:
        if DEFAULT_FILE.exists():
            return DEFAULT_FILE
        raise RecipeError(
            f"there is no ./{DEFAULT_FILE} here, and no recipe is named", allowed=names, fix="write one: edgekd init"
        )
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in shipped():
        return SHIPPED / f"{source}.yaml"
    if path.suffix in (".yaml", ".yml") or path.exists():
        what = "is not a file" if path.exists() else "does not exist"
        raise RecipeError(f"the recipe {path} {what}", allowed=names, fix="correct the path, or write one: edgekd init")
    raise unknown("recipe", source, shipped(), noun="recipe", fix="see: edgekd list recipes, or name a .yaml file")


def shipped() -> list[str]:
    """The names of the recipes that come with edgekd."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def parse(text: str, *, name: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """Check a recipe's text. Raises RecipeError with `name` and the line at fault."""
    content, origin = mapping_from_yaml(text, name)
    for override in overrides:
        origin.override(_override(content, override))
    try:
        recipe = _completed(_current(content))
    except RecipeError as error:
        origin.locate(error)
        raise
    recipe._origin = origin
    return recipe


S = TypeVar("S", bound=Section)


def checked(section: type[S], content: dict[str, Any], *, fix: str) -> S:
    """`content` as a `section`. Raises RecipeError that names the key at fault."""
    try:
        return section.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        # A misspelt key is often missing under its right name too: it says more.
        for extra in (one for one in error.errors() if one["type"] == "extra_forbidden"):
            *outer, key = map(str, extra["loc"])
            raise unknown_key(".".join(outer), key, _at(section, tuple(outer)).model_fields, fix=fix) from None
        raise registry.invalid(error, content, lambda location: _expected(section, location), fix=fix) from None


def checked_choice(value: str | dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """A thing named inside a section as {name: its options, complete}. Raises RecipeError."""
    if isinstance(value, dict) and len(value) != 1:
        raise RecipeError(
            f"{where} must name one {kind}, not {len(value)}",
            allowed="expected: NAME, or {NAME: {option: value}}",
            fix=f"name one, see: edgekd list {kind}s",
            key=where,
        )
    if isinstance(value, dict) and not isinstance(next(iter(value.values())) or {}, dict):
        raise RecipeError(
            f"{where} = {shown(value)} is not valid",
            allowed="expected: NAME, or {NAME: {option: value}}",
            fix=f"name its option, see: edgekd list {kind}s",
            key=where,
        )
    name, options = choice_from_yaml(value)
    return {name: registry.entry(kind, name, where).validate(options, f"{where}.{name}")}


def _current(content: dict[str, Any]) -> Recipe:
    version = content.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RecipeError(
            f"schema_version = {version} is newer than this edgekd",
            allowed=f"this edgekd reads schema_version {SCHEMA_VERSION}",
            fix="upgrade edgekd: pip install -U edgekd",
            key="schema_version",
        )
    return checked(Recipe, content, fix="see: edgekd schema")


def _completed(recipe: Recipe) -> Recipe:
    """Fill in and check the options of every registered thing that the recipe names."""
    update: dict[str, Any] = {}
    for section, (key, kind) in NAMED.items():
        part: Named | None = getattr(recipe, section)
        if part is None:
            continue
        name = getattr(part, key)
        if kind == "network" and ":" in name:
            continue  # somebody else's network: its options are its own affair
        own = type(part).model_fields
        options = registry.entry(kind, name, f"{section}.{key}").validate(part.options, section, also=own)
        update[section] = part.model_copy(update=options)
    for (section, key), kind in CHOICES.items():
        part = update.get(section, getattr(recipe, section))
        if part is None or getattr(part, key) is None:
            continue
        update[section] = part.model_copy(update={key: checked_choice(getattr(part, key), kind, f"{section}.{key}")})
    _check_compared(recipe)
    return recipe.model_copy(update=update)


def _check_compared(recipe: Recipe) -> None:
    """Budgets against a teacher that there is not could never be met."""
    for name in ("accuracy_drop", "speedup"):
        limit = getattr(recipe.budgets, name)
        if recipe.teacher is None and limit is not None:
            raise RecipeError(
                f"budgets.{name} = {limit:g} compares with the teacher, and the recipe names none",
                allowed="budgets without a teacher: p99_ms, size_bytes",
                fix=f"--set budgets.{name}=null, or name a teacher: --set teacher.network=NAME",
                key=f"budgets.{name}",
            )


def _at(section: type[pydantic.BaseModel], location: Location) -> type[pydantic.BaseModel]:
    """The section in which a key of this location stands."""
    for part in location:
        field = section.model_fields.get(str(part))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        if not inner:
            break
        section = inner[0]
    return section


def _expected(section: type[pydantic.BaseModel], location: Location) -> str:
    """What belongs at a location: its type, and what it means."""
    named = [part for part in location if isinstance(part, str)]
    field = _at(section, tuple(named[:-1])).model_fields.get(named[-1]) if named else None
    if field is None:
        return "another value"
    return registry.typename(field.annotation) + (f"; {field.description}" if field.description else "")


def _override(content: dict[str, Any], override: str) -> str:
    """Apply one `a.b=value` to the content of a recipe, and return its key.

    Naming another thing (`distill.method=dkd`) drops the options of the old one: they meant something there only.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    given = f"--set {shown(override)}"
    if not equals or not all(part.isprintable() and part for part in parts):
        example = "for example: --set distill.temperature=4"
        raise RecipeError(f"{given}: there is no KEY=VALUE in it", allowed="expected: --set KEY=VALUE", fix=example)
    value = value_from_yaml(text, given)
    at = content
    for depth, part in enumerate(parts[:-1]):
        inner = at.get(part)
        if depth == 1 and (parts[0], part) in CHOICES:  # activation: lma, and now activation.lma.k=4
            name = parts[depth + 1]
            inner = {name: (inner.get(name) if isinstance(inner, dict) else None) or {}}
        at[part] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            where = ".".join(parts[: depth + 1])
            raise RecipeError(
                f"{given}: {where} is no mapping", allowed="only a mapping has keys", fix=f"set all of {where}"
            )
        at = inner
    section, last = parts[0], parts[-1]
    if len(parts) == 2 and section in NAMED and NAMED[section][0] == last and at.get(last) != value:
        own = _at(Recipe, (section,)).model_fields
        for stale in [option for option in at if option not in own]:
            del at[stale]
    at[last] = value
    return ".".join(parts)
