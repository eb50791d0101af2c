"""Engines that are built on the very board that runs them: sent, built, fetched, and kept for boards like it."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import Store, sha256_of
from edgekd.backends import Backend
from edgekd.device import Device, Finished, Job, free_some_space, last_lines
from edgekd.documents import LIMIT_BYTES, parsed
from edgekd.errors import ConnectionLost, DiskFull, StageError

_log = logging.getLogger(__name__)

BUILD = ("-m", "on_device", ".")
RESULT = "build.json"
TIMING_CACHE = "timing.cache"
ENGINE_LIMIT_BYTES = 4 << 30
TIMEOUT_S = 3600.0  # a large teacher on a small board
KEY_TIMEOUT_S = 180.0
ATTEMPTS = 5  # to build again after the connection was lost


def build(
    bundle: Path,
    folder: Path,
    backend: Backend,
    device: Device,
    store: Store,
    *,
    name: str,
    digest: str,
    log: Path,
    on_progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Make the engine on the device, unless one is kept that belongs to it; fetch it with all that the build says.

    Engines are kept by what they belong to (model, flags, versions, board), timing caches by all of that but the model.

    bundle: what the backend compiled, with `digest`; folder: a new one for it and the engine; name: of the model in
    errors; log: a file for what the build prints.

    Returns what `Backend.built` does, and backend, url, reused. Raises StageError in the board's own words.
    """
    shutil.copytree(bundle, folder)
    # Named by what is built: an engine that was finished when the connection was lost is not built again.
    files = dict(backend.built_files)
    if not device.transport.recorded:
        files[backend.built_engine] = ENGINE_LIMIT_BYTES
    turn = device.reserved(lambda text: on_progress(0.1, text))
    with turn, device.job(f"build-{digest[:16]}") as there:
        there.put({file.name: file for file in folder.iterdir()})
        key = _key(there, name, backend.name)
        kept = _Kept(store, key)
        there.put(kept.files(files), changes=True)
        on_progress(0.2, f"building on {device.url}")
        finished = _ended(there)
        log.write_text(finished.stdout, encoding="utf-8")
        if finished.status:
            raise _failed(finished, name, device.url, log)
        on_progress(0.9, "fetching the engine")
        _fetch(there, files, folder, key)
    reused = kept.is_there and (folder / RESULT).read_bytes() == kept.result.read_bytes()
    if not device.transport.recorded:
        kept.keep(folder, files)
    return {"backend": backend.name, "url": device.url, "reused": reused, **backend.built(folder)}


class _Kept:
    """What earlier builds left that were made for the same `key`, and their timing cache for the same board."""

    def __init__(self, store: Store, key: Mapping[str, Any]) -> None:
        self._engine = store.cache("engines", [key])
        self._timing = store.cache("timing-caches", [{k: v for k, v in key.items() if k not in ("onnx", "flags")}])
        self.result = self._engine / RESULT

    @property
    def is_there(self) -> bool:
        """Whether there is an engine."""
        return self.result.is_file()

    def files(self, names: Mapping[str, int]) -> dict[str, Path]:
        """By their names beside the model; the board itself checks that they are whole and fit."""
        engine = [self._engine / name for name in (*names, RESULT)] if self.is_there else []
        return {file.name: file for file in (*engine, self._timing / TIMING_CACHE) if file.is_file()}

    def keep(self, folder: Path, names: Mapping[str, int]) -> None:
        """Take over what a build left in a folder; build.json last, without which the rest does not count."""
        for target, wanted in ((self._timing, (TIMING_CACHE,)), (self._engine, (*names, RESULT))):
            target.mkdir(parents=True, exist_ok=True)
            for file in (folder / name for name in wanted if (folder / name).is_file()):
                part = target / f"{file.name}.part"
                shutil.copyfile(file, part)
                part.replace(target / file.name)


def _key(there: Job, name: str, backend: str) -> dict[str, Any]:
    """What an engine that is made there would belong to."""
    finished = there.run([there.python, *BUILD, "--key"], timeout=KEY_TIMEOUT_S)
    if finished.status:
        raise _failed(finished, name, there.device.url, None)
    return parsed(finished.stdout.rstrip().rpartition("\n")[2], f"the key of {backend} on {there.device.url}")


def _ended(there: Job) -> Finished:
    """The build's end. The device ends it when we are gone; made again, it finds what was finished."""
    for _ in range(ATTEMPTS - 1):
        try:
            return there.run([there.python, *BUILD], timeout=TIMEOUT_S)
        except ConnectionLost as error:
            _log.warning("%s; the engine is built again when it is back", error.what)
    return there.run([there.python, *BUILD], timeout=TIMEOUT_S)


def _fetch(there: Job, names: Mapping[str, int], folder: Path, key: Mapping[str, Any]) -> None:
    """Get what build.json lists, of the files that a build may leave, and no other."""
    there.get(RESULT, folder / RESULT, limit_bytes=LIMIT_BYTES)
    built = parsed((folder / RESULT).read_text(encoding="utf-8", errors="replace"), "the build's build.json")
    if built.get("identity") != key:
        raise StageError(
            f'the engine on "{there.device.url}" belongs to another board, model or TensorRT',
            allowed=f"expected: {json.dumps(key, sort_keys=True)[:200]}",
            fix="build it again: edgekd compile",
        )
    listed = built.get("files")
    for name, limit in names.items():
        if isinstance(listed, dict) and name in listed:
            there.get(name, folder / name, limit_bytes=limit)
            if [sha256_of(folder / name), (folder / name).stat().st_size] != listed[name]:
                raise StageError(
                    f'{name} from "{there.device.url}" is damaged: its sha256 is not the one in {RESULT}',
                    allowed="an engine that is not whole is never run",
                    fix="build it again: edgekd compile",
                )


def _failed(finished: Finished, name: str, url: str, log: Path | None) -> StageError:
    """Why there is no engine, in the board's own words."""
    reason = finished.stderr_tail[-1] if finished.status == 1 and finished.stderr_tail else ""
    kind, what, fix = (
        StageError,
        reason or f"its build ended with exit status {finished.status}",
        "see: edgekd check MODEL.onnx",
    )
    if finished.status < 0:
        what = f"its build was killed (signal {-finished.status}), as happens when memory runs out"
    if finished.status < 0 or "memory" in reason.lower():
        fix = "end what else runs there, and limit what kernels may take: the backend's option workspace_mib"
    elif "no space left" in reason.lower():
        kind, fix = DiskFull, free_some_space(url)
    elif "not here" in reason or "nor trtexec" in reason:
        fix = f"install what is missing there, see: edgekd doctor --device {shlex.quote(url)}"
    elif "prepared for" in reason:
        fix = "edgekd list targets"
    said = last_lines(finished.stderr_tail or tuple(finished.stdout.splitlines()))
    return kind(
        f'no engine of {name} on "{url}": {what}',
        allowed=said + (f"\n       all of it: {log}" if log else ""),
        fix=fix,
    )
