"""The store: what is in it is whole, or is named; what failed is not in it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgekd.artifact import LOG, MANIFEST, Store, key_of
from edgekd.errors import StoreError

KEY = "k" * 64


def write(text: str = "made", log: str = "fast"):
    def fill(out: Path):
        (out / "model.bin").write_text(text)
        (out / LOG).mkdir()
        (out / LOG / "times").write_text(log)
        return {"top1": 0.1 + 0.2, "counts": {10: 1, 9: 2}, "pair": (1, None)}

    return fill


def publish(store: Store, fill=None, key: str = KEY):
    return store.publish("student", key, fill or write(), lambda: {"seconds": 1e-07})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- what is stored -----------------------------------------------------------------------------------------------


def test_an_artifact_comes_back_as_it_was_stored(store):
    made, found = publish(store), store.find("student", KEY)
    assert made == found and found.stage == "student" and found.key == KEY
    assert found.result == {"top1": 0.1 + 0.2, "counts": {"10": 1, "9": 2}, "pair": [1, None]}
    assert found.manifest["seconds"] == 1e-07
    assert content(found.folder) == ["log/times", MANIFEST, "model.bin"]
    assert store.find("student", "other") is None and store.find("teacher", KEY) is None


def test_the_digest_names_what_was_made_not_how_long_it_took(store):
    digests = [
        publish(store, write(text, log), key).digest
        for key, text, log in (("a", "made", "fast"), ("b", "made", "slow"), ("c", "other", "fast"))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_key_follows_everything_that_it_is_made_of():
    same = key_of("student", 1, {"a": 1, "b": 2}, {"teacher": "x"})
    assert same == key_of("student", 1, {"b": 2, "a": 1}, {"teacher": "x"}) and len(same) == 64
    others = [
        key_of("scratch", 1, {"a": 1, "b": 2}, {"teacher": "x"}),
        key_of("student", 2, {"a": 1, "b": 2}, {"teacher": "x"}),
        key_of("student", 1, {"a": 1, "b": 3}, {"teacher": "x"}),
        key_of("student", 1, {"a": 1, "b": 2}, {"teacher": "y"}),
        key_of("student", 1, {"a": "1", "b": 2}, {"teacher": "x"}),
    ]
    assert len({same, *others}) == 6


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.bin", "log/times"])
def test_a_flipped_byte_is_named(store, name):
    file = publish(store).folder / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        store.find("student", KEY)
    assert str(caught.value).splitlines() == [
        f"error: {file} is not what was stored",
        "       nothing in the store may change",
        f"fix:   rm -r {store.root}/store/student/{KEY}, then run again: it is made anew",
    ]


def test_no_bit_of_the_manifest_can_change_unseen(store):
    file = publish(store).folder / MANIFEST
    whole = file.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=MANIFEST):
            store.find("student", KEY)
    file.write_bytes(whole)
    assert store.find("student", KEY) is not None


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: (folder / "model.bin").unlink(), "model.bin is gone from the store"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read: [Errno 2]"),
        (lambda folder: (folder / MANIFEST).write_text(""), "manifest.json cannot be read: Expecting value"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json cannot be read: 'list' object"),
        (lambda folder: folder.rename(folder.with_name("x" * 64)), f"manifest.json is that of student/{KEY}"),
    ],
    ids=["file gone", "manifest gone", "manifest empty", "manifest no mapping", "folder renamed"],
)
def test_other_damage_is_named(store, damage, what):
    damage(publish(store).folder)
    (key,) = os.listdir(store.root / "store" / "student")
    with pytest.raises(StoreError) as caught:
        store.find("student", key)
    assert what in str(caught.value) and len(str(caught.value).splitlines()) == 3


# --- failure ------------------------------------------------------------------------------------------------------


def test_what_fails_is_not_stored(store):
    def fail(out: Path):
        (out / "model.bin").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish(store, fail)
    assert store.find("student", KEY) is None and content(store.root) == []


def killed_while_publishing(root: Path, ready) -> None:
    def hang(out: Path):
        write()(out)
        ready.set()
        time.sleep(60)
        return {}

    publish(Store(root), hang)


def test_a_kill_in_the_middle_leaves_no_artifact(store):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=killed_while_publishing, args=(store.root, ready))
    process.start()
    assert ready.wait(10)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert store.find("student", KEY) is None and not (store.root / "store").exists()
    publish(store)
    store.clean_work(KEY)
    assert content(store.root) == sorted(f"store/student/{KEY}/{name}" for name in ("log/times", MANIFEST, "model.bin"))


def test_where_locks_do_not_work_the_first_artifact_stays(store):
    first = publish(store, write("made", "first"))
    assert publish(store, write("made", "second")) == first


def count_in(root: Path, file: Path) -> None:
    for _ in range(20):
        with Store(root).locked(KEY, lambda: None):
            number = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(number + 1))


def test_the_lock_lets_one_process_in(store, tmp_path):
    file = tmp_path / "number"
    file.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_in, args=(store.root, file)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert file.read_text() == "60"


# --- what the file system refuses ---------------------------------------------------------------------------------


def refused(store: Store, fill=None) -> list[str]:
    with pytest.raises(StoreError) as caught, store.locked(KEY, lambda: None):
        publish(store, fill)
    return str(caught.value).splitlines()


def test_a_file_in_place_of_the_store(tmp_path):
    root = tmp_path / "store"
    root.write_text("")
    assert refused(Store(root)) == [
        f"error: the store {root} cannot be used: a file stands where a folder is needed",
        f"       at {root}/work/{KEY}",
        "fix:   choose another: --store FOLDER",
    ]


def mount(*arguments: object) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not let root mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk):
    store = Store(small_disk / "store")
    assert refused(store, lambda out: {"written": (out / "big").write_bytes(bytes(100_000))}) == [
        f"error: the store {store.root} cannot be used: the disk is full",
        f"       at {store.root}",
        "fix:   free some space, then run again: what is finished is kept",
    ]
    assert content(store.root) == [f"work/{KEY}/lock"]
    publish(store)


@pytest.mark.parametrize("copy", [shutil.copyfile, shutil.copytree])
def test_a_disk_that_a_copy_fills(small_disk, tmp_path, copy):
    """Python names the source of such an error first, and of a tree it lists them."""
    store, source = Store(small_disk / "store"), tmp_path / "source"
    source.mkdir()
    (source / "big").write_bytes(bytes(100_000))
    source = source / "big" if copy is shutil.copyfile else source
    what, where, fix = refused(store, lambda out: {"copied": str(copy(source, out / "copied"))})
    assert what == f"error: the store {store.root} cannot be used: the disk is full"
    assert where.startswith(f"       at {store.root}/work/{KEY}/") and "/copied" in where
    assert fix == "fix:   free some space, then run again: what is finished is kept"


def test_a_read_only_disk(small_disk):
    mount("-o", "remount,ro", small_disk)
    assert refused(Store(small_disk / "store")) == [
        f"error: the store {small_disk}/store cannot be used: its file system is read-only",
        f"       at {small_disk}/store",
        "fix:   choose another: --store FOLDER",
    ]


def test_what_is_refused_elsewhere_is_not_blamed_on_the_store(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        publish(store, lambda out: {"read": (tmp_path / "file" / "inner").read_text()})


# --- runs ---------------------------------------------------------------------------------------------------------


def test_runs_are_recorded(store):
    assert store.runs() == []
    for run_id in ("2026-b", "2026-a"):
        store.record(run_id, {"run_id": run_id})
    assert store.runs() == ["2026-a", "2026-b"] and store.recorded("2026-a") == {"run_id": "2026-a"}


def test_a_damaged_record_of_a_run(store):
    store.record("2026-a", {})
    file = store.run_folder("2026-a") / "run.json"
    file.write_text("{")
    with pytest.raises(StoreError) as caught:
        store.recorded("2026-a")
    assert str(caught.value).splitlines()[0].startswith(f"error: {file} cannot be read: Expecting property name")
