"""python3 run.py: build the engines of this kit where that is done on the board, measure them, write results.json.

Stands alone: Python 3.8, numpy, and the runtime that the kit is for. Started again, an interrupted benchmark goes on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

KIT, RESULTS, SPEC = "kit.json", "results.json", "spec.json"
VERSION = 1
LOG_BYTES = 1 << 16  # of what a compiler says, the end
SHOWN_EVERY = 0.05  # of the way


class KitError(Exception):
    """What the person who runs it can act on."""


def main() -> int:
    """Do it all in the kit's own folder; returns the exit status."""
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    try:
        kit = _checked()
        os.environ["EDGEKD_SIGNED_BY"] = _signer()
        jobs = {subject: _built(subject, kit) for subject in kit["built_here"]}
        jobs["bench"] = _measured(kit)
    except KitError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    results = {"edgekd_results": VERSION, "kit": kit["id"], "jobs": jobs}
    results["seal"] = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
    with open(RESULTS + ".part", "w") as file:
        json.dump(results, file)
    os.replace(RESULTS + ".part", RESULTS)
    print(f"wrote {os.path.abspath(RESULTS)}; where the kit was made: edgekd import {RESULTS}")
    return 0


def _checked() -> dict[str, Any]:
    """The kit's description, once every file is seen to be whole."""
    if sys.version_info < (3, 8):  # noqa: UP036
        raise KitError("this is Python {}.{}; 3.8 or later is needed".format(*sys.version_info))
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise KitError(f"numpy is not installed for {sys.executable}: sudo apt-get install python3-numpy") from None
    with open(KIT) as file:
        kit = json.load(file)  # type: dict[str, Any]
    for name, expected in sorted(kit["files"].items()):
        if not os.path.isfile(name) or _sha256(name) != expected:
            raise KitError(f"{name} is not as it was packed: unpack the kit again")
    return kit


def _signer() -> str:
    """Who has signed the kit, where this machine's owner asks for that."""
    import signers  # type: ignore[import-not-found]

    try:
        return str(signers.signer_of(os.path.abspath(KIT)))
    except signers.UnsignedError as error:
        raise KitError(str(error)) from None


def _built(subject: str, kit: dict[str, Any]) -> dict[str, Any]:
    """Build one engine in its folder; what the build left, but for the engine itself, which stays here."""
    print(f"building the {subject}'s engine; this may take minutes", flush=True)
    log = os.path.join(subject, "build.log")
    with open(log, "wb") as said:
        argv = [sys.executable, "-m", "on_device", "."]
        status = subprocess.call(argv, cwd=subject, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    with open(log, errors="replace") as text:
        lines = text.read().splitlines()
    if status:
        raise KitError("the {}'s engine was not built; {} ends:\n{}".format(subject, log, "\n".join(lines[-8:])))
    with open(os.path.join(subject, "build.json")) as file:
        for name, times in json.load(file).get("timed", {}).items():
            median = times.get("latency", {}).get("median", "unknown")
            print("{}, {}: median {} ms".format(subject, name.replace("_", " "), median), flush=True)
    names = [name for name in kit["built_files"] if os.path.isfile(os.path.join(subject, name))]
    found = {name: _packed(os.path.join(subject, name)) for name in names}
    found["log"] = _content("\n".join(lines).encode()[-LOG_BYTES:])
    return {"model_sha256": _sha256(os.path.join(subject, "model.onnx")), "files": found}


def _measured(kit: dict[str, Any]) -> dict[str, Any]:
    """Run the agent; what it wrote."""
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "bench", SPEC], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stderr is not None
    lines, shown = [], -1.0  # type: list[str], float
    for raw in process.stderr:
        line = raw.decode("utf-8", "replace").rstrip()
        if not line.startswith('{"progress"'):
            lines.append(line)
            continue
        told = json.loads(line)
        if told["progress"] >= shown + SHOWN_EVERY:
            shown = told["progress"]
            print("measuring: {progress:.0%}, {left_s:.0f} s left".format(**told), flush=True)
    if process.wait():
        told = json.loads(lines[-1])["error"] if lines and lines[-1].startswith('{"error"') else ""
        raise KitError(
            "the benchmark ended without a result{}".format(f": {told}" if told else ":\n" + "\n".join(lines[-8:]))
        )
    with open(SPEC) as file:
        spec = json.load(file)
    return {"spec": spec, "files": {name: _packed(name) for name in kit["measured_files"]}}


def _packed(name: str) -> dict[str, str]:
    with open(name, "rb") as file:
        return _content(file.read())


def _content(content: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "base64": base64.b64encode(content).decode()}


def _sha256(name: str) -> str:
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
