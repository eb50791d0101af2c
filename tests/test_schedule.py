"""Options that change over a training: the values, what is refused, and how the registry speaks of them."""

from __future__ import annotations

import itertools
import json
import math

import jsonschema
import numpy as np
import pytest

from edgekd import catalog, recipe, recipe_schema, registry
from edgekd.errors import RecipeError
from edgekd.schedule import SHAPES, is_schedule, value_at, values_of

SHARE = np.linspace(0, 1, 21)
FORMULAS = {
    "linear": lambda p: 8 + (0.5 - 8) * p,
    "cosine": lambda p: 0.5 + (8 - 0.5) * (1 + np.cos(np.pi * p)) / 2,
    "exponential": lambda p: 8 * (0.5 / 8) ** p,
    "ramp_up": lambda p: 8 + (0.5 - 8) * np.exp(-5 * (1 - p) ** 2),
}


@pytest.mark.parametrize("shape", FORMULAS)
def test_the_values_of_every_curve(shape):
    found = [value_at({shape: [8, 0.5]}, p) for p in SHARE]
    np.testing.assert_allclose(found, FORMULAS[shape](SHARE), rtol=1e-12)
    assert found[-1] == pytest.approx(0.5)
    early = [value_at({shape: [8, 0.5, 0.4]}, p) for p in SHARE]
    np.testing.assert_allclose(early, FORMULAS[shape](np.minimum(SHARE / 0.4, 1)), rtol=1e-12)


def test_all_shapes_but_the_ramp_begin_at_the_first_value():
    assert all(value_at({shape: [8, 0.5]}, 0.0) == 8 for shape in SHAPES if shape != "ramp_up")
    assert value_at({"ramp_up": [0, 1]}, 0.0) == pytest.approx(math.exp(-5))


@pytest.mark.parametrize("shape", FORMULAS)
@pytest.mark.parametrize("start", [2.0, 4.1, 7.3, 10.0])
def test_a_temperature_falls_to_exactly_one(shape, start):
    found = [value_at({shape: [start, 1.0, 0.8]}, p) for p in SHARE]
    assert found[-5:] == [1.0] * 5 < found[:5]
    assert all(now <= before for before, now in itertools.pairwise(found))


def test_steps_share_the_training_equally():
    found = [value_at({"step": [4, 2, 1]}, p) for p in (0, 0.33, 0.34, 0.66, 0.67, 0.99, 1)]
    assert found == [4, 4, 2, 2, 1, 1, 1]
    assert values_of({"step": [4, 2, 1]}) == [4, 2, 1]


def test_what_is_a_schedule():
    assert all(is_schedule({shape: [2.0, 1.0]}) for shape in SHAPES)
    assert not any(is_schedule(value) for value in (2.0, None, {}, {"linear": 1}, {"rate": [2, 1]}, ["linear"]))


def test_a_number_is_a_constant():
    assert {value_at(3.5, p) for p in SHARE} == {3.5}
    assert values_of(3.5) == [3.5]
    assert values_of({"linear": [4, 1, 0.5]}) == [4, 1]


def test_every_option_that_takes_a_schedule_takes_every_schedule():
    scheduled = [
        (entry, option)
        for entry in registry.entries("method")
        for option in entry.options.values()
        if "schedule" in registry.typename(option.annotation)
    ]
    # All numbers but goals and moments, which a training has one of.
    plain = [
        (entry.name, option.name)
        for entry in registry.entries("method")
        for option in entry.options.values()
        if "float" in registry.typename(option.annotation) and (entry, option) not in scheduled
    ]
    assert plain == [
        ("cross_layer", "first"), ("decorrelated_prune", "macs"), ("decorrelated_prune", "prune_at"),
        ("robust_prune", "sparsity"), ("robust_prune", "debias"),
    ]  # fmt: skip
    for entry, option in scheduled:
        others = {one.name: SOME for one in entry.options.values() if one.required}
        for shape in SHAPES:
            given = {option.name: {shape: [2, 1]}}
            assert entry.validate({**others, **given})[option.name] == {shape: [2.0, 1.0]}


SOME = ["kd"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            {"liner": [4, 1]},
            'schedules: linear, cosine, exponential, ramp_up, step; this names liner, closest: "linear"',
        ),
        ({}, "schedules: linear, cosine, exponential, ramp_up, step; this names nothing"),
        (
            {"linear": [4, 1], "step": [1, 2]},
            "schedules: linear, cosine, exponential, ramp_up, step; this names linear, step",
        ),
        ({"linear": [4]}, "linear takes [from, to], or [from, to, until] with until above 0 and at most 1"),
        ({"cosine": [4, 1, 1.5]}, "cosine takes [from, to], or [from, to, until] with until above 0 and at most 1"),
        ({"exponential": [4, 0]}, "exponential takes two numbers of one sign, and not 0"),
        ({"linear": "4 to 1"}, "linear takes a list of numbers"),
        ({"linear": [4, True]}, "linear takes a list of numbers"),
        ({"step": [4]}, "step takes two numbers or more"),
    ],
    ids=str,
)
def test_what_is_no_schedule(value, reason):
    with pytest.raises(RecipeError) as caught:
        recipe.load("digits", [f"distill.temperature={json.dumps(value)}"])
    assert str(caught.value) == (
        f"error: --set: distill.temperature = {json.dumps(value)} is not valid\n"
        f"       expected: float | schedule | null   ({reason})\n"
        "fix:   correct distill.temperature, or see: edgekd list methods"
    )


def test_a_text_is_refused_as_before():
    with pytest.raises(RecipeError, match=r"expected: float \| schedule \| null   \(should be a valid number\)"):
        recipe.load("digits", ["distill.temperature=hot"])


def test_the_recipe_keeps_a_schedule_and_the_schema_knows_it():
    spec = recipe.load("digits", ["distill.temperature={linear: [4, 1]}"]).distill
    assert spec.options["temperature"] == {"linear": [4.0, 1.0]}
    schema = recipe_schema.json_schema()
    content = {
        "name": "x",
        "data": {"source": "digits"},
        "teacher": {"network": "resnet"},
        "student": {"network": "resnet"},
    }
    for good in (4, {"linear": [4, 1]}, {"step": [4, 2, 1]}):
        jsonschema.validate(content | {"distill": {"method": "kd", "temperature": good}}, schema)
    for bad in ("hot", {"liner": [4, 1]}, {"linear": 4}, {"linear": [4]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content | {"distill": {"method": "kd", "temperature": bad}}, schema)


def test_the_list_of_methods_shows_the_type():
    (row,) = [row for row in catalog.rows("methods") if row["name"] == "kd"]
    assert row["options"]["kd_weight"]["type"] == "float | schedule"
    assert row["options"]["temperature"]["type"] == "float | schedule | null"
    assert "kd_weight=0.7|schedule ce_weight=null|schedule temperature=null|schedule " in catalog.options_text(row)
