"""The error tree, and the texts of its two makers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edgekd
from edgekd import errors
from edgekd.errors import EdgekdError, RecipeError, shown, unknown, unknown_key

TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EdgekdError)]
EXIT_CODES = {
    "EdgekdError": 1, "RecipeError": 2, "MissingError": 3, "StageError": 4, "DataError": 4, "CheckpointError": 4,
    "StoreError": 4, "ExportError": 4, "ConnectionLost": 4, "DiskFull": 4, "BoardFailed": 4, "BudgetMissed": 5,
    "ResultInvalid": 6,
}  # fmt: skip


def test_exit_codes():
    assert {error.__name__: error.exit_code for error in TREE} == EXIT_CODES


def test_the_tree_is_drawn_in_the_docstring():
    for error in TREE:
        line = next(line for line in (errors.__doc__ or "").splitlines() if f"{error.__name__} " in line)
        own = "exit_code" in vars(error)
        assert (str(error.exit_code) in line.split()) == own, error


def test_an_error_is_three_lines():
    error = RecipeError("what went wrong", allowed="what is allowed", fix="what to do")
    error.position = "edgekd.yaml:14: "
    assert str(error).splitlines() == [
        "error: edgekd.yaml:14: what went wrong",
        "       what is allowed",
        "fix:   what to do",
    ]


def test_an_unknown_name():
    error = unknown("distill.method", "dkdd", ["kd", "dkd", "ard"], noun="method", fix="see: edgekd list methods")
    assert str(error).splitlines() == [
        'error: distill.method = "dkdd" is not a known method',
        '       known: ard, dkd, kd   (closest: "dkd")',
        'fix:   set distill.method = "dkd", or see: edgekd list methods',
    ]
    assert error.key == "distill.method"


def test_an_unknown_name_that_is_like_no_other():
    assert str(unknown("target", "?", ["local"], noun="target", fix="see: edgekd list targets")).splitlines() == [
        'error: target = "?" is not a known target',
        "       known: local",
        "fix:   see: edgekd list targets",
    ]


def test_an_unknown_name_among_very_many():
    error = unknown("run", "x", [f"run-{number:03}" for number in range(100)], noun="run")
    assert error.allowed.endswith("run-029, and 70 more")


def test_an_unknown_key():
    error = unknown_key("distill", "temprature", ["temperature"], of="method kd", fix="see: edgekd list methods")
    assert str(error).splitlines() == [
        "error: distill.temprature is not a known key or option of method kd",
        '       known: temperature   (closest: "temperature")',
        "fix:   write distill.temperature, or see: edgekd list methods",
    ]
    assert error.key == "distill.temprature"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("a", '"a"'),
        ({"k": [1, 2.5]}, '{"k": [1, 2.5]}'),
        (float("nan"), "NaN"),
        (Path("a/b"), '"a/b"'),
        ("x" * 99, '"' + "x" * 56 + "..."),
        ("\ud800", r'"\ud800"'),
    ],
)
def test_values_are_shown_as_a_recipe_spells_them(value, text):
    assert shown(value) == text


OWN = (
    "artifact", "catalog", "cli/__init__", "cli/looking", "cli/outcome", "cli/preparing", "cli/running", "errors",
    "pipeline", "preflight", "recipe", "registry", "stages/deploying", "stages/exporting", "starter", "target",
    "yamlfile",
)  # fmt: skip


@pytest.mark.parametrize("module", OWN)
def test_every_error_says_what_is_allowed_and_what_to_do(module):
    tree = ast.parse(Path(edgekd.__file__).parent.joinpath(f"{module}.py").read_text(encoding="utf-8"))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in EXIT_CODES:
            assert {keyword.arg for keyword in call.keywords} >= {"allowed", "fix"}, f"{module}.py:{call.lineno}"
