"""From an ONNX file to the folder that goes to the device: compiled, or examined and prepared to be compiled there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekd.artifact import LOG, Store
from edgekd.backends import Backend
from edgekd.errors import StageError

# What a backend compiled: the folder that goes to the device, and nothing else of the artifact.
ENGINE = "engine"


def compiled(
    model: Path,
    out: Path,
    work: Path,
    backend: Backend,
    *,
    name: str,
    threads: int,
    store: Store,
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """Compile a model into out/engine, with what its compilers say in out/log.

    work: a folder where these logs stay when a compiler fails; name: of the model in errors; on_progress: told a share
    of 0 to 1.

    Returns:
        backend, facts of it, evidence, findings: rows {node, reason, fix} of what is taken but not as meant, compiled:
        None, or what a compiler said that is not the device's: {compiler, kernels, layers, alarms}; size_bytes of an
        engine that is made here.

    Raises StageError when the compiler refuses it or crashes, MissingError without the backend.
    """
    backend.log = work / f"{backend.name}.log"
    found: dict[str, Any] = {"evidence": "compiled_on_host", "findings": [], "compiled": None}
    if backend.builds_on == "device":
        found = examined(model, work / "examined.log", backend, name=name)
    on_progress(0.0, f"compiling for {backend.name}")
    folder = out / ENGINE
    folder.mkdir()
    backend.kept, backend.on_progress = store.cache("compile", [backend.name]), on_progress
    facts = backend.compile(model, folder, threads=threads)
    (out / LOG).mkdir()
    for log in work.glob("*.log"):
        if log.stat().st_size:  # many a compiler says nothing
            shutil.copyfile(log, out / LOG / log.name)
    made = {"size_bytes": size_of(folder)} if backend.builds_on == "host" else {}
    return {"backend": backend.name, "facts": facts, **found, **made}


def examined(model: Path, log: Path, backend: Backend, *, name: str) -> dict[str, Any]:
    """What is known of a model before its device is reached: {evidence, findings, compiled}. Raises StageError when the
    compiler there would refuse it; one that crashes or hangs here is another one and proves nothing.

    log: a file for what a compiler prints.
    """
    try:
        found = backend.examine(model, log)
    except StageError as error:
        problems = [{"node": "", "reason": one, "fix": "", "effect": "rejected"} for one in backend.check(model)]
        found = {"evidence": "linted", "findings": problems, "compiled": {"alarms": [error.what], "refused": []}}
    known = found["compiled"] or {}
    reasons = [
        f"{row['node']}: {row['reason']}; {row['fix']}" if row["node"] else row["reason"]
        for row in found["findings"]
        if row["effect"] == "rejected"
    ] or list(known.get("refused", ()))
    if reasons:
        raise StageError(
            f"backend {backend.name} cannot run {name}: {reasons[0]}",
            allowed=f"{len(reasons)} problem{'s' * (len(reasons) > 1)} in all",
            fix="change the network, or choose another backend: --backend NAME, see edgekd list backends",
        )
    told = {key: known[key] for key in ("compiler", "kernels", "alarms") if key in known}
    return {
        "evidence": found["evidence"],
        "findings": [{key: row[key] for key in ("node", "reason", "fix")} for row in found["findings"]],
        "compiled": {**told, "layers": known.get("precisions", [])} if known else None,
    }


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
