"""Every method trains in several processes: real ones."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from method_pairs import OPTIONS, attached, digits_for, student_of, task_of, teacher_of

from edgekd import distill, registry
from edgekd.recipe import Augment, Train

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["edgekd.distill", "edgekd.networks", "sklearn.datasets"])


def train_here(name: str, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    method = registry.create("method", name, options=OPTIONS.get(name, {}))
    dataset = digits_for(task_of(method).name)
    (outputs,) = dataset.outputs
    student, teacher = student_of(name, outputs), teacher_of(name, outputs)
    start = {key: value.clone() for key, value in student.state_dict().items()}
    distill.train(
        student, dataset, Train(epochs=2, batch_size=6, lr=0.02, keep="last"), method,
        teacher=teacher if method.needs_teacher else None, augment=Augment(crop=1), seed=0, work=folder / "work",
    )  # fmt: skip
    assert any(not torch.equal(value, start[key]) for key, value in student.named_parameters())
    torch.save([student.state_dict(), method.state_dict()], folder / f"trained-{environment['RANK']}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names("method"))
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
    start = attached(name, student_of(name), teacher_of(name)).state_dict()
    assert not method or any(
        not torch.equal(value, start[key]) for key, value in method.items() if value.shape == start[key].shape
    )
