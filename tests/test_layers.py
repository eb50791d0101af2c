"""What imports what: the order below is the one place where the layers are written."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgekd

# A module imports only from those above it. A package stands for everything in it.
LAYERS = (
    "errors", "yamlfile", "documents", "schedule", "registry", "artifact", "recipe", "recipe_schema", "target",
    "inventory", "marks", "stats", "tasks", "data", "activations", "networks", "methods",
    "learning_rate", "checkpoint", "teacher_logits", "training_log", "distill", "parity", "export", "quantize",
    "backends", "compiling", "device", "building", "bench", "kit", "onnx_file", "stages", "preflight", "stage_table",
    "pipeline", "importing", "report", "catalog", "starter", "terminal", "cli", "__main__",
)  # fmt: skip
# Copied to the device as files, or run as one: they import nothing of edgekd.
STAND_ALONE = (
    "agent",
    "backends.loading",
    "device.porter",
    "device.signers",
    "kit.run",
    "backends.null.runner",
    "backends.onnxruntime.runner",
    "backends.openvino.runner",
    "backends.tensorrt.runner",
    "backends.tvm.runner",
    "backends.tensorrt.on_device",
)
# Where heavy packages may be imported; a name with a dot is one module, others are packages with all in them.
HEAVY = {
    "torch": (
        "tasks", "data.batches", "activations", "networks", "methods", "checkpoint", "teacher_logits", "training_log",
        "distill", "parity", "export", "quantize.quantizers", "quantize.capture", "quantize.pt2e", "quantize.qat",
        "quantize.buckets", "quantize.quantized_distillation", "stages", "preflight",
    ),
    "torchao": ("quantize.pt2e",),
    "networkx": ("methods.partition",),
    "openvino": ("backends.openvino",),
    "tvm": ("backends.tvm",),
    "accelerate": ("teacher_logits", "distill", "stages", "pipeline"),
    "onnx": ("activations", "export", "quantize", "backends", "onnx_file", "stages"),
    "onnxruntime": ("backends.onnxruntime", "quantize.sessions"),
    "mlperf_loadgen": ("bench.loadgen",),
    "typer": ("cli",),
    "rich": ("terminal",),
    "matplotlib": ("report",),
    "jinja2": ("report",),
    "yaml": ("yamlfile", "data.calibration"),
}  # fmt: skip
MAX_LINES = 450
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}

ROOT = Path(edgekd.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    """`data.batches` for edgekd/data/batches.py; empty for edgekd/__init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(file): file for file in FILES}


def imports(file: Path, *, at_top: bool = False, for_types: bool = False) -> Iterator[str]:
    """Full names of all that is imported, also inside functions; of the top level only when `at_top`, there with what
    is imported for types alone when `for_types`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typed = [one for node in tree.body if isinstance(node, ast.If) for one in node.body] if for_types else []
    for node in [*tree.body, *typed] if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # the agent's own: it does not know what folder it is copied into
                yield file.parent.name
                continue
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("edgekd.") in MODULES else str(node.module)


def own_imports(file: Path, **options) -> set[str]:
    """The modules of edgekd that are imported, without the prefix."""
    return {
        name.removeprefix("edgekd").removeprefix(".")
        for name in imports(file, **options)
        if name.partition(".")[0] == "edgekd"
    }


def layer(module: str) -> int:
    top = module.partition(".")[0]
    assert top in LAYERS, f"{top} has no layer yet: give it one in LAYERS"
    return LAYERS.index(top)


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("module", [name for name in MODULES if name and not within(name, STAND_ALONE)])
def test_a_module_imports_only_from_the_layers_above_it(module):
    below = [other for other in own_imports(MODULES[module]) if other and layer(other) > layer(module)]
    assert not below


def test_every_layer_is_there():
    tops = {name.partition(".")[0] for name in MODULES if name} - {"agent"}
    assert tops == set(LAYERS)


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, STAND_ALONE)])
def test_what_is_copied_to_the_device_stands_alone(module):
    runtimes = {"backends.onnxruntime": "onnxruntime", "backends.openvino": "openvino"}
    runtime = {package for folder, package in runtimes.items() if within(module, (folder,))}
    decoder = {"PIL"} if module == "agent.pictures" else set()  # for images in an image format, where it is there
    beside = {"kit.run": {"signers"}, "device.porter": {"device"}}.get(module, {"agent", "on_device"})
    allowed = {"numpy", *beside, *runtime, *decoder, *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in imports(MODULES[module])} <= allowed


def test_all_runners_are_known_here():
    runners = {name for name in MODULES if name.startswith("backends.") and name.endswith(".runner")}
    assert runners == {name for name in STAND_ALONE if name.endswith(".runner")}


def test_there_are_no_circles():
    graph = {name: own_imports(file, at_top=True, for_types=True) - {name, ""} for name, file in MODULES.items()}
    # A package's __init__ is loaded before what is in it: an edge from the inside to it is not an import of ours.
    graph = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in graph.items()}
    while graph:
        free = {name for name, others in graph.items() if not others & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_only_where_they_belong(package):
    importers = {
        name for name, file in MODULES.items() if any(one.partition(".")[0] == package for one in imports(file))
    }
    assert importers and not [name for name in importers if not within(name, HEAVY[package])]


@pytest.mark.parametrize(
    "module", ["stages", "stage_table", "pipeline", "cli", "terminal", "catalog", "registry", "recipe"]
)
def test_what_a_dry_run_needs_imports_nothing_heavy_at_the_top(module):
    tops = {name.partition(".")[0] for name in imports(MODULES[module], at_top=True)}
    assert not tops & {"torch", "accelerate", "onnx", "onnxruntime", "sklearn", "matplotlib", "jinja2"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_names_say_something():
    names = {part for name in MODULES for part in name.split(".")}
    assert not names & VAGUE
