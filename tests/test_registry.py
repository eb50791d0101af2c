"""The registry: read from the source without import, strict about options, open to other packages by one door."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from edgekd import registry
from edgekd.errors import MissingError, RecipeError
from edgekd.registry import KINDS, Entry, Option, typename

THING = Entry(
    "method",
    "thing",
    "edgekd.nowhere",
    "Thing",
    "A thing.",
    {
        "count": Option("count", int, 1),
        "rate": Option("rate", float, 0.5),
        "path": Option("path", Path),
        "how": Option("how", Literal["a", "b"], "a"),
        "many": Option("many", list[int], []),
        "some": Option("some", int | None, None),
    },
    "nowhere.py:1",
)


def problem(**options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        THING.validate({"path": "x", **options}, "distill")
    return str(caught.value).splitlines()


def test_options_are_completed():
    assert THING.validate({"path": "x", "rate": 2}) == {
        "count": 1, "rate": 2.0, "path": Path("x"), "how": "a", "many": [], "some": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"cuont": 1}, [
            "error: distill.cuont is not a known key or option of method thing",
            '       known: count, how, many, path, rate, some   (closest: "count")',
            "fix:   write distill.count, or see: edgekd list methods"]),
        ({"count": "3"}, [
            'error: distill.count = "3" is not valid',
            "       expected: int   (should be a valid integer)",
            "fix:   correct distill.count, or see: edgekd list methods"]),
        ({"count": True}, [
            "error: distill.count = true is not valid",
            "       expected: int   (should be a valid integer)",
            "fix:   correct distill.count, or see: edgekd list methods"]),
        ({"rate": float("nan")}, [
            "error: distill.rate = NaN is not valid",
            "       expected: float   (should be a finite number)",
            "fix:   correct distill.rate, or see: edgekd list methods"]),
        ({"how": "c"}, [
            'error: distill.how = "c" is not valid',
            """       expected: "a" | "b"   (should be 'a' or 'b')""",
            "fix:   correct distill.how, or see: edgekd list methods"]),
        ({"many": [1, "x"]}, [
            'error: distill.many.1 = "x" is not valid',
            "       expected: list of int   (should be a valid integer)",
            "fix:   correct distill.many.1, or see: edgekd list methods"]),
        ({"some": {}}, [
            "error: distill.some = {} is not valid",
            "       expected: int | null   (should be a valid integer)",
            "fix:   correct distill.some, or see: edgekd list methods"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_are_refused(options, lines):
    assert problem(**options) == lines


def test_a_missing_option():
    with pytest.raises(RecipeError) as caught:
        THING.validate({}, "distill")
    assert str(caught.value).splitlines() == [
        "error: distill.path is missing",
        "       expected: path",
        "fix:   add distill.path, or see: edgekd list methods",
    ]


def test_a_thing_whose_package_is_not_installed():
    with pytest.raises(MissingError) as caught:
        THING.load()
    assert str(caught.value).splitlines() == [
        "error: method \"thing\" cannot be imported: No module named 'edgekd.nowhere'",
        "       it needs the Python package 'edgekd.nowhere'",
        "fix:   pip install 'edgekd[train]', and see: edgekd doctor",
    ]


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int, "int"), (Path, "path"), (int | None, "int | null"), (Literal["a", 1, None], '"a" | 1 | null'),
        (list[str], "list of str"), (tuple[int, int], "list of int"), (dict[str, Any], "mapping"), (dict, "mapping"),
        (list[int | None] | str, "list of int | null | str"),
    ],
)  # fmt: skip
def test_types_are_named_as_a_user_writes_them(annotation, name):
    assert typename(annotation) == name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_something(kind):
    assert registry.names(kind)


def test_an_unknown_name():
    with pytest.raises(RecipeError) as caught:
        registry.entry("network", "resnt", "student.network")
    assert str(caught.value).splitlines()[2] == 'fix:   set student.network = "resnet", or see: edgekd list networks'


# --- other packages -----------------------------------------------------------------------------------------------


def with_plugin(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`edgekd ...` beside an installed package `theirs` that has `source` as its only module."""
    (folder / "theirs.py").write_text(source, encoding="utf-8")
    info = folder / "theirs-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[edgekd]\ntheirs = theirs\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "edgekd", *arguments],
        env={"PYTHONPATH": str(folder), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_plugin_is_listed_without_being_imported(tmp_path):
    source = (
        "from edgekd.registry import register\n"
        "raise SystemExit('imported')\n"
        "@register('dataset')\n"
        "def theirs(*, path: Path, size: int = 3):\n"
        "    'Their images.\\n\\n    More.'\n"
    )
    done = with_plugin(tmp_path, source, "list", "datasets", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = [row for row in json.loads(done.stdout)["datasets"] if row["name"] == "theirs"]
    assert found == {
        "name": "theirs",
        "summary": "Their images.",
        "options": {
            "path": {"type": "path", "default": None, "required": True},
            "size": {"type": "int", "default": 3, "required": False},
        },
    }


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("@register('dataset')\ndef digits(): ...", "error: dataset 'digits' is registered twice"),
        ("@register('dataset'\n", "cannot be read: '(' was never closed (theirs.py, line 1)"),
        ("@register('dataest')\ndef x(): ...", "cannot be read: line 2: 'dataest' is not a kind"),
        ("@register('dataset')\ndef x(*, a): ...", "cannot be read: line 2: the option 'a' has no annotation"),
        ("@register('dataset')\ndef x(*, a: Foo): ...", "cannot be read: name 'Foo' is not defined"),
        ("@register('dataset')\ndef x(*, a: int = f()): ...", "cannot be read: malformed node or string"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_read_is_named(tmp_path, source, what):
    done = with_plugin(tmp_path, source, "list", "datasets")
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == ""
    assert what in lines[0] and len(lines) == 3
    assert str(tmp_path / "theirs.py") in done.stderr
