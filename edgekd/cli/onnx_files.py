"""`edgekd compile MODEL.onnx`: for a user who has an ONNX file and no recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import RecipeError, ResultInvalid

if TYPE_CHECKING:
    from edgekd.artifact import Artifact
    from edgekd.backends import Backend
    from edgekd.target import Target
    from edgekd.terminal import Terminal

TO_NAME = "name the board: --device ssh://USER@HOST"


def compile_file(model: Path, target: Target, device: str | None, store: Path, terminal: Terminal, json_: bool) -> None:
    """Compile a file for a target, have the board build the engine where it does so, time it, and print what came out.

    A board that is not named can only be compiled for.
    """
    from edgekd import onnx_file, registry
    from edgekd.artifact import Store
    from edgekd.bench.modes.single_stream import SingleStream
    from edgekd.compiling import ENGINE

    kept, url, choice = Store(store), device or target.device, target.choices[0]
    backend: Backend = registry.create("backend", choice.name, options=choice.options)
    builds_there = backend.builds_on == "device"
    reached = device is not None or target.board is None or target.device != "local:"
    built: Artifact | None = None
    timed, untimed = None, "" if reached else TO_NAME
    step = _Steps(terminal, 1 + reached * (1 + builds_there))
    with terminal.working():
        with step("compile"):
            made = onnx_file.compile_file(model, target, choice, kept, terminal.on_progress)
        if reached and builds_there:
            with step("build"):
                built = onnx_file.build_file(model, made, url, kept, terminal.on_progress)
            untimed = f"{built.result['module']} alone can run it there" if built.result.get("timed") else ""
        if reached and not untimed:
            with step("time"):
                try:
                    timed = onnx_file.time_file(
                        model, built or made, target, url, kept, SingleStream(), terminal.on_progress
                    )
                except RecipeError as error:
                    if built is None and device is not None:  # nothing but the timing was asked of it
                        raise
                    untimed = error.what
    engine, build = (built or made).file(ENGINE), built.result if built else None
    if json_:
        found = {"engine": str(engine), "result": made.result, "built": build, "timed": timed}
        print(json.dumps(found, indent=2))
    else:
        _show(made.result, build, terminal)
        _show_times(made.result["backend"], timed, untimed, terminal)
        if built is None and builds_there:
            for line in backend.build_commands(engine, engine.name):
                terminal.say(f"  on the board:  {line}")
        terminal.say(str(engine))
    if timed and timed["status"] == "INVALID":
        raise ResultInvalid(
            f"the measurement does not hold: {timed['reasons'][0]}",
            allowed=f"reasons: {len(timed['reasons'])}",
            fix="quiet the machine and measure again",
        )


class _Steps:
    """The steps of so many, as a pipeline shows its stages."""

    def __init__(self, terminal: Terminal, of: int) -> None:
        self.terminal, self.of, self.number = terminal, of, 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        from edgekd.pipeline import StageEvent

        self.number += 1
        self.terminal.on_stage(StageEvent(name, self.number, self.of, "run"))
        yield
        self.terminal.on_stage(StageEvent(name, self.number, self.of, "done"))


def _show(made: Mapping[str, Any], built: Mapping[str, Any] | None, terminal: Terminal) -> None:
    """What was compiled, by whom, and in which precision each layer runs. Only what exists has a size."""
    from edgekd.report.evidence import alarms_of, kernels_of, told_by_compiler

    if built is not None:
        identity = built["identity"]
        terminal.say(f"{built['module']} {built['version']} on {identity['device']}, built in {built['seconds']:.0f} s")
        if built["layers"]:
            rows = [[row[key] for key in ("layer", "operator", "asked", "ran")] for row in built["layers"]]
            terminal.table(("Layer", "Operator", "Asked for", "Ran in"), rows)
    found, facts = built or made, made["facts"]
    size = f"{found['size_bytes']:,} bytes" if "size_bytes" in found else "prepared; the board builds the engine"
    kernels = built["kernels"] if built else kernels_of(facts)
    size += f", {kernels} kernels" if kernels else ""
    version = "" if built else f" {facts['version']}"
    terminal.say(f"{made['backend']}{version}, {size}; {found['evidence']}")
    for what, said in told_by_compiler(facts).items():
        terminal.say(f"{what}: {said}")
    for alarm in built["alarms"] if built else alarms_of(made):
        terminal.say(f"alarm: {alarm}")
    for row in made["findings"]:
        terminal.say(f"slow: {row['node']}: {row['reason']}; {row['fix']}")
    for name, times in (built or {}).get("timed", {}).items():
        if "latency" in times:
            terminal.say(f"timed there, {name.replace('_', ' ')}: median {times['latency']['median']:.3f} ms")


def _show_times(backend: str, timed: Mapping[str, Any] | None, untimed: str, terminal: Terminal) -> None:
    if timed is None:
        terminal.say(f"not timed; {untimed}")
        return
    rows = [
        (name, *(f"{timed['latency'][model][key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
         f"{timed['accuracy'][model]['score']:.2%}")
        for name, model in ((backend, "student"), ("ONNX Runtime", "teacher"))
        if model in timed["latency"]
    ]  # fmt: skip
    terminal.table(("Runtime", "p50 ms", "p90 ms", "p99 ms", "Same class"), rows)
    for what, value in timed["engines"]["student"].get("parts_ms", {}).items():
        terminal.say(f"{what.replace('_', ' ')}: {value:.3f} ms")
    told = f"{timed['status']}, {timed['evidence']}"
    if timed["speedup"] is None:
        terminal.say(f"{told}: timed alone; same class as ONNX Runtime here")
        return
    low, high = timed["speedup"]["ci95"]
    terminal.say(f"{told}: {timed['speedup']['value']:.2f} times ONNX Runtime ({low:.2f} to {high:.2f})")
