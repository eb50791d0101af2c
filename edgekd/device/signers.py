"""The device's end of signatures: where its owner lists keys, nothing is run but what one of them has signed.

Stands alone: Python 3.8, the standard library, and ssh-keygen where signatures are asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from typing import NoReturn

MANIFEST = "manifest.json"
# The owner's list, which no ordinary user can change, and the user's own; the first that is there counts.
ALLOWED_SIGNERS = ("/etc/edgekd/allowed_signers", "~/.edgekd/allowed_signers")
NAMESPACE = "edgekd"  # a signature for another purpose is not taken
SIGNED_BY = "EDGEKD_SIGNED_BY"  # the variable that tells what runs who has signed it
KEYGEN_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 18


class UnsignedError(Exception):
    """Why something may not be run."""


def signer_of(manifest: str) -> str:
    """Who has signed a manifest, JSON with `files`: {path below its folder: sha256}; empty where nobody asks for that.

    Raises UnsignedError when a signature, MANIFEST.sig, is asked for and is missing or not good, when a
    file is not the one that was signed, and when there is a signature that nobody would check.
    """
    signature = manifest + ".sig"
    places = [os.path.expanduser(place) for place in ALLOWED_SIGNERS]
    lists = [place for place in places if not _is_absent(place)]
    if not lists:
        if os.path.exists(signature):
            _refuse("is signed, and nobody would check it: there is no " + " or ".join(places))
        return ""
    if not os.path.exists(signature):
        _refuse(f"is not signed, and {lists[0]} asks for a signature")
    found = _ssh_keygen(["find-principals", "-s", signature, "-f", lists[0]], manifest).splitlines()
    if not found:
        _refuse(f"is signed by nobody whom {lists[0]} allows")
    verify = ["verify", "-s", signature, "-f", lists[0], "-n", NAMESPACE, "-I"]
    # The first line with the key is all that was looked at, and may be for another purpose than the next one.
    for signer in dict.fromkeys([*found, *_principals(lists[0])]):
        if _ssh_keygen([*verify, signer], manifest):
            break
    else:
        _refuse(f"is not what {found[0]} has signed")
    with open(manifest, "rb") as file:
        files = json.load(file)["files"]  # type: dict[str, str]
    for name, sha256 in files.items():
        if _sha256(os.path.join(os.path.dirname(manifest), name)) != sha256:
            _refuse(f"is not what {signer} has signed: {name} differs")
    return signer


def _principals(listed: str) -> list[str]:
    """All names in a list of allowed signers: the first field of each line, in quotes where it has blanks."""
    with open(listed, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file]
    fields = [line[1:].partition('"')[0] if line[:1] == '"' else line.split()[0] for line in lines if line]
    return [name for field in fields if field[:1] != "#" for name in field.split(",")]


def _is_absent(path: str) -> bool:
    """Not what leads nowhere, or is closed to us."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, (FileNotFoundError, NotADirectoryError))
    return False


def _refuse(why: str) -> NoReturn:
    raise UnsignedError("the bundle " + why) from None


def _ssh_keygen(what: list[str], manifest: str) -> str:
    """What ssh-keygen says when it agrees; empty when it does not."""
    try:
        with open(manifest, "rb") as content:
            done = subprocess.run(
                ["ssh-keygen", "-Y", *what], stdin=content, capture_output=True, timeout=KEYGEN_TIMEOUT_S, check=False
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        _refuse(f"must be signed, and ssh-keygen cannot check that: {getattr(error, 'strerror', 'it takes too long')}")
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""


def _sha256(path: str) -> str:
    """Of a file; empty when it cannot be read."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            digest.update(chunk)
        return digest.hexdigest()
    return ""
