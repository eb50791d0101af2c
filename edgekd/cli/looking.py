"""The commands that look: at what there is, at this machine, at a run that was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli.options import (
    STORE,
    BackendOption,
    ColorOption,
    DebugOption,
    JsonOption,
    StoreOption,
    TargetOption,
    WhereOption,
    terminal_of,
)
from edgekd.cli.outcome import written
from edgekd.errors import RecipeError, StageError, unknown

if TYPE_CHECKING:
    from edgekd.terminal import Terminal

KINDS = (
    "tasks", "datasets", "corruptions", "networks", "activations", "methods", "quantizers", "backends", "transports",
    "modes", "targets", "recipes", "calib", "devices",
)  # fmt: skip


def report(
    run: Annotated[str | None, typer.Argument(help="A run's id. Default: the newest run.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    store: StoreOption = STORE, json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Write the report of a run again and print where it is."""
    from edgekd.artifact import Store

    document, path = written(Store(store), run)
    if open_:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    print(document.to_json() if json_ else path)


def list_(
    kind: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = None,
    json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """List what there is: networks, activations, methods, backends, targets... with their options and defaults."""
    from edgekd import catalog

    if f"{kind}s" in KINDS:
        kind = f"{kind}s"
    if kind is not None and kind not in KINDS:
        raise unknown("KIND", kind, KINDS, noun="kind of thing", fix="see all: edgekd list")
    listed = {name: catalog.rows(name) for name in ([kind] if kind else KINDS)}
    if json_:
        print(json.dumps(listed, indent=2, default=str))
        return
    terminal = terminal_of(no_color)
    for name, rows in listed.items():
        terminal.entries(name, [(row["name"], row["summary"], catalog.options_text(row)) for row in rows])


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from edgekd.recipe_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def doctor(
    device: Annotated[
        str,
        typer.Option("--device", metavar="URL|NAME|tag:TAG|all", help="What to look at; names as in ./devices.yaml."),
    ] = "local:",
    target: WhereOption = None, backend: BackendOption = None,
    install: Annotated[
        bool, typer.Option("--install", help="Install there, into a venv, what runs the target's engines.")
    ] = False,
    store: StoreOption = STORE, json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Say what is there and what is missing, with the command that installs it."""
    from edgekd import catalog, inventory

    found = catalog.health(inventory.places([device]), store, wanted=target, backend=backend, install=install)
    if json_:
        print(json.dumps(found, indent=2))
        return
    terminal_of(no_color).table(
        ("what", "found", "to mend it"), [(row["what"], row["found"], row["fix"]) for row in found]
    )


def check(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file, of edgekd or not.")],
    target: TargetOption = "jetson",
    log: Annotated[Path, typer.Option("--log", help="Where to write what the compiler prints.")] = Path("check.log"),
    json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Say what a target's compiler would refuse of a model or run slowly, with the reason and what mends it."""
    from edgekd import backends, registry
    from edgekd import target as targets

    if not model.is_file():
        raise RecipeError(
            f"{model}: there is no such file",
            allowed="expected: the path of an ONNX model",
            fix="export one: edgekd export, then see .edgekd/store/onnx-student",
        )
    choice = targets.load(target).choices[0]
    backend: backends.Backend = registry.create("backend", choice.name, options=choice.options)
    found = backend.examine(model, log)
    refused = [row for row in found["findings"] if row["effect"] == "rejected"]
    compiled = found["compiled"] or {}
    if json_:
        print(json.dumps(found, indent=2))
    else:
        _show_examined(found, terminal_of(no_color))
    if refused or compiled.get("refused"):
        raise StageError(
            f"{target} would refuse {model}: {refused[0]['reason'] if refused else compiled['refused'][0]}",
            allowed=f"{max(len(refused), 1)} to mend; what is known: {found['evidence']}",
            fix=refused[0]["fix"] if refused else f"see {log}",
        )


def _show_examined(found: dict[str, Any], terminal: Terminal) -> None:
    findings, compiled = found["findings"], found["compiled"] or {}
    if findings:
        rows = [(row["node"], row["effect"], row["reason"], row["fix"]) for row in findings]
        terminal.table(("node", "effect", "reason", "to mend it"), rows)
    if layers := compiled.get("layers"):
        kernels = [
            (row["name"], " ".join(row["inputs"]), " ".join(row["outputs"]),
             " ".join(node for node in row["nodes"] if not node.lower().endswith("quantizelinear")))
            for row in layers
        ]  # fmt: skip
        terminal.table(("kernel", "reads", "makes", "of the nodes"), kernels)
    for alarm in compiled.get("alarms", ()):
        terminal.say(f"alarm: {alarm}")
    for reason in compiled.get("refused", ()):
        terminal.say(f"{compiled['compiler']} refuses it: {reason}")
    told = f"{len(findings) or 'no'} finding{'s' * (len(findings) != 1)}; {found['evidence']}"
    if compiled.get("kernels"):
        told += (
            f": {compiled['int8_convolutions']} of {compiled['convolutions']} convolutions and"
            f" {compiled['int8_products']} of {compiled['products']} products in INT8, {compiled['kernels']} kernels"
        )
    terminal.say(told)
