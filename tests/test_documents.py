"""What another machine wrote: of which size, shape and types it must be before anything is made of it."""

from __future__ import annotations

import json

import pytest

from edgekd.agent.machine import facts
from edgekd.backends.tensorrt.built import Built, Table
from edgekd.device.facts import Facts
from edgekd.documents import Document, fitting, parsed
from edgekd.errors import StageError

BUILT = {
    "module": "trtexec", "version": "10.3.0", "mode": "trtexec", "seconds": 3.5, "argv": [["trtexec", "--onnx"]],
    "tried": [{"mode": "flags", "refused": ["too old"]}], "files": {"model.plan": ["0" * 64, 1]},
    "timed": {"kernels_alone": {"latency": {"median": 0.8, "p99": 1}, "warnings": ["hot"], "throughput_per_s": None}},
    "identity": {"onnx": "0" * 64, "flags": {"dla_core": -1}, "tensorrt": "10.3.0", "compute_capability": "8.7",
                 "multiprocessors": 8, "device": "Orin", "l4t": None},
}  # fmt: skip
ROW = {"name": "conv", "type": "DLA", "inputs": ["Int8"], "constants": [], "outputs": [], "tactic": "", "nodes": ["a"]}
DOCUMENTS = [(Facts, facts()), (Built, BUILT), (Table, {"rows": [ROW]})]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[]", "a JSON list"),
        ("[" * 100_000, "recursion"),
        ('{"a": ' + "[" * 16 + "]" * 16 + "}", "more than 16 levels"),
        (" " * ((16 << 20) + 1), "at most"),
    ],
)
def test_only_a_json_object_of_sane_size_is_parsed(text, why):
    with pytest.raises(StageError, match=f"(?s)facts: not what the agent writes: .*{why}"):
        parsed(text, "facts")


@pytest.mark.parametrize(("kind", "content"), DOCUMENTS)
def test_what_is_as_it_must_be_stays_as_it_is(kind, content):
    assert fitting(json.loads(json.dumps(content)), kind, "it") == content
    assert fitting(content | {"more": 1}, kind, "it") == content


def places(value, path=()):
    """Every place in a document."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def replaced(document, path, value):
    """A copy with another value at one place."""
    if not path:
        return value
    copied = json.loads(json.dumps(document))
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copied


NUMBERS = {"seconds", "median", "p99", "throughput_per_s", "load_average", "gpu_load"}
# Where a value of another kind may stand all the same: flags are compared with those that we asked for, and a command
# of trtexec that was interrupted has timed nothing.
WRONG = [
    ({"a": [{}]}, {"flags", "kernels_alone"}), ([[{}]], set()), (True, {"emulated", "virtual"}),
    (-0.5, NUMBERS | set(facts()["now"]["temperature_c"])), (10**400, set()), (float("nan"), set()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content"), DOCUMENTS)
@pytest.mark.parametrize(("wrong", "free"), WRONG)
def test_another_type_in_any_place_is_an_error(kind, content, wrong, free):
    for path in places(content):
        if path and path[-1] in free | {"dla_core"}:
            continue
        with pytest.raises(StageError) as caught:
            fitting(replaced(content, path, wrong), kind, "build.json")
        assert caught.value.what.startswith("build.json: not what the agent writes: ") and len(caught.value.what) < 200


def test_what_is_missing_is_named():
    class Small(Document):
        there: int

    with pytest.raises(StageError) as caught:
        fitting({"they": 1}, Small, "build.json")
    assert str(caught.value).splitlines() == [
        "error: build.json: not what the agent writes: there is missing",
        "       expected: all that it writes",
        "fix:   run it again, and see whether anything else answers there in the place of edgekd's agent",
    ]


def test_no_text_moves_a_terminals_cursor():
    content = fitting(BUILT | {"module": "\x1b[2Jtensor\trt\r"}, Built, "build.json")
    assert content["module"] == "[2Jtensorrt"
