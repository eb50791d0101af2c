"""Whether a bundle comes from somebody whom this machine's owner trusts: the spec holds the sha256 of all the rest, and
ssh-keygen checks its signature by the list that the owner has installed."""

from __future__ import annotations

import os
import subprocess

from .errors import AgentError

# The owner's, which no ordinary user can change, and the user's own; the first that is there counts.
ALLOWED_SIGNERS = ("etc/edgekd/allowed_signers", os.path.expanduser("~/.edgekd/allowed_signers"))
NAMESPACE = "edgekd"  # a signature for another purpose is not taken
TIMEOUT_S = 60.0


def signer_of(file: str, root: str = "/") -> str:
    """Who has signed a file, with FILE.sig; empty where the machine's owner asks for no signature.

    Raises AgentError when a signature that is asked for is missing or not good, or there is one that nobody checks.
    """
    signature = file + ".sig"
    lists = [path for path in (os.path.join(root, place) for place in ALLOWED_SIGNERS) if os.path.exists(path)]
    if not lists:
        if os.path.exists(signature):
            places = " or ".join(os.path.join(root, place) for place in ALLOWED_SIGNERS)
            raise AgentError(f"the bundle is signed, and nobody would check it: there is no {places}")
        return ""
    if not os.path.exists(signature):
        raise AgentError(f"the bundle is not signed, and {lists[0]} asks for a signature")
    names = _said(["find-principals", "-s", signature, "-f", lists[0]], file).splitlines()
    if not names:
        raise AgentError(f"the bundle is signed by nobody whom {lists[0]} allows")
    if not _said(["verify", "-s", signature, "-f", lists[0], "-I", names[0], "-n", NAMESPACE], file):
        raise AgentError(f"the bundle is not what {names[0]} has signed")
    return names[0]


def _said(what: list[str], file: str) -> str:
    """What ssh-keygen says when it agrees; empty when it does not."""
    try:
        with open(file, "rb") as content:
            done = subprocess.run(
                ["ssh-keygen", "-Y", *what],
                stdin=content,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT_S,
                check=False,
            )
    except OSError as error:
        raise AgentError(f"signatures are asked for, and ssh-keygen cannot be run: {error.strerror}") from None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""
