"""How an ONNX file becomes an engine: a folder of files that a runner loads on the device.

A backend is one folder in two halves. `__init__.py` is the host's half: a class under `@register("backend", NAME)` that
keeps the contract below; its keyword-only parameters are the backend's options. `runner.py` is the device's half: it is
copied there as a file, so it imports nothing but the standard library, numpy and its runtime, and is Python 3.8. It has

    load(folder: str) -> Runner       # reads the options from <folder>/engine.json; raises when it cannot run as asked
    Runner.run(x) -> logits           # x float32 [B, C, H, W] -> float32 [B, K]
    Runner.facts                      # dict: runtime, version and what is really used (providers, threads); its values
                                      # are text, numbers, true, false or None, lists of these or one dict of these

A backend whose engine belongs to the very chip that runs it builds on the device: `compile` then writes what does so
there, a package `on_device` among it, which stands alone like a runner:

    python -m on_device . --key   # what an engine made here would belong to: an object in JSON as the last line
    python -m on_device .         # make the engine, unless one is there that fits; writes build.json, whose `files`
                                  # are those made: {name: [sha256, bytes]}. Exit status 1: refused, standard error
                                  # ends with the reasons

To add a backend, write such a folder; tests/backends/test_backend_conformance.py then tests it on arrival.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgekd.backends import loading
from edgekd.errors import MissingError
from edgekd.target import Target


@dataclass(frozen=True)
class Engine:
    """A compiled model: the `folder` that `compile` wrote, and the `runner` that loads it, with `libraries` beside."""

    name: str
    folder: Path
    runner: Path
    backend: str
    libraries: tuple[Path, ...] = ()


class Backend(ABC):
    """A runtime, or a compiler and its runtime."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    # On a device: `compile` only prepares the files, since the engine depends on the very chip that runs it.
    builds_on: ClassVar[Literal["host", "device"]]
    # Of one that builds on the device: the engine's file, and what else the build may leave, with the most bytes.
    built_engine: ClassVar[str] = ""
    built_files: ClassVar[Mapping[str, int]] = {}
    # The ONNX form that this backend runs fastest, for an activation with jumps ("any") and without ("continuous").
    forms: ClassVar[Mapping[Literal["any", "continuous"], str]]
    # How it wants a quantized model written, see edgekd.quantize.dialects.
    dialect: Literal["int8", "onnxruntime_uint8", "onnxruntime_int8"] = "int8"
    # Path of runner.py, and the packages of PyPI that it needs on a device beside numpy; `edgekd doctor` installs them.
    runner: ClassVar[Path]
    device_packages: ClassVar[tuple[str, ...]] = ()
    # A folder for what compiling one model learns for the next, and who is told how far it is: a share and a sentence.
    kept: Path | None = None
    # A file for what a compiler prints, which stays also when it fails; without one, errors show the last lines alone.
    log: Path | None = None
    on_progress: Callable[[float, str], None] = staticmethod(lambda share, text: None)

    @abstractmethod
    def available(self) -> str:
        """Empty when the backend can be used on this machine; else "why not: the command that mends it"."""

    def require(self) -> None:
        """Raise MissingError unless the backend can be used on this machine."""
        if reason := self.available():
            why, _, fix = reason.partition(": ")
            raise MissingError(
                f'backend "{self.name}" cannot be used here: {why}', allowed="what can be used: edgekd doctor", fix=fix
            )

    @classmethod
    def on_board(cls, options: Mapping[str, Any], target: Target) -> dict[str, Any]:
        """The options of this backend as they are meant on the target's board.

        Raises RecipeError for those that the board cannot have.
        """
        del target
        return dict(options)

    @property
    def runs_here(self) -> bool:
        """Whether what it compiles runs on this machine too, and can be measured for accuracy before it is deployed."""
        return self.builds_on == "host"

    def libraries(self) -> list[Path]:
        """Shared libraries that the runner finds beside itself where it runs, so that nothing is installed there.

        Raises MissingError when one cannot be had.
        """
        return []

    @abstractmethod
    def check(self, onnx: Path) -> list[str]:
        """What keeps this backend from running the model: one sentence each, naming the node; empty when nothing."""

    def examine(self, onnx: Path, log: Path) -> dict[str, Any]:
        """What can be known of a model before the device is reached; ready for JSON.

        log: a file for what a compiler prints, where there is one.

        Returns:
            evidence: on what the findings rest; findings: a row {node, rule, effect, reason, fix} each; compiled: None,
            or {refused: sentences, layers: rows {name, inputs, outputs, nodes}} and numbers.
        """
        del log
        row = {"node": "", "rule": "load", "effect": "rejected", "fix": "change the network, or choose another backend"}
        problems = [row | {"reason": problem} for problem in self.check(onnx)]
        return {"evidence": f"loaded_by_{self.name}", "findings": problems, "compiled": None}

    @abstractmethod
    def compile(self, onnx: Path, out: Path, *, threads: int) -> dict[str, Any]:
        """Write the engine's files into the existing folder `out`; return facts for the manifest.

        Raises MissingError when the runtime or a part of it is absent, StageError when the model cannot be compiled.
        """

    def build_commands(self, folder: Path, name: str) -> list[str]:
        """What builds the engine on a board from the `folder` of `compile`, called `name` there; for people."""
        del folder, name
        return []

    def built(self, folder: Path) -> dict[str, Any]:
        """What a build on the device made, read from the files that it left in `folder`; ready for JSON.

        Returns:
            evidence, version, seconds, size_bytes, identity (what the engine belongs to), layers: rows {layer,
            operator, asked, ran, kernel}, kernels: their number, alarms: sentences; and what else there is to tell.

        Raises StageError when the files are not what a build leaves.
        """
        raise NotImplementedError(f"{self.name} builds on the host")


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Write `engine.json`, from which the runner reads its options."""
    (out / "engine.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_runner(engine: Engine) -> Any:
    """Open an engine on this machine, by the very file that does so on the device; see above for what it returns."""
    return loading.load(str(engine.runner), str(engine.folder))
