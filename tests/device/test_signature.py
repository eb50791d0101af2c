"""A board whose owner lists keys runs what those keys have signed, and nothing else. By the real ssh-keygen."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import tensorrt_stand_in
from test_interruptions import jobs, measure
from tiny_job import make_job

from edgekd import stages
from edgekd.device import Device, signers
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
    """A manifest of one file; below /etc a list with Anna's key."""
    places = (str(tmp_path / "etc/allowed_signers"), str(tmp_path / "home/allowed_signers"))
    monkeypatch.setattr(signers, "ALLOWED_SIGNERS", places)
    allow(tmp_path / "etc/allowed_signers", "anna", keys["anna"])
    (tmp_path / "run.py").write_text("print(1)")
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"files": {"run.py": hashlib.sha256(b"print(1)").hexdigest()}}))
    return manifest


def refused(bundle):
    with pytest.raises(signers.UnsignedError) as caught:
        signers.signer_of(str(bundle))
    return str(caught.value).replace(str(bundle.parent), "")


def test_a_good_signature_names_its_signer(bundle, keys):
    sign(bundle, str(keys["anna"]))
    assert signers.signer_of(str(bundle)) == "anna"
    sign(bundle, str(keys["anna"]))  # again, over the old one
    assert signers.signer_of(str(bundle)) == "anna"


@pytest.mark.parametrize(
    ("lines", "signer"),
    [
        (["anna,bob {key}"], "anna"),
        (["!anna,bob {key}"], "bob"),
        (['anna namespaces="file" {key}', 'bob namespaces="edgekd" {key}'], "bob"),
        (["# the lab's", "", 'anna valid-before="20200101" {key}', '"bob of the lab" {key}'], "bob of the lab"),
        (["mallory {other}", 'anna namespaces="git,edgekd" {key}'], "anna"),
        (["*@lab {key}"], "*@lab"),
    ],
)
def test_whoever_of_a_list_ssh_keygen_lets_sign_is_named(bundle, keys, lines, signer):
    """A key may stand there for several people, and for several purposes."""
    listed = bundle.parent / "etc/allowed_signers"
    public = {name: (key.parent / f"{key.name}.pub").read_text().strip() for name, key in keys.items()}
    listed.write_text("\n".join(lines).format(key=public["anna"], other=public["mallory"]) + "\n")
    sign(bundle, str(keys["anna"]))
    assert signers.signer_of(str(bundle)) == signer
    bundle.write_text('{"files": {}}')
    assert refused(bundle).startswith("the bundle is not what ")


def test_a_key_that_is_listed_for_other_purposes_alone(bundle, keys):
    allow(bundle.parent / "etc/allowed_signers", "anna", keys["anna"])
    listed = bundle.parent / "etc/allowed_signers"
    listed.write_text(listed.read_text().replace('"edgekd"', '"file"'))
    sign(bundle, str(keys["anna"]))
    assert refused(bundle) == "the bundle is not what anna has signed"


def test_a_manifest_that_was_tampered_with(bundle, keys):
    sign(bundle, str(keys["anna"]))
    bundle.write_text('{"files": {}}')
    assert refused(bundle) == "the bundle is not what anna has signed"


@pytest.mark.parametrize("change", ["changed", "deleted"])
def test_a_file_that_was_tampered_with(bundle, keys, change):
    sign(bundle, str(keys["anna"]))
    (bundle.parent / "run.py").unlink()
    if change == "changed":
        (bundle.parent / "run.py").write_text("print(2)")
    assert refused(bundle) == "the bundle is not what anna has signed: run.py differs"


def test_an_unknown_signer(bundle, keys):
    sign(bundle, str(keys["mallory"]))
    assert refused(bundle) == "the bundle is signed by nobody whom /etc/allowed_signers allows"


def test_a_signature_for_another_purpose(bundle, keys):
    subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", keys["anna"], "-n", "file", bundle], check=True, capture_output=True
    )
    assert refused(bundle).startswith("the bundle is ")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN SSH SIGNATURE-----\n", b"\xff" * 100])
def test_a_signature_that_is_none(bundle, content):
    (bundle.parent / "manifest.json.sig").write_bytes(content)
    assert refused(bundle) == "the bundle is signed by nobody whom /etc/allowed_signers allows"


def test_a_bundle_without_a_signature(bundle):
    assert refused(bundle) == "the bundle is not signed, and /etc/allowed_signers asks for a signature"


def test_a_signature_that_nobody_checks(bundle, keys):
    sign(bundle, str(keys["anna"]))
    (bundle.parent / "etc/allowed_signers").unlink()
    assert refused(bundle) == (
        "the bundle is signed, and nobody would check it: there is no /etc/allowed_signers or /home/allowed_signers"
    )
    allow(bundle.parent / "home/allowed_signers", "anna", keys["anna"])
    assert signers.signer_of(str(bundle)) == "anna"


def test_the_owners_list_wins_over_the_users(bundle, keys):
    allow(bundle.parent / "home/allowed_signers", "mallory", keys["mallory"])
    sign(bundle, str(keys["mallory"]))
    assert refused(bundle) == "the bundle is signed by nobody whom /etc/allowed_signers allows"


def test_a_list_that_leads_nowhere_asks_for_a_signature_too(bundle):
    (bundle.parent / "etc/allowed_signers").unlink()
    (bundle.parent / "etc/allowed_signers").symlink_to(bundle.parent / "unmounted")
    assert refused(bundle) == "the bundle is not signed, and /etc/allowed_signers asks for a signature"


def test_no_list_and_no_signature(bundle):
    (bundle.parent / "etc/allowed_signers").unlink()
    assert signers.signer_of(str(bundle)) == ""


def test_a_board_without_ssh_keygen(bundle, keys, monkeypatch):
    sign(bundle, str(keys["anna"]))
    monkeypatch.setenv("PATH", str(bundle.parent))
    assert refused(bundle) == "the bundle must be signed, and ssh-keygen cannot check that: No such file or directory"


# ---------------------------------------------------------------- on the host


def test_a_board_that_asks_for_no_signature(sshd, keys, tmp_path):
    with pytest.raises(StageError) as caught:
        Device(sshd.url(signing_key=str(keys["anna"])), tmp_path).facts()
    assert (
        "the bundle is signed, and nobody would check it: there is no /etc/edgekd/allowed_signers" in caught.value.what
    )
    assert caught.value.fix == "leave signing_key out of the device's URL, or have its owner list your key there"


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


FIX = "sign it: --device 'ssh://...?signing_key=~/.ssh/id_ed25519', by a key that the board's owner has listed"


def test_a_board_runs_what_is_signed(guarded, keys, tmp_path):
    url = guarded.url(python=sys.executable, signing_key=str(keys["anna"]))
    assert measure(url, tmp_path / "host")["device"]["signed_by"] == "anna"
    assert Device(url, tmp_path).facts()["signed_by"] == "anna"


def test_a_benchmark_goes_on_though_its_own_files_have_changed(guarded, keys, tmp_path):
    """The placeholder of the result is written anew by what is run, and is not signed."""
    url = guarded.url(python=sys.executable, signing_key=str(keys["anna"]))
    device = Device(url, tmp_path)
    for name, content in (("it.py", "open('result.json', 'w').write('1')"), ("result.json", "")):
        (tmp_path / name).write_text(content)
    with device.job() as job:
        job.put({"it.py": tmp_path / "it.py"})
        job.put({"result.json": tmp_path / "result.json"}, changes=True)
        for _ in range(2):
            job.run([job.python, "it.py"], timeout=60).check("it")


@pytest.mark.parametrize("signer", ["", "mallory"])
@pytest.mark.parametrize("what", ["benchmark", "build", "facts"])
def test_a_board_runs_nothing_else(guarded, keys, tmp_path, signer, what):
    given = {"signing_key": str(keys[signer])} if signer else {}
    url = guarded.url(python=sys.executable, **given)
    with pytest.raises(StageError) as caught:
        if what == "benchmark":
            measure(url, tmp_path / "host")
        elif what == "facts":
            Device(url, tmp_path).facts()
        else:
            build(url, tmp_path)
    listed = f"{guarded.home}/.edgekd/allowed_signers"
    why = f"signed by nobody whom {listed} allows" if signer else f"not signed, and {listed} asks for a signature"
    assert caught.value.what == f'device "ssh://board": the bundle is {why}'
    assert caught.value.fix == FIX
    assert jobs(guarded) == []


def build(url, folder):
    """An engine by a stand-in for TensorRT."""
    job = make_job(folder / "store", target="jetson")
    job.device = url
    for name in ("out", "work"):
        (folder / name).mkdir()
    bundle = tensorrt_stand_in.bundle(folder / "bundle")
    return stages.build("student", job, {"engine-student": bundle}, folder / "out", folder / "work")


@pytest.mark.skipif(bool(tensorrt_stand_in.missing()), reason=tensorrt_stand_in.missing())
def test_a_board_builds_what_is_signed(guarded, keys, tmp_path):
    board = tensorrt_stand_in.Board(tmp_path / "board")
    made = build(guarded.url(python=str(board.python), signing_key=str(keys["anna"])), tmp_path)
    assert made["evidence"] == "built_on_device"


def test_this_machine_asks_for_signatures_too(keys, tmp_path, monkeypatch):
    listed = tmp_path / "allowed_signers"
    monkeypatch.setattr(signers, "ALLOWED_SIGNERS", (str(listed),))
    allow(listed, "anna", keys["anna"])
    with pytest.raises(StageError) as caught:
        Device("local:", tmp_path).facts()
    assert caught.value.what == f'device "local:": the bundle is not signed, and {listed} asks for a signature'
    assert Device(f"local:?signing_key={keys['anna']}", tmp_path).facts()["signed_by"] == "anna"
