"""Several processes train as one: real processes, gloo on this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd import data, distill, networks
from edgekd.methods import Method, Step
from edgekd.recipe import Augment, Train

FORKED = multiprocessing.get_context("forkserver")
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

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        self.scale = nn.Parameter(torch.ones(10) * 0.5)

    def forward(self, step: Step) -> dict[str, Tensor]:
        logits = step.student_logits * self.scale
        return {"ce": F.cross_entropy(logits, step.y), "mse": 0.1 * F.mse_loss(logits, step.teacher_logits)}


def train_here(folder: Path, environment: dict[str, str], train: dict, augment: dict, cached: bool) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
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


def run(folder: Path, processes: int, **arguments) -> list[tuple[dict[str, np.ndarray], list]]:
    """Train in that many processes: weights and (kept epoch, scale, metrics) of each."""
    folder.mkdir()
    shared = {
        "ACCELERATE_USE_CPU": "1",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    several = [
        shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        for rank in range(processes)
    ]
    children = [
        FORKED.Process(target=train_here, args=(folder, environment, *arguments.values()))
        for environment in (several if processes > 1 else [{"ACCELERATE_USE_CPU": "1"}])
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
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
