"""`edgekd compile MODEL.onnx`: for a user who has an ONNX file and no recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import ResultInvalid

if TYPE_CHECKING:
    from edgekd.artifact import Artifact
    from edgekd.target import Target
    from edgekd.terminal import Terminal


def compile_file(model: Path, target: Target, device: str | None, store: Path, terminal: Terminal, json_: bool) -> None:
    """Compile a file for a target, print where the engine is, and time it where there is a device."""
    from edgekd import onnx_file
    from edgekd.artifact import Store
    from edgekd.bench.modes.single_stream import SingleStream

    kept, url = Store(store), device or target.device
    timed: dict[str, Any] | None = None
    with terminal.working():
        with _step("compile", 1, terminal):
            made = onnx_file.compile_file(model, target, target.choices[0], kept, terminal.on_progress)
        # A board that is not named can only be compiled for; so can one that has to build the engine itself.
        if (device is not None or target.board is None) and made.result["builds_on"] == "host":
            with _step("time", 2, terminal):
                mode = SingleStream()
                timed = onnx_file.time_file(model, made, target, url, kept, mode, terminal.on_progress)
    engine = made.file(onnx_file.FOLDER)
    if json_:
        print(json.dumps({"engine": str(engine), "result": made.result, "timed": timed}, indent=2))
    else:
        _show(made, timed, terminal)
        terminal.say(str(engine))
    if timed and timed["status"] == "INVALID":
        raise ResultInvalid(
            f"the measurement does not hold: {timed['reasons'][0]}",
            allowed=f"reasons: {len(timed['reasons'])}",
            fix="quiet the machine and measure again",
        )


@contextmanager
def _step(name: str, number: int, terminal: Terminal) -> Iterator[None]:
    from edgekd.pipeline import StageEvent

    terminal.on_stage(StageEvent(name, number, 2, "run"))
    yield
    terminal.on_stage(StageEvent(name, number, 2, "done"))


def _show(made: Artifact, timed: dict[str, Any] | None, terminal: Terminal) -> None:
    terminal.say(f"{made.result['backend']}, {made.result['size_bytes']:,} bytes")
    if timed is None:
        why = (
            "the board builds it"
            if made.result["builds_on"] == "device"
            else "name the board: --device ssh://USER@HOST"
        )
        terminal.say(f"not timed; {why}")
        return
    rows = [
        (name, *(f"{timed['latency'][model][key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms")),
         f"{timed['accuracy'][model]['score']:.2%}")
        for name, model in ((made.result["backend"], "student"), ("ONNX Runtime", "teacher"))
    ]  # fmt: skip
    terminal.table(("Runtime", "p50 ms", "p90 ms", "p99 ms", "Same class"), rows)
    low, high = timed["speedup"]["ci95"]
    terminal.say(f"{timed['status']}: {timed['speedup']['value']:.2f} times ONNX Runtime ({low:.2f} to {high:.2f})")
