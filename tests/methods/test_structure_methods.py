"""Peers, angles between classes and the geometry of maps: against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import B, K, arrays, attached, cross_entropy, one_step, pair, setting, softmax, step_of
from torch import nn
from torch.nn import functional as F

from edgekd import registry
from edgekd.errors import RecipeError
from edgekd.methods.geometric import site_distances


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_online_peers(progress):
    student, _ = pair()
    method = attached("online_peers", student, None, peers=2, temperature=2.0)
    step = step_of(method, student, student, progress)
    terms = {name: value.item() for name, value in method(step).items()}
    y, leader = step.y.numpy(), step.student_logits.detach().double().numpy()
    with torch.no_grad():
        features = np.stack([peer.pool(peer.stages(peer.stem(step.x))).double().numpy() for peer in method.peers], 1)
        logits = np.stack([peer(step.x).double().numpy() for peer in method.peers], 1)
    query, key = (one.weight.detach().double().numpy() for one in (method.query, method.key))
    assert query.shape == (2, 16)
    scores = np.einsum("bad,bcd->bac", features @ query.T, features @ key.T)
    attention = np.exp(scores) / np.exp(scores).sum(2, keepdims=True)
    targets = np.einsum("bac,bck->bak", attention, logits)
    weight = 4 * np.exp(-5 * (1 - min(progress / 0.27, 1)) ** 2)
    assert terms["ce"] == pytest.approx(cross_entropy(leader, y), rel=1e-4)
    assert terms["peers_ce"] == pytest.approx(sum(cross_entropy(logits[:, a], y) for a in range(2)), rel=1e-4)
    own = sum(kl(softmax(targets[:, a] / 2), softmax(logits[:, a] / 2)) for a in range(2))
    assert terms["peers"] == pytest.approx(weight * own, rel=1e-3)
    assert terms["leader"] == pytest.approx(weight * kl(softmax(logits.mean(1) / 2), softmax(leader / 2)), rel=1e-3)
    p = [softmax(logits[:, a]) for a in range(2)]
    assert step.recorded["diversity"].item() == pytest.approx(np.linalg.norm(p[0] - p[1], axis=1).mean(), rel=1e-4)
    assert step.recorded["peers_score"].item() == pytest.approx((logits.mean(1).argmax(1) == y).mean())


def test_peers_begin_differently_and_attend_by_sample():
    student, _ = pair()
    method = attached("online_peers", student, None)
    assert len(method.peers) == 3
    convolutions = [peer.stages[0][0].conv1.weight for peer in (*method.peers, student)]
    for number, weight in enumerate(convolutions):
        assert not any(torch.equal(weight, other) for other in convolutions[:number])
    attention = method.attention(torch.randn(B, 3, 16))
    torch.testing.assert_close(attention.sum(2), torch.ones(B, 3))
    assert attention.std(0).min() > 0 and not torch.equal(attention[:, 0], attention[:, 1])
    with pytest.raises(RecipeError) as caught:
        registry.create("method", "online_peers", options={"peers": 1})
    assert str(caught.value) == (
        "error: distill.peers = 1 is not valid\n"
        "       expected: 2 or more, to teach each other\n"
        "fix:   --set distill.peers=3"
    )


def test_angular():
    terms, step, method = one_step("angular", weight=3.0, ce_weight=0.5)
    (layer,) = method._layer
    w = layer.weight.detach().double().numpy()
    assert w.shape == (K, 16)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert terms["angular"] == pytest.approx(3.0 * cosines.mean(), rel=1e-4)  # over all i, j
    assert terms["ce"] == pytest.approx(0.5 * cross_entropy(step.student_logits.detach().numpy(), step.y.numpy()))
    angles = np.degrees(np.arccos(cosines[np.triu_indices(K, 1)]))
    found = [step.recorded[f"angle_{name}"].item() for name in ("min", "mean", "max")]
    assert found == pytest.approx([angles.min(), angles.mean(), angles.max()], rel=1e-4)


def test_the_angular_term_alone_spreads_the_classes_to_a_simplex():
    student, _ = pair()
    method = attached("angular", student, None)
    before = {name: value.clone() for name, value in student.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        step = step_of(method, student, student)
        method(step)["angular"].backward()
        optimizer.step()
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight"}
    unit = F.normalize(student.fc.weight.detach())
    assert (unit @ unit.T).sum().item() == pytest.approx(0, abs=1e-3)
    assert step.recorded["angle_mean"].item() == pytest.approx(np.degrees(np.arccos(-1 / (K - 1))), abs=5)


def test_class_vectors_keep_their_length_and_have_no_bias():
    student, other = pair()
    method = attached("angular", student, None, length=3.0)
    weight = student.fc.weight.detach().double().numpy()
    for one in (student, other):  # the moving average of the weights too
        torch.nn.init.ones_(one.fc.bias)
        method.constrain(one, step_size=0.0, progress=0.5)
        assert not one.fc.bias.any()
    expected = 3 * weight / np.linalg.norm(weight, axis=1, keepdims=True)
    np.testing.assert_allclose(student.fc.weight.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(other.fc.weight.detach().numpy(), axis=1), 3, rtol=1e-5)
    before = student.fc.weight.clone(), student.fc.bias.clone()
    attached("angular", student, None).constrain(student, step_size=0.1, progress=0.5)  # by default nothing happens
    assert torch.equal(student.fc.weight, before[0]) and torch.equal(student.fc.bias, before[1])
    with pytest.raises(RecipeError) as caught:
        registry.create("method", "angular", options={"length": 0.0})
    assert str(caught.value).startswith("error: distill.length = 0.0 is not valid\n       expected: above 0\n")


def test_a_classifier_that_is_not_there():
    student, _ = pair()
    with pytest.raises(RecipeError) as caught:
        attached("angular", student, None, classifier="head")
    assert str(caught.value) == (
        'error: distill.classifier = "head" is not a known layer of the student with 5 outputs\n'
        "       known: fc\n"
        "fix:   leave it out"
    )
    method = registry.create("method", "angular")
    with pytest.raises(RecipeError) as caught:
        method.attach(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), None, setting())
    assert str(caught.value) == (
        "error: the student has no linear layer with 5 outputs\n"
        "       expected: a network whose logits a linear layer gives: its rows are the classes' vectors\n"
        "fix:   use another method, or another student"
    )


def geometry(sites: np.ndarray) -> np.ndarray:
    """[B, N, N] distances in units of their mean, of the sites of a map [B, C, H, W]."""
    rows = sites.reshape(*sites.shape[:2], -1).transpose(0, 2, 1)
    away = np.linalg.norm(rows[:, :, None] - rows[:, None], axis=3)
    n = away.shape[1]
    return away / (away.sum((1, 2), keepdims=True) / (n * (n - 1)))


@pytest.mark.parametrize("form", ["affinity", "contrast"])
def test_geometric(form):
    options = {"weight": 2.0, "form": form, "temperature": 0.4, "neighbours": 2}
    terms, step, _ = one_step("geometric", **options)
    expected = 0.0
    for student, teacher in zip(arrays(step.student_features), arrays(step.teacher_features), strict=True):
        losses = []
        for own, wanted in zip(geometry(student), geometry(teacher), strict=True):
            for i in range(len(own)):
                others = [j for j in range(len(own)) if j != i]
                q, p = (np.exp(-away[i, others] / 0.4) for away in (own, wanted))
                if form == "affinity":
                    p, q = p / p.sum(), q / q.sum()
                    losses.append((p * np.log(p / q)).sum())
                else:
                    nearest = np.argsort(-p)[:2]
                    losses.append(-np.log(q[nearest].sum() / q.sum()))
        expected += np.mean(losses)
    assert terms["geometric"] == pytest.approx(2.0 * expected, rel=1e-3)


def test_geometry_knows_nothing_of_rotation_scale_and_channels():
    generator = torch.Generator().manual_seed(0)
    sites = torch.randn(2, 6, 16, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(9, 9, generator=generator))
    turned = 3.7 * torch.einsum("dc,bcn->bdn", rotation[:, :6], sites)
    torch.testing.assert_close(site_distances(turned), site_distances(sites), rtol=1e-3, atol=1e-3)


def test_of_large_maps_sites_are_drawn():
    terms, *_ = one_step("geometric", sites=8)
    everything, *_ = one_step("geometric")
    assert terms["geometric"] != everything["geometric"]
    with pytest.raises(RecipeError) as caught:
        attached("geometric", *pair(), sites=2)
    assert str(caught.value) == (
        'error: "stages.0" and its pair have 2 sites in common, and geometry needs 3\n'
        "       expected: maps of 3 sites or more, and distill.sites from 3\n"
        "fix:   tap earlier modules, or larger images"
    )
