"""What the cache of the teacher's logits saves: whole trainings with it, as a ratio to the same ones without.

Images are random, as their content costs nothing, and cropped, so that the teacher answers anew in every epoch. Within
a round three trainings take turns: the teacher is asked at every step; the first student fills the cache; the next one
finds it filled. What the table holds is compared with what the teacher answers in the batches of the training.

    python benchmarks/teacher_cache.py [--rounds 5] [--threads 1] [--report]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import accelerate
import numpy as np
import torch
from results import spread, summary, table, write_section
from torch import nn

from edgekd import distill, networks, registry
from edgekd.data import Dataset, Split
from edgekd.data.batches import Batches
from edgekd.recipe import Augment, Train
from edgekd.teacher_logits import TeacherLogits

IMAGES, BUDGET, AUGMENT = 640, Train(epochs=2, batch_size=64, lr=0.01, keep="last"), Augment(crop=4, flip=True)
TEACHERS = {"ResNet-20": 20, "ResNet-56": 56}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dataset, rows, worst = noise(), [], 0.0
    for name, depth in TEACHERS.items():
        teacher = network(dataset, depth, 1).eval()
        seconds = [one_round(dataset, teacher) for _ in range(given.rounds)]
        first, following = (spread(summary([one[number] / one[0] for one in seconds])) for number in (1, 2))
        worst = max(worst, difference(dataset, teacher))
        rows.append([name, first, following])
        print(*rows[-1], f"{worst:.1e}", flush=True)
    if given.report:
        write_section("teacher_cache", "A teacher whose answers are kept", report(rows, worst, given))


def noise() -> Dataset:
    rng = np.random.default_rng(0)
    train, val = (Split(rng.integers(0, 256, (n, 3, 32, 32), np.uint8), rng.integers(0, 10, n)) for n in (IMAGES, 64))
    return Dataset("noise", train, val, val, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)


def network(dataset: Dataset, depth: int, seed: int) -> nn.Module:
    return networks.build("resnet", {"depth": depth}, dataset.shape, 10, ("relu", {}), seed)


def one_round(dataset: Dataset, teacher: nn.Module) -> list[float]:
    """Seconds of the processor for each of the three trainings: others may use it too."""
    with tempfile.TemporaryDirectory() as folder:
        caches = [None, Path(folder) / "cache", Path(folder) / "cache"]
        return [train(dataset, teacher, Path(folder) / str(number), cache) for number, cache in enumerate(caches)]


def train(dataset: Dataset, teacher: nn.Module, work: Path, cache: Path | None) -> float:
    student, method = network(dataset, 8, 0), registry.create("method", "kd")
    started = time.process_time()
    distill.train(
        student, dataset, BUDGET, method, teacher=teacher, augment=AUGMENT, seed=0, work=work, logits_cache=cache
    )
    return time.process_time() - started


@torch.no_grad()
def difference(dataset: Dataset, teacher: nn.Module) -> float:
    """Between the table and the teacher in the batches of an epoch: the largest, as a share of the largest logit."""
    batches = Batches(
        dataset.train, dataset, batch_size=BUDGET.batch_size, augment=AUGMENT, seed=0, device=torch.device("cpu")
    )
    kept = TeacherLogits(teacher, dataset, batches, AUGMENT, accelerate.Accelerator(cpu=True), None).of(0)
    away = [(kept[batch.index] - teacher(batch.x)).abs().max() for batch in batches.epoch(0)]
    return float(torch.stack(away).max() / kept.abs().max())


def report(rows: list[list[str]], worst: float, given: argparse.Namespace) -> str:
    header = ["teacher", "first student, fills it", "every further student"]
    return (
        f"Processor time of a whole training with `cache_teacher`, over the same training in which the teacher is asked"
        f" at every step: ResNet-8 on {IMAGES} random images of 32x32, cropped and mirrored, {BUDGET.epochs} epochs,"
        f" {given.threads} thread(s); median of {given.rounds} interleaved rounds (10th to 90th percentile).\n\n"
        f"{table(header, rows)}\n\n"
        f"The logits that were kept {exactness(worst)}.\n\nMade by `benchmarks/teacher_cache.py`."
    )


def exactness(worst: float) -> str:
    if worst == 0:
        return "are those of the training's own batches, to the bit"
    return f"differ from those of the training's own batches by at most {worst:.1e} of the largest, which is rounding"


if __name__ == "__main__":
    main()
