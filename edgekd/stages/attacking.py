"""The stage that attacks the trained networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.artifact import Artifact
from edgekd.recipe import Attack
from edgekd.stages.job import Inputs, Job

# An attack that every network must fall to: half of all pixel values, in steps that get there. Where it does not, it is
# the gradient that is hidden, and robustness is not what was measured (Athalye, Carlini, Wagner, ICML 2018).
SANITY = Attack(epsilon=128.0, step_size=16.0, steps=20)
FALLEN = 0.05


def attack(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Measure how many test images each network tells right when they are attacked, all from the same random starts."""
    spec = job.recipe.attack
    assert spec is not None
    found, warnings = {}, []
    for number, (name, artifact) in enumerate(inputs.items()):
        job.on_progress(number / len(inputs), f"attacking the {name}")
        subject = "teacher" if name == "teacher" else "student"
        robust, sanity = (_withstood(job, subject, artifact, one) for one in (spec, SANITY))
        found[name] = {"robust_top1": robust, "sanity_top1": sanity, "n": len(job.dataset.test)}
        if sanity > FALLEN:
            warnings.append(
                f"The {name} still tells {sanity:.1%} right with half of every pixel's range to change: its gradient"
                " misleads the attack, and its accuracy under attack says little."
            )
    return {**spec.model_dump(), "sanity_epsilon": SANITY.epsilon, "networks": found, "warnings": warnings}


def _withstood(job: Job, subject: str, artifact: Artifact, spec: Attack) -> float:
    """The share of the test images that a network tells right under this attack."""
    import torch

    from edgekd import distill
    from edgekd.data.batches import evaluation_batches
    from edgekd.methods.attacks import Ball, withstood

    dataset, device = job.dataset, distill.processes().device
    network = job.restore(subject, artifact).to(device).requires_grad_(False)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    ball, size = Ball.of(spec.epsilon, spec.step_size, mean, std), distill.evaluation_batch(dataset)
    labels = torch.from_numpy(dataset.test.labels).to(device).split(size)
    torch.manual_seed(job.recipe.seed)
    images = evaluation_batches(dataset.test, dataset, batch_size=size, device=device)
    right = [withstood(network, x, y, ball, spec.steps).sum() for x, y in zip(images, labels, strict=True)]
    return float(torch.stack(right).sum()) / len(dataset.test)
