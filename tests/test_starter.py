"""`edgekd init`: finds the data, and writes a recipe that works."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from data.formats import write_cifar_batch, write_folder, write_idx, write_parquet

from edgekd.recipe import load
from edgekd.recipe_schema import json_schema
from edgekd.yamlfile import mapping_from_yaml


def samples(n: int, channels: int = 3, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (n, channels, size, size), dtype=np.uint8), np.arange(n) % 3


def write(source: str, path: Path) -> Path:
    """Tiny data in a source's format; gives the path that the recipe names."""
    path.mkdir(parents=True)
    if source == "folder":
        write_folder(path, *samples(30))
    elif source == "parquet":
        write_parquet(path / "train.parquet", *samples(30))
        write_parquet(path / "test.parquet", *samples(12))
    elif source == "idx":
        write_idx(path, "train", *samples(30, 1), zipped=False)
        write_idx(path, "t10k", *samples(12, 1), zipped=True)
    elif source == "cifar":
        import pickle

        write_cifar_batch(path / "data_batch_1", *samples(30, 3, 32))
        write_cifar_batch(path / "test_batch", *samples(12, 3, 32))
        (path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"ant", b"bee", b"cat"]}, protocol=2))
    else:
        (x, y), (a, b) = samples(30), samples(12)
        path = path / "images.npz"
        np.savez(path, x_train=x, y_train=y, x_test=a, y_test=b)
    return path


@pytest.mark.parametrize("source", ["folder", "parquet", "idx", "cifar", "npz"])
def test_init_finds_the_data_and_writes_a_recipe_that_can_be_planned(source, tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    place = write(source, tmp_path / "data")
    named = [place.relative_to(tmp_path)] if source == "npz" else []
    code, out, err = main("init", *named)
    assert (code, out, err) == (0, "edgekd.yaml\n.edgekd/recipe.schema.json\n", "next: edgekd run\n")
    made = load()
    assert made.data.source == source and str(made.data.options["path"]) == str(place.relative_to(tmp_path))
    code, out, err = main("plan")
    assert code == 0 and out.splitlines()[1].split()[:2] == ["teacher", "run"], err


def test_init_without_data_takes_the_digits(tmp_path, monkeypatch, main):
    folder = tmp_path / "2024"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main("init")[0] == 0
    assert load().data.source == "digits"


def test_what_init_writes_fits_its_schema(tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    main("init")
    text = Path("edgekd.yaml").read_text(encoding="utf-8")
    schema = json.loads(Path(".edgekd/recipe.schema.json").read_text(encoding="utf-8"))
    assert text.startswith("# yaml-language-server: $schema=.edgekd/recipe.schema.json\n") and schema == json_schema()
    jsonschema.Draft202012Validator(schema).validate(mapping_from_yaml(text, "edgekd.yaml")[0])


def test_a_folder_may_be_called_anything(tmp_path, monkeypatch, main):
    for name in ("2024", "é ü", "true", "-x-", 'a"b', "{c}"):
        folder = tmp_path / name
        write("folder", folder)
        monkeypatch.chdir(tmp_path)
        assert main("init", "--force", "./" + name) == (
            0,
            "edgekd.yaml\n.edgekd/recipe.schema.json\n",
            "next: edgekd run\n",
        )
        assert load().data.options["path"] == Path(name)


def test_init_does_not_overwrite(tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    Path("edgekd.yaml").write_text("mine")
    code, out, err = main("init")
    assert (code, out) == (2, "") and Path("edgekd.yaml").read_text() == "mine"
    assert err.splitlines() == [
        "error: edgekd.yaml is there already",
        "       it is not overwritten unasked",
        "fix:   edit it, or: edgekd init --force",
    ]
    assert main("init", "--force")[0] == 0 and Path("edgekd.yaml").read_text() != "mine"


def test_data_that_is_not_recognised(tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    known = "       known formats: cifar, idx, npz, parquet, folder"
    fix = "fix:   see how each must look: edgekd list datasets"
    assert main("init", "notes") == (2, "", f"error: notes: no data set was recognised\n{known}\n{fix}\n")
    assert main("init", "nowhere") == (2, "", f"error: nowhere does not exist\n{known}\n{fix}\n")
    assert not Path("edgekd.yaml").exists()


def test_data_that_cannot_be_used_leaves_nothing_behind(tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    images, labels = samples(30)
    write_folder(tmp_path / "data", images, 0 * labels)
    code, out, err = main("init", "data")
    assert (code, out, len(err.splitlines())) == (4, "", 3) and "class" in err
    assert not Path("edgekd.yaml").exists() and not Path(".edgekd").exists()


@contextmanager
def read_only(folder: Path):
    """Mount `folder` read-only; root is not held back by permission bits."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]]
    for command in mounted:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let root mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, main):
    folder = tmp_path / "locked"
    folder.mkdir()
    with read_only(folder):
        monkeypatch.chdir(folder)
        code, out, err = main("init")
        monkeypatch.chdir(tmp_path)
    assert (code, out) == (4, "")
    assert err.splitlines() == [
        f"error: {folder}/.edgekd cannot be written: Read-only file system",
        "       written are edgekd.yaml and .edgekd/recipe.schema.json",
        "fix:   make room, or call edgekd init in a folder that you may write to",
    ]
