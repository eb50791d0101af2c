"""An ONNX file without a recipe: compiled for a target, and timed there against ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd import registry
from edgekd.artifact import Artifact, Store, key_of, sha256_of
from edgekd.backends import Backend, Engine, load_runner
from edgekd.bench import benchmark
from edgekd.bench.modes import Mode
from edgekd.device import Device
from edgekd.errors import RecipeError, StageError
from edgekd.recipe import Choice
from edgekd.target import Target
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

STAGE, FOLDER = "onnx-file", "engine"
REFERENCE = Choice("onnxruntime", {})
SAMPLES = 64
_log = logging.getLogger(__name__)
OnProgress = Callable[[float, str], None]


def compile_file(model: Path, target: Target, choice: Choice, store: Store, on_progress: OnProgress) -> Artifact:
    """The engine of an ONNX file, made by one of the target's backends or taken from the store.

    Raises RecipeError when there is no such file, MissingError without the backend, StageError for a model that it
    cannot compile.
    """
    if not model.is_file():
        raise RecipeError(f"{model}: there is no such file", allowed="expected: an ONNX model", fix="correct the path")
    backend: Backend = registry.create("backend", choice.name, options=choice.options)
    backend.require()
    spec = {"backend": choice.name, "options": choice.options, "threads": target.threads}
    key = key_of(STAGE, 1, spec, {"onnx": sha256_of(model)})
    with store.locked(key, on_wait=lambda: _log.warning("another run is compiling the same; waiting")):
        found = store.find(STAGE, key)
        if found is not None:
            return found
        backend.kept = store.cache("compile", [backend.name])
        backend.on_progress = on_progress

        def fill(out: Path) -> dict[str, Any]:
            problems = backend.check(model)
            if problems:
                raise StageError(
                    f"backend {backend.name} cannot run {model}: {problems[0]}",
                    allowed=f"{len(problems)} problem{'s' * (len(problems) > 1)} in all",
                    fix="choose another backend: --backend NAME",
                )
            folder = out / FOLDER
            folder.mkdir()
            facts = backend.compile(model, folder, threads=target.threads)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            return {"backend": backend.name, "builds_on": backend.builds_on, "facts": facts, "size_bytes": size}

        return store.publish(STAGE, key, fill, about=lambda: {"spec": spec, "created": _now()})


def time_file(
    model: Path, compiled: Artifact, target: Target, url: str, store: Store, mode: Mode, on_progress: OnProgress
) -> dict[str, Any]:
    """What `benchmark` finds of a compiled model as `student`, against ONNX Runtime running the same file as `teacher`.

    Both are asked about random images; `accuracy` is how often an engine names the class that ONNX Runtime names here,
    and `settings`, `latency` and all else are as in a report. Raises RecipeError for a model that is not from images
    [B, C, H, W] to logits [B, K].
    """
    reference = compile_file(model, target, REFERENCE, store, on_progress)
    images = random_images(model)
    run = load_runner(_engine("teacher", reference)).run
    expected = np.concatenate([run(images[at : at + 1]) for at in range(len(images))])
    if expected.ndim != 2 or len(expected) != len(images):
        raise _unfit(model, f"answers one image with {[1, *expected.shape[1:]]}")
    judge = Judge(Classification(), expected.argmax(1), expected.shape[1:])
    with tempfile.TemporaryDirectory() as workdir:
        return benchmark(
            _engine("student", compiled), _engine("teacher", reference), samples=images, judge=judge,
            device=Device(url, store.root / "work" / "local"), workdir=Path(workdir), mode=mode,
            on_progress=lambda share, left_s, text: on_progress(share, text),
        )  # fmt: skip


def random_images(model: Path) -> npt.NDArray[np.float32]:
    """Standard normal numbers for a model's input: float32 [N, C, H, W]."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    shape = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(shape) != 4 or shape[0] > 1 or 0 in shape[1:]:
        raise _unfit(model, f"takes {', '.join(value.name for value in inputs)} {shape}, where 0 is left open")
    return np.random.default_rng(0).standard_normal((SAMPLES, *shape[1:])).astype(np.float32)


def _engine(name: str, compiled: Artifact) -> Engine:
    spec = compiled.manifest["spec"]
    backend: Backend = registry.create("backend", spec["backend"], options=spec["options"])
    return Engine(name, compiled.file(FOLDER), backend.runner, backend.name, tuple(backend.libraries()))


def _unfit(model: Path, what: str) -> RecipeError:
    return RecipeError(
        f"{model} cannot be timed: it {what}",
        allowed="expected: images [B, C, H, W] to logits [B, K], B being 1 or open and nothing else",
        fix="leave out --device to compile it only",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
