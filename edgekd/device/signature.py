"""Signatures by the user's ssh key: what leaves for a board can be told from what somebody else has put there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from edgekd.device.signers import NAMESPACE
from edgekd.errors import MissingError, StageError

TIMEOUT_S = 60.0  # a security key waits to be touched


def sign(file: Path, key: str) -> Path:
    """Write FILE.sig by ssh-keygen; `key` is a private key, or a public one whose private half ssh-agent has.

    Raises StageError when the key cannot sign, MissingError without ssh-keygen.
    """
    signature = file.with_name(file.name + ".sig")
    signature.unlink(missing_ok=True)
    path = str(Path(key).expanduser())
    argv = ["ssh-keygen", "-Y", "sign", "-f", path, "-n", NAMESPACE, str(file)]
    try:
        # Nobody is asked for a passphrase: it would wait for ever in the middle of a run.
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
            start_new_session=True, env=os.environ | {"SSH_ASKPASS_REQUIRE": "never"},
        )  # fmt: skip
        lines = done.stderr.strip().splitlines()
    except FileNotFoundError as error:
        raise MissingError(
            "ssh-keygen is not installed",
            allowed="it signs what is sent to the board",
            fix="sudo apt-get install openssh-client, or leave signing_key out of the device's URL",
        ) from error
    except subprocess.TimeoutExpired:
        lines = [f"no answer within {TIMEOUT_S:g} s"]
    if not signature.exists():
        raise StageError(
            f"signing_key = {key} cannot sign",
            allowed=f"ssh-keygen says: {lines[-1] if lines else 'nothing'}",
            fix=f"correct the path, or give the key to ssh-agent: ssh-add {path}",
        )
    return signature
