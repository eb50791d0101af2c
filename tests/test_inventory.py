"""devices.yaml: what --device means, and what every bad one gets."""

from __future__ import annotations

import json

import pytest

from edgekd import inventory
from edgekd.errors import RecipeError
from edgekd.inventory import Place

GOOD = """\
devices:
  desk-pi:
    url: ssh://pi@desk
    target: raspberry-pi-5
    tags: [arm, desk]
  box: {url: "local:", tags: [desk]}
"""
PI, BOX = Place("desk-pi", "ssh://pi@desk", "raspberry-pi-5"), Place("box", "local:", None)


@pytest.fixture
def devices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.yaml").write_text(GOOD)
    return tmp_path / "devices.yaml"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["desk-pi"], [PI]),
        (["tag:arm"], [PI]),
        (["tag:desk"], [PI, BOX]),
        (["all"], [PI, BOX]),
        (["box", "desk-pi", "box", "all"], [BOX, PI]),
        (["ssh://a@b.c:22?python=/x"], [Place("a-b-c-22", "ssh://a@b.c:22?python=/x")]),
        (["local:", "local:?python=/x"], [Place("local-1", "local:"), Place("local-2", "local:?python=/x")]),
        ([], []),
    ],
)
def test_what_device_means(devices, given, meant):
    assert inventory.places(given) == meant


def test_without_an_inventory_urls_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inventory.places(["local:"]) == [Place("local", "local:")]
    with pytest.raises(RecipeError) as caught:
        inventory.places(["pi"])
    assert str(caught.value).split("\n")[1:] == [
        "       known: none",
        "fix:   give a URL, as in ssh://pi@raspberrypi.local, or name it in ./devices.yaml",
    ]


@pytest.mark.parametrize("text", ["desk_pi", "tag:arn", "desk", "al"])
def test_a_device_that_is_not_listed(devices, text):
    with pytest.raises(RecipeError) as caught:
        inventory.places([text])
    what, known, _ = str(caught.value).split("\n")
    assert what == f'error: --device = "{text}" is not a known device'
    assert known.startswith("       known: all, box, desk-pi, tag:arm, tag:desk")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (("url: ssh", "uri: ssh"), [
            "error: devices.yaml:3: devices.desk-pi.uri is not a known key",
            '       known: tags, target, url   (closest: "url")',
            "fix:   write devices.desk-pi.url, or see docs/boards.md: Several boards"]),
        (("[arm, desk]", "arm"), [
            'error: devices.yaml:5: devices.desk-pi.tags = "arm" is not valid',
            "       expected: list of str; for --device tag:TAG   (should be a valid array)",
            "fix:   correct devices.desk-pi.tags, or see docs/boards.md: Several boards"]),
        (("devices:", "device:"), [
            "error: devices.yaml:1: device is not a known key",
            '       known: devices   (closest: "devices")',
            "fix:   write devices, or see docs/boards.md: Several boards"]),
    ],
)  # fmt: skip
def test_an_inventory_that_cannot_be_meant(devices, change, lines):
    devices.write_text(GOOD.replace(*change, 1))
    with pytest.raises(RecipeError) as caught:
        inventory.places(["all"])
    assert str(caught.value).split("\n") == lines


def test_they_are_listed(devices, main):
    code, out, err = main("list", "devices")
    assert (code, err) == (0, "")
    assert "desk-pi  ssh://pi@desk, target raspberry-pi-5, tag:arm, tag:desk" in out


def test_the_doctor_sees_each(devices, main):
    devices.write_text(GOOD.replace("ssh://pi@desk", "ssh://nobody@127.0.0.1:1"))
    code, out, err = main("doctor", "--device", "all", "--json")
    found = {row["what"]: row for row in json.loads(out)}
    assert (code, err) == (0, "")
    assert found["local: in use"]["found"] == "by nobody"
    assert "the connection is refused" in found["ssh://nobody@127.0.0.1:1 device"]["found"]
    assert main("doctor", "--device", "desk-pi")[0] == 3
