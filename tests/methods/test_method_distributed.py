"""Methods that own parameters, remember something or attack their images train in several processes: real ones."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from method_pairs import OPTIONS, attached, pair, student_of

from edgekd import data, distill, networks, registry
from edgekd.recipe import Augment, Train

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["edgekd.distill", "edgekd.networks", "sklearn.datasets"])
OWNERS = [name for name in registry.names("method") if attached(name, *pair(name)).state_dict()]
ATTACKERS = ["ard", "bss"]  # they meet the student several times in a step


def train_here(name: str, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dataset = data.with_target(data.load("digits", {}, train_limit=60), "digits", {})
    student = student_of(name, classes=10)
    teacher = networks.build("resnet", {"depth": 8, "width": 0.375}, dataset.shape, 10, ("relu", {}), 1)
    method = registry.create("method", name, options=OPTIONS.get(name, {}))
    distill.train(
        student, dataset, Train(epochs=2, batch_size=6, lr=0.02, keep="last"), method,
        teacher=teacher if method.needs_teacher else None, augment=Augment(crop=1), seed=0, work=folder / "work",
    )  # fmt: skip
    torch.save([student.state_dict(), method.state_dict()], folder / f"trained-{environment['RANK']}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OWNERS, *ATTACKERS])
def test_two_processes_end_with_the_same_student_and_the_same_method(name, tmp_path):
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_CPU": "1", "LOCAL_WORLD_SIZE": "2"}
    children = [
        FORKED.Process(target=train_here, args=(name, tmp_path, shared | {"RANK": rank, "LOCAL_RANK": rank}))
        for rank in ("0", "1")
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(280)
    exits = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert exits == [0, 0]
    (student, method), others = (torch.load(tmp_path / f"trained-{rank}.pt") for rank in (0, 1))
    for own, other in zip((student, method), others, strict=True):
        # Statistics of batch normalisation are each process's own; those of the student are shared at the end.
        for key in own:
            if own is student or "running" not in key:
                assert torch.equal(own[key], other[key]), key
    start = attached(name, *pair(name)).state_dict()
    assert name in ATTACKERS or any(
        not torch.equal(value, start[key]) for key, value in method.items() if value.shape == start[key].shape
    )
