"""What every registered thing keeps, whatever it is: tested on arrival."""

from __future__ import annotations

import inspect

import pytest

from edgekd import registry
from edgekd.registry import KINDS

ENTRIES = [pytest.param(entry, id=f"{kind}-{entry.name}") for kind in KINDS for entry in registry.entries(kind)]
# A value for options that have no default, by their type; text for all others.
SAMPLES = {
    "list of method": ["kd"], "list of int": [1], "network": "resnet", "list of network": ["resnet"], "int": 8,
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_summary_is_one_sentence(entry):
    assert 10 < len(entry.doc) < 200 and entry.doc.endswith(".")


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_read_from_the_source_is_what_python_sees(entry):
    parameters = inspect.signature(entry.load()).parameters.values()
    seen = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
    assert seen == {
        option.name: inspect.Parameter.empty if option.required else option.default for option in entry.options.values()
    }


@pytest.mark.parametrize("entry", ENTRIES)
def test_defaults_are_valid_options(entry):
    required = {
        option.name: SAMPLES.get(registry.typename(option.annotation), "x")
        for option in entry.options.values()
        if option.required
    }
    defaults = {option.name: option.default for option in entry.options.values() if not option.required}
    assert entry.validate({**required, **defaults}) == entry.validate(required)


@pytest.mark.parametrize("entry", ENTRIES)
def test_options_have_names_that_can_be_set(entry):
    for name in entry.options:
        assert name.isidentifier() and name.islower() and not name.startswith("_")
