"""An ONNX file without a recipe: compiled for a target, built on its board where that is done there, and timed."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd import building, compiling, registry
from edgekd.artifact import Artifact, Store, key_of, sha256_of
from edgekd.backends import Backend, Engine, load_runner
from edgekd.bench import benchmark
from edgekd.bench.modes import Mode
from edgekd.compiling import ENGINE
from edgekd.device import Device
from edgekd.errors import RecipeError, StageError
from edgekd.recipe import Choice
from edgekd.target import Target
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

STAGE, BUILD_STAGE = "onnx-file", "onnx-file-build"
REFERENCE = Choice("onnxruntime", {})
SAMPLES = 64
MEASURED = {"evidence": "measured_on_device"}
_log = logging.getLogger(__name__)
OnProgress = Callable[[float, str], None]


def compile_file(model: Path, target: Target, choice: Choice, store: Store, on_progress: OnProgress) -> Artifact:
    """What one of the target's backends makes of an ONNX file, or the store has of it; its result as `compiling` says.

    Raises RecipeError when there is no such file, MissingError without the backend, StageError for a model that it
    cannot compile.
    """
    if not model.is_file():
        raise RecipeError(f"{model}: there is no such file", allowed="expected: an ONNX model", fix="correct the path")
    backend: Backend = registry.create("backend", choice.name, options=choice.options)
    backend.require()
    from edgekd.backends import model_file

    spec = {"backend": choice.name, "options": choice.options, "threads": target.threads}
    key = key_of(STAGE, 4, spec, model_file.digests(model))
    with store.locked(key, on_wait=lambda: _log.warning("another run is compiling the same; waiting")):
        found = store.find(STAGE, key)
        if found is not None:
            return found

        def fill(out: Path) -> dict[str, Any]:
            result = compiling.compiled(
                model, out, store.work(key), backend,
                name=str(model), threads=target.threads, store=store, on_progress=on_progress,
            )  # fmt: skip
            return result | {"builds_on": backend.builds_on}

        made = store.publish(STAGE, key, fill, about=lambda: {"spec": spec, "created": _now()})
        store.clean_work(key)
        return made


def build_file(model: Path, compiled: Artifact, url: str, store: Store, on_progress: OnProgress) -> Artifact:
    """The engine that the board at `url` builds of a compiled file; its result as `Backend.built` says.

    The board is asked every time whether an engine that is kept still fits; one that does is stored once. Raises
    StageError in the board's own words.
    """
    spec, backend = compiled.manifest["spec"], _backend(compiled)
    work = store.work(compiled.key)
    log = work / f"{backend.name}.log"
    with tempfile.TemporaryDirectory(dir=work) as folder:
        built = Path(folder, ENGINE)
        made = building.build(
            compiled.file(ENGINE), built, backend, _device(url, store), store,
            name=str(model), digest=compiled.digest, log=log, on_progress=on_progress,
        )  # fmt: skip

        def fill(out: Path) -> dict[str, Any]:
            shutil.copytree(built, out / ENGINE)
            return made

        said = {"engine": compiled.digest, "built": sha256_of(built / building.RESULT)}
        key = key_of(BUILD_STAGE, 2, {"url": url}, said)
        with store.locked(key, on_wait=lambda: _log.warning("another run is storing the same; waiting")):
            found = store.find(BUILD_STAGE, key)
            if found is None:
                found = store.publish(BUILD_STAGE, key, fill, about=lambda: {"spec": spec, "created": _now()})
                store.clean_work(key)
    log.unlink(missing_ok=True)  # kept of what failed; another run of the same may have been there first
    return replace(found, manifest={**found.manifest, "result": made})


def time_file(
    model: Path, compiled: Artifact, target: Target, url: str, store: Store, mode: Mode, on_progress: OnProgress
) -> dict[str, Any]:
    """What `benchmark` finds of a compiled model as `student`, against ONNX Runtime running the same file as `teacher`;
    an engine that its board built is timed alone, since such a board has no ONNX Runtime.

    They are asked about random images; `accuracy` is how often an engine names the class that ONNX Runtime names here,
    `evidence` the level of what was timed; `settings`, `latency` and all else are as in a report. Raises RecipeError
    for a model that is not from images [B, C, H, W] to logits [B, K].
    """
    reference = compile_file(model, target, REFERENCE, store, on_progress)
    images = random_images(model)
    try:
        run = load_runner(_engine("teacher", reference)).run
        expected = np.concatenate([run(images[at : at + 1]) for at in range(len(images))])
    except Exception as error:  # ONNX Runtime's own, which have no common class
        raise StageError(
            f"ONNX Runtime cannot run {model}: {(str(error).splitlines() or [type(error).__name__])[0]}",
            allowed=f"it was asked about random images {list(images[:1].shape)}",
            fix="see whether the sizes in the model fit together, and export it again",
        ) from error
    if expected.ndim != 2 or len(expected) != len(images):
        raise _unfit(model, f"answers one image with {[1, *expected.shape[1:]]}")
    judge = Judge(Classification(), expected.argmax(1), expected.shape[1:])
    beside = None if compiled.stage == BUILD_STAGE else _engine("teacher", reference)
    with tempfile.TemporaryDirectory() as workdir:
        found = benchmark(
            _engine("student", compiled), beside, samples=images, judge=judge, device=_device(url, store),
            workdir=Path(workdir), mode=mode, on_progress=lambda share, left_s, text: on_progress(share, text),
        )  # fmt: skip
    return found | MEASURED


def random_images(model: Path) -> npt.NDArray[np.float32]:
    """Standard normal numbers for a model's input: float32 [N, C, H, W]."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    (image,) = (value for value in graph.input if value.name not in constants)
    shape = [dimension.dim_value for dimension in image.type.tensor_type.shape.dim]
    if len(shape) != 4 or shape[0] > 1 or 0 in shape[1:]:
        raise _unfit(model, f"takes {image.name} {shape}, where 0 is left open")
    return np.random.default_rng(0).standard_normal((SAMPLES, *shape[1:])).astype(np.float32)


def _backend(compiled: Artifact) -> Backend:
    spec = compiled.manifest["spec"]
    made: Backend = registry.create("backend", spec["backend"], options=spec["options"])
    return made


def _device(url: str, store: Store) -> Device:
    return Device(url, store.root / "work" / "local")


def _engine(name: str, compiled: Artifact) -> Engine:
    backend = _backend(compiled)
    return Engine(name, compiled.file(ENGINE), backend.runner, backend.name, tuple(backend.libraries()))


def _unfit(model: Path, what: str) -> RecipeError:
    return RecipeError(
        f"{model} cannot be timed: it {what}",
        allowed="expected: images [B, C, H, W] to logits [B, K], B being 1 or open and nothing else",
        fix="leave out --device to compile it only",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
