"""Recipes: what a good one means, and what every bad one gets."""

from __future__ import annotations

import copy
import json
import re

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgekd import recipe, registry
from edgekd.errors import EdgekdError, RecipeError, shown
from edgekd.recipe import SHIPPED, Recipe, choice_from_yaml, load, parse, shipped
from edgekd.recipe_schema import json_schema

GOOD = """\
name: mine
data:
  source: npz
  path: data.npz
teacher:
  network: resnet
student:
  network: resnet
  depth: 8
  activation: {lma: {k: 4}}
distill:
  method: kd
  train:
    epochs: 5
"""


def problem(text: str, *overrides: str) -> list[str]:
    """The three lines that a text gets."""
    with pytest.raises(RecipeError) as caught:
        parse(text, name="edgekd.yaml", overrides=overrides)
    return str(caught.value).splitlines()


# --- a good recipe ------------------------------------------------------------------------------------------------


def test_options_are_completed_from_the_registry():
    made = parse(GOOD)
    assert made.student.options == {"depth": 8, "width": 1.0}
    assert choice_from_yaml(made.student.activation).options["k"] == 4
    assert set(made.distill.options) == set(registry.entry("method", "kd").options)
    assert choice_from_yaml(made.teacher.activation) == ("relu", {})


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_and_survive_being_written_out(name):
    made = load(name)
    assert made.name == name and made.description
    again = parse(json.dumps(made.model_dump(mode="json")))
    assert again.model_dump() == made.model_dump()


def test_sections_that_share_an_anchor_are_overridden_apart():
    made = load("cifar10-lma", ["distill.train.epochs=3"])
    assert (made.teacher.train.epochs, made.distill.train.epochs) == (200, 3)


def test_the_options_of_somebody_elses_network_are_its_own_affair():
    made = parse(GOOD, overrides=["student.network=mine:Net", "student.anything=[1, {a: b}]"])
    assert made.student.options == {"anything": [1, {"a": "b"}]}


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("distill.train.lr=1e-3", {"distill": {"train": {"lr": 1e-3}}}),
        ("seed=7", {"seed": 7}),
        ("description=''", {"description": ""}),
        ("budgets.p99_ms=", {"budgets": {"p99_ms": None}}),
        ("data.normalize.mean=[0.5]", None),
        ("budgets.p99_ms=5", {"budgets": {"p99_ms": 5}}),
        ("budgets.p99_ms=null", {"budgets": {"p99_ms": None}}),
        ("data.normalize={mean: [0.5], std: [1]}", {"data": {"normalize": {"mean": [0.5], "std": [1.0]}}}),
        ("student.activation=relu", {"student": {"activation": {"relu": {}}}}),
        ("student.activation.lma.momentum=0.5", {"student": {"activation": {"lma": {"k": 4, "momentum": 0.5}}}}),
        ("student.activation.aplu.k=3", {"student": {"activation": {"aplu": {"k": 3}}}}),
        ("teacher.activation.lma.k=3", {"teacher": {"activation": {"lma": {"k": 3}}}}),
        (" distill.train.epochs =9", {"distill": {"train": {"epochs": 9}}}),
    ],
)  # fmt: skip
def test_overrides(override, value):
    if value is None:
        assert problem(GOOD, override)[0] == "error: --set: data.normalize.std is missing"
        return
    made = parse(GOOD, overrides=[override]).model_dump(mode="json")

    def check(expected, found):
        for key, inner in expected.items():
            if isinstance(inner, dict):
                check(inner, found[key])
            else:
                assert found[key] == inner

    check(value, made)


def test_naming_another_thing_drops_the_options_of_the_old_one():
    made = parse(GOOD, overrides=["student.network=lma_student"])
    assert made.student.options == {"size": 3, "width": 1.0}
    assert parse(GOOD, overrides=["student.network=resnet"]).student.options["depth"] == 8


def test_the_last_override_wins():
    assert parse(GOOD, overrides=["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["foo", "=x", "a..b=1", ".a=1", "a.=1", "", "a\tb=1"])
def test_an_override_without_key_or_value(override):
    assert problem(GOOD, override) == [
        f"error: --set {shown(override)}: there is no KEY=VALUE in it",
        "       expected: --set KEY=VALUE",
        "fix:   for example: --set distill.temperature=4",
    ]


def test_an_override_of_a_key_in_something_that_has_none():
    assert problem(GOOD, "name.x.y=1") == [
        'error: --set "name.x.y=1": name is no mapping',
        "       only a mapping has keys",
        "fix:   set all of name",
    ]


def test_an_override_that_is_not_yaml():
    assert problem(GOOD, "seed=[")[0].startswith('error: --set "seed=[":1: expected')


# --- what bad input gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (("method: kd", "method: dkdd"), [
            'error: edgekd.yaml:12: distill.method = "dkdd" is not a known method',
            f'       known: {", ".join(registry.names("method"))}   (closest: "dkd")',
            'fix:   set distill.method = "dkd", or see: edgekd list methods']),
        (("{lma: {k: 4}}", "lmaa"), [
            'error: edgekd.yaml:10: student.activation = "lmaa" is not a known activation',
            '       known: aplu, lma, prelu, relu, swish   (closest: "lma")',
            'fix:   set student.activation = "lma", or see: edgekd list activations']),
        (("source: npz", "source: nzp"), [
            'error: edgekd.yaml:3: data.source = "nzp" is not a known dataset',
            "       known: cifar, digit_sensors, digit_volumes, digits, folder, idx, none, npz, parquet"
            '   (closest: "npz")',
            'fix:   set data.source = "npz", or see: edgekd list datasets']),
        (("{lma: {k: 4}}", "{lma: {kk: 4}}"), [
            "error: edgekd.yaml:10: student.activation.lma.kk is not a known key or option of activation lma",
            '       known: continuous, k, momentum   (closest: "k")',
            "fix:   write student.activation.lma.k, or see: edgekd list activations"]),
        (("{lma: {k: 4}}", "{lma: {}, relu: {}}"), [
            "error: edgekd.yaml:10: student.activation must name one activation, not 2",
            "       expected: NAME, or {NAME: {option: value}}",
            "fix:   name one, see: edgekd list activations"]),
        (("{lma: {k: 4}}", "4"), [
            "error: edgekd.yaml:10: student.activation = 4 is not valid",
            "       expected: str | mapping; NAME or {NAME: {option: value}}, see: edgekd list activations"
            "   (should be a valid string)",
            "fix:   correct student.activation, or see: edgekd schema"]),
        (("  method: kd", "  methd: kd"), [
            "error: edgekd.yaml:12: distill.methd is not a known key or option of method kd",
            "       known: cache_teacher, ce_weight, confidence, kd_weight, kl_reduction, method, scratch, selective,"
            ' tau_squared, temperature, train, unlabelled_weight   (closest: "method")',
            "fix:   write distill.method, or see: edgekd list methods"]),
        (("distill:", "distil:"), [
            "error: edgekd.yaml:11: distil is not a known key",
            "       known: attack, benchmark, budgets, corruptions, data, description, distill, export, name, quantize,"
            ' schema_version, seed, student, teacher   (closest: "distill")',
            "fix:   write distill, or see: edgekd schema"]),
        (("epochs: 5", "epocs: 5"), [
            "error: edgekd.yaml:14: distill.train.epocs is not a known key",
            "       known: accumulate, batch_size, channels_last, clip, compile, ema, epochs, gamma, keep,"
            " lr, milestones, momentum, nesterov,"
            " optimizer, patience, precision, schedule, tensorboard, warmup, weight_decay"
            '   (closest: "epochs")',
            "fix:   write distill.train.epochs, or see: edgekd schema"]),
        (("epochs: 5", "epochs: five"), [
            'error: edgekd.yaml:14: distill.train.epochs = "five" is not valid',
            "       expected: int   (should be a valid integer)",
            "fix:   correct distill.train.epochs, or see: edgekd schema"]),
        (("epochs: 5", "epochs: 0"), [
            "error: edgekd.yaml:14: distill.train.epochs = 0 is not valid",
            "       expected: int   (should be greater than or equal to 1)",
            "fix:   correct distill.train.epochs, or see: edgekd schema"]),
        (("epochs: 5", "lr: .nan"), [
            "error: edgekd.yaml:14: distill.train.lr = NaN is not valid",
            "       expected: float   (should be a finite number)",
            "fix:   correct distill.train.lr, or see: edgekd schema"]),
        (("epochs: 5", "schedule: cosin"), [
            'error: edgekd.yaml:14: distill.train.schedule = "cosin" is not valid',
            '       expected: "constant" | "step" | "cosine" | "plateau"'
            "   (should be 'constant', 'step', 'cosine' or 'plateau')",
            "fix:   correct distill.train.schedule, or see: edgekd schema"]),
        (("epochs: 5", "milestones: [0.5, 2]"), [
            "error: edgekd.yaml:14: distill.train.milestones.1 = 2 is not valid",
            "       expected: list of float; step: where lr falls, as shares of the epochs   (should be less than 1)",
            "fix:   correct distill.train.milestones.1, or see: edgekd schema"]),
        (("depth: 8", "depth: true"), [
            "error: edgekd.yaml:9: student.depth = true is not valid",
            "       expected: int   (should be a valid integer)",
            "fix:   correct student.depth, or see: edgekd list networks"]),
        (("  path: data.npz\n", ""), [
            "error: edgekd.yaml:2: data.path is missing",
            "       expected: path",
            "fix:   add data.path, or see: edgekd list datasets"]),
        (("  source: npz\n", ""), [
            "error: edgekd.yaml:2: data.source is missing",
            "       expected: str; the format, see: edgekd list datasets",
            "fix:   add data.source, or see: edgekd schema"]),
        (("name: mine\n", ""), [
            "error: edgekd.yaml: name is missing",
            "       expected: str",
            "fix:   add name, or see: edgekd schema"]),
        (("name: mine", "name: 5"), [
            "error: edgekd.yaml:1: name = 5 is not valid",
            "       expected: str   (should be a valid string)",
            "fix:   correct name, or see: edgekd schema"]),
        (("name: mine", "name: a/b"), [
            'error: edgekd.yaml:1: name = "a/b" is not valid',
            "       expected: str   (String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$')",
            "fix:   correct name, or see: edgekd schema"]),
        (("name: mine", "name: mine\nseed: 99999999999999999999"), [
            "error: edgekd.yaml:2: seed = 99999999999999999999 is not valid",
            "       expected: int   (should be less than 4294967296)",
            "fix:   correct seed, or see: edgekd schema"]),
        (("teacher:\n  network: resnet", "teacher: resnet"), [
            'error: edgekd.yaml:5: teacher = "resnet" is not valid',
            "       expected: mapping | null; null for methods that learn without one   (should be an object)",
            "fix:   correct teacher, or see: edgekd schema"]),
        (("name: mine", "schema_version: 2\nname: mine"), [
            "error: edgekd.yaml:1: schema_version = 2 is newer than this edgekd",
            "       this edgekd reads schema_version 1",
            "fix:   upgrade edgekd: pip install -U edgekd"]),
        (("name: mine", "schema_version: one\nname: mine"), [
            'error: edgekd.yaml:1: schema_version = "one" is not valid',
            "       expected: 1   (should be 1)",
            "fix:   correct schema_version, or see: edgekd schema"]),
        (("name: mine", "name: [mine"), [
            "error: edgekd.yaml:2: expected ',' or ']', but got ':'",
            "       expected: YAML of text, numbers, true, false, null, lists, and mappings with text as keys",
            "fix:   correct the YAML; text in quotes is always text"]),
    ],
)  # fmt: skip
def test_what_bad_input_gets(change, lines):
    assert change[0] in GOOD
    assert problem(GOOD.replace(*change, 1)) == lines


def test_a_key_that_was_set_on_the_command_line_is_not_blamed_on_the_file():
    assert problem(GOOD, "distill.temprature=3")[0].startswith("error: --set: distill.temprature is not")
    assert problem(GOOD, "distil.x=3")[0].startswith("error: --set: distil is not")
    assert problem(GOOD.replace("depth: 8", "depth: x"), "seed=3")[0].startswith("error: edgekd.yaml:9: student.depth")


def test_an_error_found_later_is_located_too():
    error = RecipeError("distill.train.epochs = 5 is too few", key="distill.train.epochs")
    parse(GOOD, name="edgekd.yaml").origin.locate(error)
    assert str(error) == "error: edgekd.yaml:14: distill.train.epochs = 5 is too few"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("nope.yaml", "error: the recipe nope.yaml does not exist"),
        ("folder", "error: the recipe folder is not a file"),
        ("bytes.yaml", "error: the recipe bytes.yaml cannot be read: it is not UTF-8 text"),
        ("digit", 'error: recipe = "digit" is not a known recipe'),
        (None, "error: there is no ./edgekd.yaml here, and no recipe is named"),
    ],
)
def test_a_recipe_that_is_not_there(source, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\x80\xff")
    with pytest.raises(RecipeError) as caught:
        load(source)
    lines = str(caught.value).splitlines()
    assert lines[0] == what and len(lines) == 3


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load("digits").name == "digits"


# --- the JSON Schema ----------------------------------------------------------------------------------------------

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize("name", shipped())
def test_the_schema_accepts_the_shipped_recipes(name):
    VALIDATOR.validate(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")))


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        (("depth: 8", "depth: 8"), True),
        (("method: kd", "temperature: 3"), True),
        (("network: resnet\n  depth: 8", "network: mine:Net\n  anything: 8"), True),
        (("{lma: {k: 4}}", "lma"), True),
        (("depth: 8", "dept: 8"), False),
        (("depth: 8", "depth: x"), False),
        (("method: kd", "temprature: 3"), False),
        (("method: kd", "method: dkdd"), False),
        (("network: resnet\n  depth: 8", "network: resnt"), False),
        (("{lma: {k: 4}}", "lmaa"), False),
        (("{lma: {k: 4}}", "{lma: {kk: 4}}"), False),
        (("{lma: {k: 4}}", "{lma: {}, relu: {}}"), False),
        (("  path: data.npz\n", ""), False),
        (("distill:", "distil:"), False),
        (("epochs: 5", "epochs: 0"), False),
    ],
)
def test_the_schema_and_the_loader_agree(change, accepted):
    text = GOOD.replace(*change, 1)
    assert VALIDATOR.is_valid(yaml.safe_load(text)) == accepted
    try:
        parse(text)
    except RecipeError:
        assert not accepted
    else:
        assert accepted


# --- fuzzing: whatever is written, nothing but an EdgekdError comes of it -----------------------------------------

KEYS = sorted({*Recipe.model_fields, "source", "path", "network", "activation", "train", "epochs", "method", "k", "lma",
               "temperature", "normalize", "mean", "std", "augment", "depth", "milestones", "<<", "x"})  # fmt: skip
WORDS = ["digits", "resnet", "lma", "kd", "mine:Net", "timm:x", ":", "", "1e-3", "~", "no", "\ud800", "a\x00b", "é"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**30, 10**31), st.floats(), st.text(max_size=8),
    st.sampled_from(WORDS), st.dates(), st.datetimes(), st.binary(max_size=8),
)  # fmt: skip
STRUCTURES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), SCALARS), inner, max_size=4),
        st.sets(st.integers(), max_size=2),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)


def loads_or_is_refused(text: str, overrides: list[str] | None = None) -> None:
    try:
        made = parse(text, name="fuzzed.yaml", overrides=overrides or [])
    except EdgekdError as error:
        what, allowed, fix = str(error).split("\n")
        assert what.startswith("error: ") and allowed.startswith("       ") and fix.startswith("fix:   ")
        assert not re.search(r"typing\.|<class|Traceback|pydantic", str(error)), str(error)
    else:
        json.dumps(made.model_dump(mode="json"))


def dumped(structure: object) -> str:
    return yaml.dump(structure, allow_unicode=True, default_flow_style=None)  # the unsafe one: tags are wanted


@given(st.dictionaries(st.one_of(st.sampled_from(KEYS), SCALARS), STRUCTURES, max_size=6))
def test_fuzz_structures(structure):
    loads_or_is_refused(dumped(structure))


@given(st.data())
def test_fuzz_shipped_recipes_with_one_value_changed(data):
    content = yaml.safe_load((SHIPPED / f"{data.draw(st.sampled_from(shipped()))}.yaml").read_text(encoding="utf-8"))
    content = copy.deepcopy(content)
    at = content
    while True:
        key = data.draw(st.sampled_from([*at, "new"]))
        if not isinstance(at.get(key), dict) or data.draw(st.booleans()):
            break
        at = at[key]
    if data.draw(st.integers(0, 4)):
        at[key] = data.draw(STRUCTURES)
    else:
        at.pop(key, None)
    loads_or_is_refused(dumped(content))


@given(st.data())
def test_fuzz_shipped_recipes_with_damaged_text(data):
    text = (SHIPPED / f"{data.draw(st.sampled_from(shipped()))}.yaml").read_text(encoding="utf-8")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 5))
        text = text[:at] + data.draw(st.text(max_size=3)) + text[at + cut :]
    loads_or_is_refused(text)


PATHS = st.lists(st.one_of(st.sampled_from(KEYS), st.text(max_size=4)), min_size=1, max_size=4).map(".".join)


@given(st.lists(st.one_of(st.text(max_size=20), st.tuples(PATHS, STRUCTURES.map(dumped)).map("=".join)), max_size=3))
def test_fuzz_overrides(overrides):
    loads_or_is_refused(GOOD, overrides)


# A value for options that have no default, by their type; text for all others.
SAMPLES = {
    "int": "8",
    "list of method": "[kd]",
    "list of int": "[1]",
    "network": "resnet",
    "list of network": "[resnet]",
}


def test_every_registered_name_can_stand_in_a_recipe():
    for section, (key, kind) in recipe.NAMED.items():
        for entry in registry.entries(kind):
            required = [
                f"{section}.{option.name}={SAMPLES.get(registry.typename(option.annotation), 'x')}"
                for option in entry.options.values()
                if option.required
            ]
            made = parse(GOOD, overrides=[f"{section}.{key}={entry.name}", *required])
            assert set(getattr(made, section).options) == set(entry.options)
