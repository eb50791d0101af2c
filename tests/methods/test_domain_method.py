"""Adaptation to another domain: its images come without labels, its formula is that of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from method_pairs import attached, cross_entropy, one_step, pair, setting, softmax, step_of
from tiny_job import make_job

from edgekd import data, pipeline, registry
from edgekd.data.batches import UnlabelledBatches
from edgekd.errors import DataError, RecipeError
from edgekd.methods import attachment
from edgekd.methods.domain_kd import discrepancy
from edgekd.recipe import Augment, Train


def mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Five Gaussian kernels, one pair of samples at a time."""
    both = np.concatenate([first, second])
    distances = np.array([[((a - b) ** 2).sum() for b in both] for a in both])
    width = distances.sum() / (len(both) ** 2 - len(both)) / 4
    kernel = sum(np.exp(-distances / (width * 2**number)) for number in range(5))
    n = len(first)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean()


def test_the_discrepancy_is_that_of_its_formula_and_none_of_a_set_from_itself():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (7, 4)), rng.normal(0.5, 1, (9, 4))
    found = discrepancy(torch.from_numpy(first), torch.from_numpy(second)).item()
    assert found == pytest.approx(mmd(first, second), rel=1e-9)
    assert found > 0.05
    assert discrepancy(*[torch.from_numpy(first)] * 2).item() == pytest.approx(0, abs=1e-12)
    assert discrepancy(torch.zeros(3, 2), torch.zeros(3, 2)).item() == 0


def test_domain_kd_computes_its_formula():
    found, step, _ = one_step("domain_kd", 0.3)
    student, teacher = pair()
    adapted = attached("domain_kd", student, teacher).adapted  # as the copy was before the step
    with torch.no_grad():
        features = [adapted.pool(adapted.stages(adapted.stem(x))).double().numpy() for x in (step.x, step.target)]
    adapted = attached("domain_kd", student, teacher).adapted
    with torch.no_grad():
        source, target, own, own_target = (
            network(x).double().numpy()
            for network, x in ((adapted, step.x), (adapted, step.target), (student, step.x), (student, step.target))
        )
    beta, tau = 0.1 * 9**0.3, 20.0
    gamma = 2 / (1 + math.exp(-10 * 0.6)) - 1  # 2 epochs: 0.6 of the first

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        p, q = softmax(p / tau), softmax(q / tau)
        return float((p * np.log(p / q)).sum(1).mean())

    expected = {
        "ce": beta * 0.7 * cross_entropy(own, step.y.numpy()),
        "kd_source": beta * 0.3 * tau**2 * kl(source, own),
        "kd_target": beta * tau**2 * kl(target, own_target),
        "teacher_ce": (1 - beta) * cross_entropy(source, step.y.numpy()),
        "teacher_mmd": (1 - beta) * gamma * mmd(*features),
    }
    assert found == pytest.approx(expected, rel=1e-3)


def test_every_epoch_begins_without_the_discrepancy():
    """15 / 22 * 22 falls short of 15 by rounding."""
    student, teacher = pair()
    method = registry.create("method", "domain_kd")
    method.attach(student, teacher, setting(22))
    for epoch in (0, 15):
        assert method(step_of(method, student, teacher, epoch / 22))["teacher_mmd"].item() == pytest.approx(0, abs=1e-6)
    assert method(step_of(method, student, teacher, 15.5 / 22))["teacher_mmd"].item() > 0.01


def test_beta_goes_from_a_tenth_to_nine_tenths():
    method = registry.create("method", "domain_kd")
    for progress, beta in ((0.0, 0.1), (0.5, 0.3), (1.0, 0.9)):
        assert method.scheduled(progress) == {"beta": pytest.approx(beta)}


def test_each_network_learns_from_its_own_terms():
    student, teacher = pair()
    method = attached("domain_kd", student, teacher)
    terms = method(step_of(method, student, teacher))
    (terms["ce"] + terms["kd_source"] + terms["kd_target"]).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in method.adapted.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.zero_grad()
    (terms["teacher_ce"] + terms["teacher_mmd"]).backward()
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(parameter.grad is not None for parameter in method.adapted.parameters())


def test_the_teachers_learning_rate_falls():
    student, teacher = pair()
    method = attached("domain_kd", student, teacher)
    (optimizer,) = method.optimizers()
    assert {id(one) for one in optimizer.param_groups[0]["params"]} == {id(one) for one in method.parameters()}
    method(step_of(method, student, teacher, 0.5))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001 / 6**0.75)


# --- the target domain's images ----------------------------------------------------------------------------------


def digits() -> data.Dataset:
    return data.load("digits", {}, train_limit=60, test_limit=20)


def test_images_come_in_an_order_that_depends_on_their_number_alone():
    dataset = data.with_target(digits(), "digits", {})
    options = {"batch_size": 50, "augment": Augment(crop=1), "seed": 3, "device": "cpu"}
    assert dataset.target is not None and len(dataset.target.images) > 1000
    one, other = (UnlabelledBatches(dataset.target.images, dataset, **options) for _ in range(2))
    row = [one[number] for number in range(60)]  # more than two epochs
    for number in (40, 41, 0, 28, 59, 59, 3):
        assert torch.equal(other[number], row[number])
    assert len({batch.sum().item() for batch in row}) == 60


def test_a_domain_that_does_not_fit(tmp_path):
    file = tmp_path / "other.npz"
    np.savez(file, images=np.random.default_rng(0).integers(0, 255, (40, 8, 9), np.uint8), labels=np.arange(40) % 10)
    with pytest.raises(DataError) as caught:
        data.with_target(digits(), "npz", {"path": str(file)})
    assert str(caught.value) == (
        f"error: data.target_domain: {file} has images of 1x8x9 in 10 classes\n"
        "       expected: those of the data, 1x8x8 in 10 classes\n"
        "fix:   bring the images of the target domain to this shape; a class may have no image"
    )


def test_a_recipe_without_a_target_domain():
    student, teacher = pair()
    with pytest.raises(RecipeError) as caught:
        attachment.attach(registry.create("method", "domain_kd"), student, teacher, digits(), Train(epochs=1))
    assert str(caught.value) == (
        "error: the method domain_kd learns from images of a target domain, and the recipe names none\n"
        "       data.target_domain: SOURCE or {SOURCE: {option: value}}, like data.source; labels are not used\n"
        "fix:   --set 'data.target_domain={folder: {path: FOLDER}}', or another distill.method"
    )


def test_every_network_is_measured_on_the_target_domain(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (40, 8, 8), np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "target.npz", images=images, labels=labels)
    path = f"data.target_domain.npz.path={tmp_path / 'target.npz'}"
    job = make_job(tmp_path / "store", path, "distill.method=domain_kd", "distill.scratch=false")
    made = pipeline.run(job, "student")
    for stage in ("teacher", "student"):
        found = made[stage].result["target"]
        assert found["name"] == "npz" and found["n"] == len(job.dataset.target.test) == 8
        assert 0 <= found["score"] <= 1 and found["text"] == f"top1 {found['score']:.1%}"
    # Other images, the same path: what was made with the old ones is not taken for it.
    np.savez(tmp_path / "target.npz", images=images[::-1], labels=labels)
    again = make_job(tmp_path / "store", path, "distill.method=domain_kd", "distill.scratch=false")
    assert [planned.action for planned in pipeline.plan(again, "student")] == ["run", "unknown"]
