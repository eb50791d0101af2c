"""A training that is killed, at any moment and again and again, ends with the bits of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from edgekd import checkpoint, data, distill, networks, registry
from edgekd.errors import CheckpointError
from edgekd.recipe import Augment, Train
from edgekd.training_log import METRICS

# A fork server has torch loaded already: a process costs milliseconds and can be killed like any other.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["edgekd.distill", "edgekd.networks", "sklearn.datasets"])


@dataclass(frozen=True)
class Job:
    """One training with everything that has a state; small, so that it can be killed often."""

    train: dict
    student: str = "lma_student"  # dropout, batch normalisation
    options: dict = field(default_factory=lambda: {"width": 0.2})
    method: str = "scratch"
    augment: dict = field(default_factory=dict)


JOBS = {
    "everything": Job(
        {
            "ema": 0.9,
            "accumulate": 2,
            "schedule": "plateau",
            "patience": 1,
            "warmup": 1,
            "clip": 1.0,
            "tensorboard": True,
        },
        method="kd",
        augment={"crop": 1, "flip": True},
    ),
    "bf16": Job({"precision": "bf16", "optimizer": "adamw", "lr": 0.01, "channels_last": True}, method="kd"),
    "last": Job(
        {"keep": "last", "schedule": "step", "warmup": 1}, student="resnet", options={"depth": 8, "width": 0.25}
    ),
}


def train_here(job: Job, folder: Path, batches_done: object, die_at_write: int) -> None:
    """What a child process does. It saves after every update, and dies in the middle of write number `die_at_write`."""
    torch.set_num_threads(1)
    distill.CHECKPOINT_SECONDS, distill.LOOK_EVERY = 0.0, 1
    synced, fsync = [], os.fsync

    def fsync_and_die(handle: int) -> None:
        synced.append(handle)
        if len(synced) == die_at_write:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    checkpoint.os.fsync = fsync_and_die
    dataset = data.load("digits", {}, train_limit=400)
    network = networks.build(job.student, job.options, dataset.shape, 10, ("lma", {"k": 4}), 0)
    teacher = networks.build("resnet", {"depth": 8, "width": 0.5}, dataset.shape, 10, ("relu", {}), 1)

    def on_progress(progress: distill.Progress) -> None:
        torch.rand(3)  # whoever watches may use up random numbers
        batches_done.value = progress.done

    trained = distill.train(
        network, dataset, Train(**{"epochs": 3, "batch_size": 32, "lr": 0.05, **job.train}),
        registry.create("method", job.method), teacher=teacher if job.method == "kd" else None,
        augment=Augment(**job.augment), seed=3, work=folder / "work", on_progress=on_progress,
    )  # fmt: skip
    networks.save_weights(network, folder / "weights.safetensors")
    (folder / "trained.json").write_text(json.dumps([trained.kept, trained.epochs]))


def start(job: Job, folder: Path, die_at_write: int = 0) -> tuple[multiprocessing.Process, object]:
    folder.mkdir(exist_ok=True)
    done = FORKED.Value("q", 0)
    process = FORKED.Process(target=train_here, args=(job, folder, done, die_at_write))
    process.start()
    return process, done


def finish(job: Job, folder: Path) -> None:
    process, _ = start(job, folder)
    process.join(280)
    assert process.exitcode == 0


def assert_same(folder: Path, other: Path) -> None:
    """Equal to the bit: every weight and buffer, every metric but the seconds, the file of metrics, the kept epoch."""
    left, right = (safetensors.numpy.load_file(path / "weights.safetensors") for path in (folder, other))
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)

    def metrics(path: Path) -> list:
        kept, epochs = json.loads((path / "trained.json").read_text())
        lines = [json.loads(line) for line in (path / "work" / METRICS).read_text().splitlines()]
        assert lines == epochs
        return [kept, [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]]

    assert metrics(folder) == metrics(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(name): the folder of that job, run once without a kill."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            finish(JOBS[name], made[name])
        return made[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_random_moments(name, uninterrupted, tmp_path):
    chance = random.Random(name)
    reference, job = uninterrupted(name), JOBS[name]
    # Batches done when the kill comes: 11 batches an epoch, so also across the ends of epochs.
    for target in sorted(chance.sample(range(1, 33), 5)):
        process, done = start(job, tmp_path)
        deadline = time.monotonic() + 200
        while done.value < target and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.02)  # anywhere in a step, or in writing a checkpoint
        process.kill()
        process.join(200)
        assert process.exitcode in (-signal.SIGKILL, 0)
    finish(job, tmp_path)
    assert_same(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("write", [1, 2, 9])
def test_killed_in_the_middle_of_writing_a_checkpoint(write, uninterrupted, tmp_path):
    reference = uninterrupted("everything")
    for _ in range(2):
        process, _ = start(JOBS["everything"], tmp_path, die_at_write=write)
        process.join(200)
        assert process.exitcode == -signal.SIGKILL
        assert (tmp_path / "work" / f"{distill.CHECKPOINT}.partial").exists()
    finish(JOBS["everything"], tmp_path)
    assert_same(tmp_path, reference)


def test_an_undisturbed_rerun_trains_nothing(uninterrupted, tmp_path):
    job = JOBS["last"]
    finish(job, tmp_path)
    weights = (tmp_path / "weights.safetensors").read_bytes()
    process, done = start(job, tmp_path)
    process.join(200)
    assert process.exitcode == 0
    assert done.value == 0
    assert (tmp_path / "weights.safetensors").read_bytes() == weights


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path):
    file = tmp_path / "checkpoint.pt"
    checkpoint.write_checkpoint({"weights": torch.arange(100.0)}, file)
    assert torch.equal(checkpoint.read_checkpoint(file)["weights"], torch.arange(100.0))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:-10], "flip": content, "empty": b""}[damage])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_checkpoint(file)
    assert str(caught.value) == (
        f"error: the checkpoint {file} is damaged\n"
        "       a kill cannot do that, as checkpoints are written whole or not at all: look at the disk\n"
        f"fix:   rm {file}, then run again: this training starts anew"
    )
    assert caught.value.exit_code == 4
