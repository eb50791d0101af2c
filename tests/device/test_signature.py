"""A board whose owner lists keys runs what those keys have signed, and nothing else. By the real ssh-keygen."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from test_interruptions import jobs, measure

from edgekd.agent import signature as board
from edgekd.agent.errors import AgentError
from edgekd.device.signature import sign
from edgekd.errors import MissingError, StageError

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen: apt-get install openssh-client")


def make_key(path, passphrase=""):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_key(folder / name) for name in ("anna", "mallory")}


def allow(file, name, key):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{name} namespaces="edgekd" {(key.parent / f"{key.name}.pub").read_text()}')


@pytest.fixture
def bundle(tmp_path, keys, monkeypatch):
    """A spec, and below /etc a list with Anna's key."""
    monkeypatch.setattr(
        board, "ALLOWED_SIGNERS", ("etc/edgekd/allowed_signers", str(tmp_path / "home/allowed_signers"))
    )
    allow(tmp_path / "etc/edgekd/allowed_signers", "anna", keys["anna"])
    (tmp_path / "spec.json").write_text('{"files": {}}')
    return tmp_path / "spec.json"


def refused(bundle):
    with pytest.raises(AgentError) as caught:
        board.signer_of(str(bundle), str(bundle.parent))
    return str(caught.value).replace(str(bundle.parent), "")


def test_a_good_signature_names_its_signer(bundle, keys):
    sign(bundle, str(keys["anna"]))
    assert board.signer_of(str(bundle), str(bundle.parent)) == "anna"
    sign(bundle, str(keys["anna"]))  # again, over the old one
    assert board.signer_of(str(bundle), str(bundle.parent)) == "anna"


def test_a_bundle_that_was_tampered_with(bundle, keys):
    sign(bundle, str(keys["anna"]))
    bundle.write_text('{"files": {"agent/x.py": "0"}}')
    assert refused(bundle) == "the bundle is not what anna has signed"


def test_an_unknown_signer(bundle, keys):
    sign(bundle, str(keys["mallory"]))
    assert refused(bundle) == "the bundle is signed by nobody whom /etc/edgekd/allowed_signers allows"


def test_a_signature_for_another_purpose(bundle, keys):
    subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", keys["anna"], "-n", "file", bundle], check=True, capture_output=True
    )
    assert refused(bundle).startswith("the bundle is ")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN SSH SIGNATURE-----\n", b"\xff" * 100])
def test_a_signature_that_is_none(bundle, content):
    (bundle.parent / "spec.json.sig").write_bytes(content)
    assert refused(bundle) == "the bundle is signed by nobody whom /etc/edgekd/allowed_signers allows"


def test_a_bundle_without_a_signature(bundle):
    assert refused(bundle) == "the bundle is not signed, and /etc/edgekd/allowed_signers asks for a signature"


def test_a_signature_that_nobody_checks(bundle, keys):
    sign(bundle, str(keys["anna"]))
    (bundle.parent / "etc/edgekd/allowed_signers").unlink()
    assert refused(bundle) == (
        "the bundle is signed, and nobody would check it: there is no"
        " /etc/edgekd/allowed_signers or /home/allowed_signers"
    )
    allow(bundle.parent / "home/allowed_signers", "anna", keys["anna"])
    assert board.signer_of(str(bundle), str(bundle.parent)) == "anna"


def test_the_owners_list_wins_over_the_users(bundle, keys):
    allow(bundle.parent / "home/allowed_signers", "mallory", keys["mallory"])
    sign(bundle, str(keys["mallory"]))
    assert refused(bundle) == "the bundle is signed by nobody whom /etc/edgekd/allowed_signers allows"


def test_no_list_and_no_signature(bundle):
    (bundle.parent / "etc/edgekd/allowed_signers").unlink()
    assert board.signer_of(str(bundle), str(bundle.parent)) == ""


def test_a_board_without_ssh_keygen(bundle, keys, monkeypatch):
    sign(bundle, str(keys["anna"]))
    monkeypatch.setenv("PATH", str(bundle.parent))
    assert refused(bundle) == "signatures are asked for, and ssh-keygen cannot be run: No such file or directory"


# ---------------------------------------------------------------- on the host


def test_a_host_without_ssh_keygen(bundle, keys, monkeypatch):
    monkeypatch.setenv("PATH", str(bundle.parent))
    with pytest.raises(MissingError) as caught:
        sign(bundle, str(keys["anna"]))
    assert caught.value.what == "ssh-keygen is not installed"
    assert caught.value.fix == "sudo apt-get install openssh-client, or leave signing_key out of the device's URL"


@pytest.mark.parametrize("kind", ["absent", "locked", "folder"])
def test_a_key_that_cannot_sign(bundle, tmp_path, kind):
    key = tmp_path / "key"
    if kind == "locked":
        make_key(key, "secret")
    elif kind == "folder":
        key.mkdir()
    with pytest.raises(StageError) as caught:
        sign(bundle, str(key))
    assert caught.value.what == f"signing_key = {key} cannot sign"
    assert caught.value.allowed.startswith("ssh-keygen says: ")
    assert caught.value.fix == f"correct the path, or give the key to ssh-agent: ssh-add {key}"


# ---------------------------------------------------------------- on the way


@pytest.fixture
def guarded(sshd, keys):
    """A board that lists Anna's key."""
    file = sshd.home / ".edgekd/allowed_signers"
    allow(file, "anna", keys["anna"])
    yield sshd
    file.unlink()


def test_a_board_runs_what_is_signed(guarded, keys, tmp_path):
    url = guarded.url(python=sys.executable, signing_key=str(keys["anna"]))
    assert measure(url, tmp_path / "host")["device"]["signed_by"] == "anna"


@pytest.mark.parametrize("signer", ["", "mallory"])
def test_a_board_runs_nothing_else(guarded, keys, tmp_path, signer):
    given = {"signing_key": str(keys[signer])} if signer else {}
    url = guarded.url(python=sys.executable, **given)
    with pytest.raises(StageError) as caught:
        measure(url, tmp_path / "host")
    listed = f"{guarded.home}/.edgekd/allowed_signers"
    why = f"signed by nobody whom {listed} allows" if signer else f"not signed, and {listed} asks for a signature"
    assert caught.value.what == f'benchmark on "{url}": the bundle is {why}'
    assert caught.value.fix == (
        "sign it: --device 'ssh://...?signing_key=~/.ssh/id_ed25519', by a key that the board's owner has listed"
    )
    assert jobs(guarded) == []
