"""Several processes train as one: real processes, gloo on this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd import data, distill, networks, registry
from edgekd.methods import Method, Setting, Step
from edgekd.networks.ensemble import Ensemble
from edgekd.recipe import Augment, Train
from edgekd.training_log import METRICS

FORKED = multiprocessing.get_context("forkserver")
# Without a GPU nobody has to say that it is to be the CPU.
ON_CPU = {"ACCELERATE_USE_CPU": "1"} if torch.accelerator.is_available() else {}
FORKED.set_forkserver_preload(["edgekd.distill", "edgekd.networks", "sklearn.datasets"])


def without_batch_norm(num_classes: int) -> nn.Module:
    """A user's network: its batches may be split without changing what it computes, but for rounding."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


class Scaled(Method):
    """KD with a learned scale of the student's logits: a method with parameters of its own."""

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        self.scale = nn.Parameter(torch.ones(10) * 0.5)

    def forward(self, step: Step) -> dict[str, Tensor]:
        logits = step.student_logits * self.scale
        return {"ce": F.cross_entropy(logits, step.y), "mse": 0.1 * F.mse_loss(logits, step.teacher_logits)}


def train_here(folder: Path, environment: dict[str, str], train: dict, augment: dict, cached: bool) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    distill.CHECKPOINT_SECONDS, distill.LOOK_EVERY = 0.0, 4
    dataset = data.load("digits", {}, train_limit=420)
    network = networks.build("test_distributed:without_batch_norm", {}, dataset.shape, 10, ("lma", {}), 0)
    teacher = networks.build("resnet", {"depth": 8, "width": 0.25}, dataset.shape, 10, ("relu", {}), 1)
    method = Scaled()
    trained = distill.train(
        network, dataset, Train(**{"epochs": 4, "tensorboard": True, **train}), method, teacher=teacher,
        augment=Augment(**augment), seed=0, work=folder / "work", logits_cache=folder / "cache" if cached else None,
    )  # fmt: skip
    rank = environment.get("RANK", "0")
    networks.save_weights(network, folder / f"weights-{rank}.safetensors")
    (folder / f"trained-{rank}.json").write_text(json.dumps([trained.kept, method.scale.tolist(), trained.epochs]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def teach_each_other_here(folder: Path, environment: dict[str, str], stop_at: int) -> None:
    """Networks with batch normalisation, and a method that keeps statistics of its own; stops after so many batches."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    distill.CHECKPOINT_SECONDS, distill.LOOK_EVERY = 0.0, 2
    dataset = data.load("digits", {}, train_limit=160)
    network, *members = (
        networks.build("resnet", {"depth": 8, "width": 0.25}, dataset.shape, 10, ("relu", {}), seed)
        for seed in (0, 1, 2)
    )
    method = registry.create("method", "mutual_sources", options={"rounds": 2})

    def on_progress(progress: distill.Progress) -> None:
        if progress.done == stop_at:
            os._exit(0)

    trained = distill.train(
        network, dataset, Train(epochs=2, batch_size=8, ema=0.9, accumulate=2), method,
        teacher=Ensemble(members, "logits"), augment=Augment(crop=1), seed=0, work=folder / "work",
        on_progress=on_progress,
    )  # fmt: skip
    rank = environment["RANK"]
    networks.save_weights(nn.ModuleList([network, method]), folder / f"weights-{rank}.safetensors")
    (folder / f"trained-{rank}.json").write_text(json.dumps([trained.kept, None, trained.epochs]))
    torch.distributed.destroy_process_group()


def start(folder: Path, processes: int, target=train_here, **arguments) -> list[multiprocessing.Process]:
    """Begin to train in that many processes."""
    folder.mkdir(exist_ok=True)
    shared = {"OMP_NUM_THREADS": "1"} | ON_CPU
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in map(str, range(processes)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(processes)} if processes > 1 else {}
        children.append(FORKED.Process(target=target, args=(folder, shared | own, *arguments.values())))
        children[-1].start()
    return children


def run(folder: Path, processes: int, target=train_here, **arguments) -> list[tuple[dict[str, np.ndarray], list]]:
    """Train in that many processes: weights and (kept epoch, scale, metrics) of each."""
    children = start(folder, processes, target, **arguments)
    for child in children:
        child.join(280)
    exits = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert exits == [0] * processes
    return [
        (
            safetensors.numpy.load_file(folder / f"weights-{rank}.safetensors"),
            json.loads((folder / f"trained-{rank}.json").read_text()),
        )
        for rank in range(processes)
    ]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def without_seconds(epochs: list[dict]) -> list[dict]:
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]


SGD = {"lr": 1.0, "momentum": 0.5, "clip": 1.0, "ema": 0.5}
SGD |= {"schedule": "plateau", "patience": 1, "gamma": 0.5, "warmup": 1}
ADAMW = {"optimizer": "adamw", "lr": 0.01, "accumulate": 2}


@pytest.mark.parametrize(
    ("train", "augment", "cached"),
    [(SGD, {"crop": 1}, False), (ADAMW, {"crop": 1, "flip": True}, True)],
    ids=["sgd", "adamw-accumulate-cache"],
)
def test_two_processes_train_like_one_with_the_doubled_batch(train, augment, cached, tmp_path):
    two = run(tmp_path / "two", 2, train={**train, "batch_size": 8}, augment=augment, cached=cached)
    ((weights, (kept, scale, epochs)),) = run(
        tmp_path / "one", 1, train={**train, "batch_size": 16}, augment=augment, cached=cached
    )
    for found, (found_kept, found_scale, found_epochs) in two:
        assert found_kept == kept
        np.testing.assert_allclose(found_scale, scale, rtol=1e-3, atol=1e-4)
        assert not np.allclose(scale, 0.5)
        for name in weights:
            np.testing.assert_allclose(found[name], weights[name], rtol=2e-3, atol=2e-4, err_msg=name)
        for metrics, expected in zip(without_seconds(found_epochs), without_seconds(epochs), strict=True):
            assert metrics == pytest.approx(expected, rel=2e-3, abs=2e-4)
    # Among themselves the processes agree to the bit.
    (first, (*_, first_epochs)), (second, (*_, second_epochs)) = two
    assert without_seconds(first_epochs) == without_seconds(second_epochs)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert len(list((tmp_path / "two" / "work" / "tensorboard").iterdir())) == 1  # the first process alone writes
    assert epochs[-1]["train_loss_ce"] < 0.9 * epochs[0]["train_loss_ce"]  # or equal curves would mean little


@pytest.mark.slow
def test_statistics_of_two_processes_are_those_of_the_first_before_and_after_a_resume(tmp_path):
    """They are its own before every step, so that one checkpoint says all; to the bit, in both processes."""
    whole = run(tmp_path / "whole", 2, teach_each_other_here, stop_at=0)
    for child in start(tmp_path / "stopped", 2, teach_each_other_here, stop_at=14):  # of 18, a batch after a checkpoint
        child.join(280)
        assert child.exitcode == 0
    resumed = run(tmp_path / "stopped", 2, teach_each_other_here, stop_at=0)
    for (found, (kept, _, epochs)), (expected, (other_kept, _, other_epochs)) in zip(resumed, whole, strict=True):
        assert kept == other_kept and without_seconds(epochs) == without_seconds(other_epochs)
        assert found.keys() == expected.keys() and "1.running_distance" in found
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    (first, _), (second, _) = whole
    np.testing.assert_array_equal(first["1.running_distance"], second["1.running_distance"])  # of all samples
    means = [name for name in first if name.startswith("1.sources.") and name.endswith("running_mean")]
    assert any((first[name] != second[name]).any() for name in means)  # since the last step: own samples


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same_end(tmp_path):
    arguments = {"train": {**SGD, "batch_size": 8}, "augment": {"crop": 1}, "cached": False}
    whole = run(tmp_path / "whole", 2, **arguments)
    file = tmp_path / "killed" / "work" / METRICS

    def epochs_done() -> int:
        return len(file.read_text().splitlines()) if file.exists() else 0

    for epochs in (1, 2):
        children = start(tmp_path / "killed", 2, **arguments)
        while epochs_done() < epochs:
            assert all(child.is_alive() for child in children) or epochs_done() >= epochs
            time.sleep(0.005)
        time.sleep(0.1)  # somewhere in the next epoch
        for child in children:
            child.kill()
            child.join()
    resumed = run(tmp_path / "killed", 2, **arguments)
    for (found, (kept, scale, epochs)), (expected, (*others, other_epochs)) in zip(resumed, whole, strict=True):
        assert [kept, scale] == others
        assert without_seconds(epochs) == without_seconds(other_epochs)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


RECIPE = """\
name: several
data: {source: digits, train_limit: 200, test_limit: 50}
teacher: {network: resnet, depth: 8, width: 0.25, train: {epochs: 1, batch_size: 16}}
student: {network: resnet, depth: 8, width: 0.25, activation: lma}
distill: {method: kd, train: {epochs: 2, batch_size: 16}}
"""


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`accelerate launch` of the command line in two processes on the CPU."""
    (folder / "several.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), "-m", "edgekd", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ON_CPU}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=240)
        assert living(process.pid) == []
        return process.returncode, out, err
    finally:
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)


def living(session: int) -> list[int]:
    """The processes of a session, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *_, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # ended just now
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_line_in_two_processes(tmp_path):
    code, out, err = finished(launch(tmp_path, "distill", "several.yaml"))
    assert (code, err.count("..."), err.count("done in"), err.count("Traceback")) == (0, 3, 3, 0), (
        err
    )  # each stage once
    assert out.count("Student, distilled") == 1  # the first process alone prints
    stored = sorted(path.parent.name for path in (tmp_path / ".edgekd" / "store").glob("*/*"))
    assert stored == ["scratch", "student", "teacher"]
    assert len(list((tmp_path / ".edgekd" / "runs").iterdir())) == 1
    # A second time there is nothing to train; nor is there a teacher to train when it comes from a checkpoint.
    (weights,) = (tmp_path / ".edgekd" / "store" / "teacher").glob("*/weights.safetensors")
    for arguments in ([], ["--set", f"teacher.checkpoint={weights}"]):
        code, out, err = finished(launch(tmp_path, "distill", "several.yaml", *arguments))
        assert (code, err.count("student") > 0, out.count("Student, distilled")) == (0, True, 1), err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_in_two_processes_ends_both(tmp_path):
    code, _, err = finished(launch(tmp_path, "distill", "several.yaml", "--set", "teacher.train.lr=1e30"))
    assert code != 0
    # The first to fail may be either of them, and the launcher ends the other at once, before it can speak or after.
    assert err.count("error: the loss is not finite") in (1, 2), err
    assert not list((tmp_path / ".edgekd" / "store").glob("*/*"))
