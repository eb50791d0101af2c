"""Targets: what a good one means, and what every bad one gets."""

from __future__ import annotations

import dataclasses

import pytest

from edgekd import registry, target
from edgekd.backends.tensorrt.on_device.board import JETPACKS
from edgekd.errors import RecipeError

GOOD = """\
name: mine
backends:
- onnxruntime: {graph_optimization: basic}
- "null"
threads: 2
"""


@pytest.mark.parametrize("name", target.names())
def test_shipped_targets_load(name):
    made = target.load(name)
    assert made.name == name and made.description


@pytest.mark.parametrize("alias", target.ALIASES)
def test_an_alias_is_the_target_that_it_names(alias):
    assert target.load(alias) == target.load(target.ALIASES[alias])
    assert alias not in target.names()


@pytest.mark.parametrize("name", [name for name in target.names() if name.startswith("jetson-")])
def test_a_jetson_says_what_its_engines_depend_on(name):
    board = target.load(name).board
    assert board is not None and board.soc.startswith("tegra")
    assert JETPACKS[board.l4t] == board.jetpack
    assert board.compute_capability is not None and board.dla_cores is not None


def test_the_options_of_backends_are_completed(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    first, second = target.load(str(file)).choices
    assert first.options["graph_optimization"] == "basic"
    assert first.options.keys() == registry.entry("backend", "onnxruntime").options.keys()
    assert second == ("null", {"latency_ms": 0.0})


@pytest.mark.parametrize("text", ["tvm", "{tvm: {tuning: quick}}"])
def test_a_backend_on_the_command_line_is_for_the_targets_processor(text):
    (choice,) = target.with_backend(target.load("raspberry-pi-5"), text).choices
    assert (choice.name, choice.options["arch"], choice.options["cpu"]) == ("tvm", "aarch64", "cortex-a76")
    assert choice.options["tuning"] == ("none" if text == "tvm" else "quick")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (("threads: 2", "threds: 2"), [
            "error: mine.yaml:5: threds is not a known key",
            '       known: backends, board, description, device, name, opset, threads   (closest: "threads")',
            "fix:   write threads, or see the shipped targets: edgekd list targets"]),
        (("threads: 2", "threads: 0"), [
            "error: mine.yaml:5: threads = 0 is not valid",
            "       expected: int; threads of one inference   (should be greater than or equal to 1)",
            "fix:   correct threads, or see the shipped targets: edgekd list targets"]),
        (("name: mine\n", ""), [
            "error: mine.yaml: name is missing",
            "       expected: str",
            "fix:   add name, or see the shipped targets: edgekd list targets"]),
        (("onnxruntime: {graph_optimization: basic}", "onnxrt"), [
            'error: mine.yaml:3: backends.0 = "onnxrt" is not a known backend',
            f'       known: {", ".join(sorted(registry.names("backend")))}   (closest: "onnxruntime")',
            'fix:   set backends.0 = "onnxruntime", or see: edgekd list backends']),
        (("graph_optimization", "graph"), [
            "error: mine.yaml:3: backends.0.onnxruntime.graph is not a known key or option of backend onnxruntime",
            "       known: codes, graph_optimization, lma_table, providers",
            "fix:   see: edgekd list backends"]),
        (('"null"', "{}"), [
            "error: mine.yaml:4: backends.1 must name one backend, not 0",
            "       expected: NAME, or {NAME: {option: value}}",
            "fix:   name one, see: edgekd list backends"]),
        (('"null"', "null"), [
            "error: mine.yaml:4: backends.1 = null is not valid",
            "       expected: list of str | mapping; in order of preference: NAME, or {NAME: {option: value}}"
            "   (should be a valid string)",
            "fix:   correct backends.1, or see the shipped targets: edgekd list targets"]),
    ],
)  # fmt: skip
def test_what_a_bad_target_gets(tmp_path, monkeypatch, change, lines):
    monkeypatch.chdir(tmp_path)
    assert change[0] in GOOD
    (tmp_path / "mine.yaml").write_text(GOOD.replace(*change, 1))
    with pytest.raises(RecipeError) as caught:
        target.load("mine.yaml")
    assert str(caught.value).splitlines() == lines


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("lcal", [
            'error: target = "lcal" is not a known target',
            f'       known: {", ".join(target.names())}   (closest: "local")',
            'fix:   use "local", or see: edgekd list targets, or name a .yaml file']),
        ("nope.yaml", [
            "error: the target nope.yaml cannot be read: No such file or directory",
            "       expected: a YAML file in UTF-8",
            "fix:   see: edgekd list targets, or name a .yaml file"]),
    ],
)  # fmt: skip
def test_a_target_that_is_not_there(tmp_path, monkeypatch, source, lines):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        target.load(source)
    assert str(caught.value).splitlines() == lines


@pytest.mark.parametrize(
    ("cores", "asked", "allowed"), [(0, 0, "-1; -1 is the GPU alone"), (2, 2, "-1, 0, 1; -1 is the GPU alone")]
)
def test_an_accelerator_that_the_board_has_not_got(tmp_path, cores, asked, allowed):
    file = tmp_path / "mine.yaml"
    board = f"{{soc: tegra234, memory_gb: [8], dla_cores: {cores}}}"
    file.write_text(f"name: mine\nbackends: [tensorrt: {{dla_core: {asked}}}]\nboard: {board}\n")
    with pytest.raises(RecipeError) as caught:
        target.load(str(file))
    assert str(caught.value).splitlines() == [
        f"error: tensorrt.dla_core = {asked}: target mine has {cores} deep learning accelerators",
        f"       allowed: {allowed}",
        "fix:   leave dla_core out, or name another board",
    ]
    if cores:
        file.write_text(file.read_text().replace(f"dla_core: {asked}", "dla_core: 1"))
        assert target.load(str(file)).choices[0].options["dla_core"] == 1


@pytest.mark.parametrize(
    ("name", "gpu"), [("jetson", "sm_87"), ("jetson-agx-thor", "sm_110"), ("jetson-nano", "sm_53")]
)
def test_a_backend_takes_the_boards_gpu_and_the_targets_own_options(name, gpu):
    plain = target.load(name)
    (own,) = (choice.options for choice in plain.choices if choice.name == "tvm")
    (chosen,) = target.with_backend(plain, "{tvm: {gpu: board}}").choices
    assert chosen == ("tvm", own | {"gpu": gpu})
    assert target.with_backend(plain, f"{{tvm: {{gpu: {gpu}}}}}").choices == [chosen]


@pytest.mark.parametrize(
    ("name", "gpu", "lines"),
    [
        ("local", "board", [
            "error: tvm.gpu = board: target local does not say which GPU its board has",
            "       expected: a GPU by nvcc's name for it, as sm_87; nvcc --list-gpu-code has all",
            "fix:   name it, or give the target a board with its compute_capability"]),
        ("jetson", "sm_90", [
            "error: tvm.gpu = sm_90: the board of target jetson-orin-nano is sm_87",
            "       allowed: sm_87, or board, which is the same",
            "fix:   set gpu = board, or name another target"]),
    ],
)  # fmt: skip
def test_a_gpu_that_the_board_has_not_got(name, gpu, lines):
    with pytest.raises(RecipeError) as caught:
        target.with_backend(target.load(name), f"{{tvm: {{gpu: {gpu}}}}}")
    assert str(caught.value).splitlines() == lines


def test_what_a_board_has_is_asked_of_the_backend(monkeypatch):
    """An option called `gpu` means what its own backend says, and no other."""
    entry = dataclasses.replace(registry.entry("backend", "null"), options=registry.entry("backend", "tvm").options)
    monkeypatch.setitem(registry._table()["backend"], "null", entry)
    (chosen,) = target.with_backend(target.load("jetson"), "{'null': {gpu: the big one}}").choices
    assert chosen.options["gpu"] == "the big one"


def test_a_backend_whose_options_are_none():
    with pytest.raises(RecipeError) as caught:
        target.with_backend(target.load("local"), "{tvm: quick}")
    assert str(caught.value).splitlines() == [
        'error: --backend = {"tvm": "quick"} is not valid',
        "       expected: NAME, or {NAME: {option: value}}",
        "fix:   name its option, see: edgekd list backends",
    ]


def test_a_gpu_of_ones_own_machine_is_named():
    (chosen,) = target.with_backend(target.load("local"), "{tvm: {gpu: sm_90}}").choices
    assert chosen.options["gpu"] == "sm_90"
