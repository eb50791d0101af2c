"""YAML in, plain data out; whatever the text is, nothing but a RecipeError comes of it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.errors import RecipeError
from edgekd.yamlfile import MAX_DEPTH, MAX_VALUES, mapping_from_yaml, value_from_yaml

PLAIN = "       expected: YAML of text, numbers, true, false, null, lists, and mappings with text as keys"
CORRECT = "fix:   correct the YAML; text in quotes is always text"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("true", True), ("False", False), ("7", 7), ("-7", -7), ("+7", 7),
        ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("-2.5E+3", -2500.0), (".inf", math.inf), ("-.INF", -math.inf),
        ("no", "no"), ("on", "on"), ("010", "010"), ("1_000", "1_000"), ("0x1F", "0x1F"), ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"), ("'1'", "1"), ('"a\\tb"', "a\tb"), ("=", "="), ("1.2.3", "1.2.3"), ("e5", "e5"),
        ("[1, [a]]", [1, ["a"]]), ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_scalars_are_read_by_the_core_schema(text, value):
    read = value_from_yaml(text, "text")
    assert read == value and type(read) is type(value)


def test_nan():
    assert math.isnan(value_from_yaml(".nan", "text"))


def test_the_line_of_every_key():
    _, origin = mapping_from_yaml("a:\n  b: 1\n  c:\n  - x\n  - y: 2\n", "file.yaml")
    assert origin.lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c.0": 4, "a.c.1": 5, "a.c.1.y": 5}


def test_the_place_of_a_key():
    _, origin = mapping_from_yaml("a:\n  b: 1\nc:\n  d: 2\n", "file.yaml")
    origin.override("a.b")
    origin.override("c.new.x")
    places = {key: origin.of(key) for key in ("a.b", "a.b.deep", "a.missing", "c.d", "c.new.x", "c.new", "top")}
    assert places == {
        "a.b": "--set: ",
        "a.b.deep": "--set: ",
        "a.missing": "file.yaml:1: ",
        "c.d": "file.yaml:4: ",
        "c.new.x": "--set: ",
        "c.new": "--set: ",
        "top": "file.yaml: ",
    }


def test_what_an_alias_names_is_a_copy():
    content, _ = mapping_from_yaml("a: &train {epochs: 1}\nb: *train\n", "file.yaml")
    content["a"]["epochs"] = 2
    assert content == {"a": {"epochs": 2}, "b": {"epochs": 1}}


def test_merge_keys():
    content, _ = mapping_from_yaml(
        "a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\nc: {<<: [{z: 3}, *a, {x: 4}]}\n", "file.yaml"
    )
    assert content["b"] == {"x": 1, "y": 2} and content["c"] == {"x": 1, "y": 1, "z": 3}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "file.yaml:1: expected ',' or ']', but got '<stream end>'"),
        ("a:\n\tb: 1", "file.yaml:2: found character '\\t' that cannot start any token"),
        ("a: 1\nb: c: 2", "file.yaml:2: mapping values are not allowed here"),
        ("a: *nothing", "file.yaml:1: found undefined alias 'nothing'"),
        ("a: 1\n---\nb: 2", "file.yaml:2: but found another document"),
        ("a: \x00", "file.yaml: special characters are not allowed"),
        ("b: 2\na: 1\na: 2", "file.yaml:3: a is given twice, first on line 2"),
        ("a:\n  1: x", "file.yaml:2: a key is not printable text"),
        ("\"a\\nb\": x", "file.yaml:1: a key is not printable text"),
        ("[a]: 1", "file.yaml:1: a key is not printable text"),
        ("a: !!python/object/apply:os.system [ls]", "tag:yaml.org,2002:python/object/apply:os.system\" is not allowed"),
        ("a: !!binary aGk=", 'file.yaml:1: the tag "tag:yaml.org,2002:binary" is not allowed'),
        ("a: !!set {x}", 'file.yaml:1: the tag "tag:yaml.org,2002:set" is not allowed'),
        ("a: !mine x", 'file.yaml:1: the tag "!mine" is not allowed'),
        ("a: !!bool maybe", 'file.yaml:1: "maybe" is not bool'),
        ("a: !!int ''", 'file.yaml:1: "" is not int'),
        (f"a: {'9' * 5000}", "is not int"),
        ('a: "\\0"', 'file.yaml:1: "\\u0000" holds a control character'),
        ('a: "\\ud800"', 'file.yaml:1: "\\ud800" holds a control character'),
        ("<<: 3", "file.yaml:1: << takes a mapping, or a list of mappings"),
        ("a: &a [*a]", "file.yaml:1: nested too deeply"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "file.yaml:1: nested too deeply"),
        ("a: " + "[" * 5000, "file.yaml: nested too deeply"),
        (f"a: [{'0,' * (MAX_VALUES + 1)}]", "file.yaml:1: too many values"),
    ],
)  # fmt: skip
def test_what_is_refused(text, problem):
    with pytest.raises(RecipeError) as caught:
        mapping_from_yaml(text, "file.yaml")
    what, allowed, fix = str(caught.value).splitlines()
    assert problem in what
    assert (allowed, fix) == (PLAIN, CORRECT)


@pytest.mark.parametrize("bomb", ["[{}]", "{{<<: [{}]}}"], ids=["aliases", "merges"])
def test_aliases_of_aliases_do_not_grow(bomb):
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} " + bomb.format(",".join([f"*a{level - 1}"] * 9)))
    with pytest.raises(RecipeError, match="too many values"):
        mapping_from_yaml("\n".join(lines), "file.yaml")


@pytest.mark.parametrize(
    ("text", "what"), [("", "is empty"), ("# nothing\n", "is empty"), ("- 1", "holds [1]"), ("text", 'holds "text"')]
)
def test_a_file_without_keys(text, what):
    with pytest.raises(RecipeError) as caught:
        mapping_from_yaml(text, "file.yaml")
    assert str(caught.value).splitlines() == [
        f"error: file.yaml {what}",
        "       expected: keys with values, such as `seed: 0`",
        "fix:   see how a recipe looks: edgekd init",
    ]


def test_a_byte_order_mark_is_no_harm():
    assert mapping_from_yaml("\ufeffa: 1", "file.yaml")[0] == {"a": 1}


YAML_LIKE = st.text(st.sampled_from(list("ab01.:-_ \n\t[]{},&*!<>|'\"?#%@`~\\\ufeff\x00é")), max_size=60)


@given(st.one_of(st.text(max_size=80), YAML_LIKE))
def test_any_text_is_read_or_refused(text):
    try:
        content, _ = mapping_from_yaml(text, "file.yaml")
    except RecipeError as error:
        assert len(str(error).split("\n")) == 3
    else:
        assert isinstance(content, dict) and json.dumps(content)
