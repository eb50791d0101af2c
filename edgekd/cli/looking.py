"""The commands that look: at what there is, at this machine, at a run that was."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgekd.cli.options import STORE, ColorOption, DebugOption, JsonOption, StoreOption, terminal_of
from edgekd.cli.running import written
from edgekd.errors import unknown

KINDS = (
    "datasets", "networks", "activations", "methods", "quantizers", "backends", "transports", "targets", "recipes",
    "calib",
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
    from edgekd.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


def doctor(
    device: Annotated[str, typer.Option("--device", metavar="URL", help="The machine to look at.")] = "local:",
    store: StoreOption = STORE, json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Say what is there and what is missing, with the command that installs it."""
    from edgekd import catalog

    found = catalog.health(device, store)
    if json_:
        print(json.dumps(found, indent=2))
        return
    terminal_of(no_color).table(
        ("what", "found", "to mend it"), [(row["what"], row["found"], row["fix"]) for row in found]
    )
