"""Every method trains in several processes: real ones, which train by one method after the other."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path

import pytest
import torch
from method_pairs import OPTIONS, attached, digits_for, student_of, task_of, teacher_of

from edgekd import distill, registry
from edgekd.recipe import Augment, Train

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["edgekd.distill", "edgekd.networks", "sklearn.datasets"])
METHODS = registry.names("method")
# All methods together take no longer than this; a process whose partner is gone waits for it no longer either.
SECONDS = 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 60)]  # whichever test is first waits for all methods


def train_here(folder: Path, environment: dict[str, str]) -> None:
    """Train by every method, into a file each; what goes wrong is written in its place."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    for name in METHODS:
        file = folder / f"{name}-{environment['RANK']}"
        try:
            torch.save(trained(name, folder / f"{name}-work"), file.with_suffix(".pt"))
        except BaseException:
            file.with_suffix(".txt").write_text(traceback.format_exc())
            raise
    torch.distributed.destroy_process_group()


def trained(name: str, work: Path) -> list[dict[str, torch.Tensor]]:
    """The state of student and method after two epochs."""
    method = registry.create("method", name, options=OPTIONS.get(name, {}))
    dataset = digits_for(task_of(method).name)
    (outputs,) = dataset.outputs
    student, teacher = student_of(name, outputs), teacher_of(name, outputs)
    start = {key: value.clone() for key, value in student.state_dict().items()}
    distill.train(
        student, dataset, Train(epochs=2, batch_size=6, lr=0.02, keep="last"), method,
        teacher=teacher if method.needs_teacher else None, augment=Augment(crop=1), seed=0, work=work,
    )  # fmt: skip
    assert any(not torch.equal(value, start[key]) for key, value in student.named_parameters())
    return [student.state_dict(), method.state_dict()]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What both processes have made, in files that `of` reads."""
    made = tmp_path_factory.mktemp("distributed")
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_CPU": "1", "LOCAL_WORLD_SIZE": "2"}
    children = [
        FORKED.Process(target=train_here, args=(made, shared | {"RANK": rank, "LOCAL_RANK": rank}), daemon=True)
        for rank in ("0", "1")
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + SECONDS
    try:
        for child in children:
            child.join(max(deadline - time.monotonic(), 0))
    finally:
        for child in children:
            child.kill()
    return made


def of(name: str, folder: Path) -> list[list[dict[str, torch.Tensor]]]:
    """By process: the states of student and method."""
    for file in sorted(folder.glob("*.txt")):
        if file.name.startswith(f"{name}-"):
            pytest.fail(file.read_text())
    files = [folder / f"{name}-{rank}.pt" for rank in (0, 1)]
    if not all(file.exists() for file in files):
        pytest.fail(f"both processes ended before {name}: {[file.name for file in folder.glob('*.txt')]}")
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_end_with_the_same_student_and_the_same_method(name, folder):
    (student, method), others = of(name, folder)
    for own, other in zip((student, method), others, strict=True):
        # Statistics of batch normalisation are each process's own; those of the student are shared at the end.
        for key in own:
            if own is student or "running" not in key:
                assert torch.equal(own[key], other[key]), key
    start = attached(name, student_of(name), teacher_of(name)).state_dict()
    assert not method or any(
        not torch.equal(value, start[key]) for key, value in method.items() if value.shape == start[key].shape
    )


def test_decorrelated_prune_sees_the_images_of_all_processes(folder):
    """Nothing was seen before `prune_at`, then one batch was: 6 images in each process, of 8x8 sites."""
    (_, method), _ = of("decorrelated_prune", folder)
    assert method["decided"] == 1
    assert method["in_count_0"] == 2 * 6 * 8 * 8
