"""Every method's terms against its equations in plain NumPy, written from the papers and not from the code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import B, K, N, arrays, attached, cross_entropy, one_step, pair, setting, softmax, step_of

from edgekd import registry

ALL = ("stages.0", "stages.1", "stages.2")


def logits(step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        step.teacher_logits.double().numpy(),
        step.student_logits.detach().double().numpy(),
        step.y.numpy(),
    )


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(1).mean())


def normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def batch_normalized(x: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """Of a map [B, C, H, W] with the batch's own statistics, as a new layer does it."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon)


def weights(module) -> np.ndarray:
    return module.weight.detach().double().numpy()


def halved(x: np.ndarray, side: int) -> np.ndarray:
    """A square map averaged down to that side, which divides its own."""
    b, c, h, _ = x.shape
    return x.reshape(b, c, side, h // side, side, h // side).mean((3, 5))


def smooth_l1(a: np.ndarray, b: np.ndarray) -> float:
    d = np.abs(a - b)
    return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())


@pytest.mark.parametrize("selective", ["right", "sure"])
def test_kd_selects(selective):
    terms, step, _ = one_step("kd", kd_weight=0.6, temperature=2.0, selective=selective, confidence=0.2)
    teacher, student, y = logits(step)
    p, q, of_label = softmax(teacher / 2), softmax(student / 2), softmax(teacher)[np.arange(B), y]
    trusted = teacher.argmax(1) == y if selective == "right" else of_label > 0.2
    assert 0 < trusted.sum() < B
    divergence = (p * np.log(p / q)).sum(1)
    labels = -np.log(softmax(student)[np.arange(B), y])
    assert terms["kd"] == pytest.approx(0.6 * 4 * (divergence * trusted).mean(), rel=1e-4)
    assert terms["ce"] == pytest.approx((np.where(trusted, 0.4, 1.0) * labels).mean(), rel=1e-4)
    assert step.recorded["trusted"].item() == pytest.approx(trusted.mean())


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_kd_is_annealed(progress):
    options = {"kd_weight": {"linear": [0.9, 0.1]}, "temperature": {"exponential": [8.0, 1.0]}}
    terms, step, _ = one_step("kd", progress=progress, **options)
    teacher, student, y = logits(step)
    weight, tau = 0.9 - 0.8 * progress, 8 ** (1 - progress)
    assert terms["kd"] == pytest.approx(weight * tau**2 * kl(softmax(teacher / tau), softmax(student / tau)), rel=1e-4)
    assert terms["ce"] == pytest.approx((1 - weight) * cross_entropy(student, y), rel=1e-4)


def test_dkd():
    terms, step, _ = one_step("dkd", alpha=0.5, beta=3.0, kd_weight=0.8, ce_weight=0.7, temperature=2.0)
    teacher, student, y = logits(step)
    rows, mask = np.arange(B), np.eye(K, dtype=bool)[y]
    p, q = softmax(teacher / 2), softmax(student / 2)
    target = kl(np.stack([p[rows, y], 1 - p[rows, y]], 1), np.stack([q[rows, y], 1 - q[rows, y]], 1))
    others = [one[~mask].reshape(B, K - 1) for one in (p, q)]
    non_target = kl(*(one / one.sum(1, keepdims=True) for one in others))
    assert terms["target"] == pytest.approx(0.8 * 4 * 0.5 * target, rel=1e-4)
    assert terms["non_target"] == pytest.approx(0.8 * 4 * 3.0 * non_target, rel=1e-4)
    assert terms["ce"] == pytest.approx(0.7 * cross_entropy(student, y), rel=1e-4)
    # The split is exact: Hinton's divergence is the target's plus (1 - p_t) times the non-target's, sample by sample.
    each = (others[0] / others[0].sum(1, keepdims=True)) * np.log(
        (others[0] / others[0].sum(1, keepdims=True)) / (others[1] / others[1].sum(1, keepdims=True))
    )
    assert kl(p, q) == pytest.approx(target + ((1 - p[rows, y]) * each.sum(1)).mean())


def test_dist():
    terms, step, _ = one_step("dist", beta=1.5, gamma=0.5, temperature=3.0)
    teacher, student, y = logits(step)
    p, q = softmax(teacher / 3), softmax(student / 3)
    rows = np.mean([1 - np.corrcoef(p[b], q[b])[0, 1] for b in range(B)])
    columns = np.mean([1 - np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(K)])
    assert terms["inter"] == pytest.approx(1.5 * 9 * rows, rel=1e-3)
    assert terms["intra"] == pytest.approx(0.5 * 9 * columns, rel=1e-3)
    assert terms["ce"] == pytest.approx(cross_entropy(student, y), rel=1e-4)


@pytest.mark.parametrize("taps", [ALL, ("stages.1",)])
def test_fitnet(taps):
    terms, step, method = one_step(
        "fitnet", weight=3.0, ce_weight=0.5, student_taps=list(taps), teacher_taps=list(taps)
    )
    hints = []
    students, teachers = arrays(step.student_features), arrays(step.teacher_features)
    for regressor, student, teacher in zip(method.adapters, students, teachers, strict=True):
        projected = batch_normalized(np.einsum("dc,bchw->bdhw", weights(regressor[0])[:, :, 0, 0], student))
        hints.append(((projected - teacher) ** 2).mean())
    assert len(hints) == len(taps)
    assert terms["hint"] == pytest.approx(3.0 / 2 * np.mean(hints), rel=1e-4)
    assert terms["ce"] == pytest.approx(0.5 * cross_entropy(logits(step)[1], step.y.numpy()), rel=1e-4)


def test_maps_of_other_sizes_are_averaged_down():
    terms, step, _ = one_step("attention", weight=7.0, student_taps=["stages.0"], teacher_taps=["stages.1"])
    (student,), (teacher,) = arrays(step.student_features), arrays(step.teacher_features)
    assert student.shape[2] == 2 * teacher.shape[2]
    q = [normalized((one**2).sum(1).reshape(B, -1)) for one in (halved(student, teacher.shape[2]), teacher)]
    assert terms["attention"] == pytest.approx(7.0 * ((q[0] - q[1]) ** 2).mean(), rel=1e-4)


def test_attention():
    terms, step, _ = one_step("attention", weight=100.0)
    expected = 0.0
    for student, teacher in zip(arrays(step.student_features), arrays(step.teacher_features), strict=True):
        q = [normalized((one**2).sum(1).reshape(B, -1)) for one in (student, teacher)]
        expected += ((q[0] - q[1]) ** 2).mean()
    assert tuple(step.student_features) == ALL
    assert terms["attention"] == pytest.approx(100 * expected, rel=1e-4)


def test_rkd():
    terms, step, _ = one_step("rkd", distance_weight=2.0, angle_weight=3.0)
    (student,), (teacher,) = arrays(step.student_features), arrays(step.teacher_features)
    assert student.shape == (B, 16) and teacher.shape == (B, 24)
    relations = []
    for embedding in (student, teacher):
        away = np.linalg.norm(embedding[:, None] - embedding[None], axis=2)
        angle = np.zeros((B, B, B))
        for j in range(B):
            for i in range(B):
                for k in range(B):
                    if i != j and k != j:
                        u, v = embedding[i] - embedding[j], embedding[k] - embedding[j]
                        angle[j, i, k] = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        relations.append((away / away[away > 0].mean(), angle))
    assert terms["distance"] == pytest.approx(2.0 * smooth_l1(relations[0][0], relations[1][0]), rel=1e-3)
    assert terms["angle"] == pytest.approx(3.0 * smooth_l1(relations[0][1], relations[1][1]), rel=1e-3)


def test_crd():
    options = {"negatives": 16, "dimensions": 8, "weight": 0.5, "temperature": 0.1, "momentum": 0.7}
    student, teacher = pair()
    method = attached("crd", student, teacher, **options)
    step = step_of(method, student, teacher)
    memories = {owner: getattr(method, f"{owner}_memory").double().numpy().copy() for owner in ("student", "teacher")}
    torch.manual_seed(4)
    negatives = method._negatives(step.y).numpy()
    torch.manual_seed(4)
    terms = method(step)
    assert (negatives % K != step.y.numpy()[:, None]).all()  # sample i is of class i mod K
    projected = {}
    for owner, features in (("student", step.student_features), ("teacher", step.teacher_features)):
        linear = getattr(method, f"{owner}_projection")
        bias = linear.bias.detach().double().numpy()
        projected[owner] = normalized(arrays(features)[0] @ weights(linear).T + bias)
    expected, noise = 0.0, 16 / N
    for owner, other in (("student", "teacher"), ("teacher", "student")):
        columns = np.concatenate([step.index.numpy()[:, None], negatives], 1)
        similar = np.exp(np.einsum("bd,bmd->bm", projected[owner], memories[other][columns]) / 0.1)
        h = similar / (similar.mean() * N)
        expected -= np.log(h[:, 0] / (h[:, 0] + noise)).sum() / B
        expected -= np.log(noise / (h[:, 1:] + noise)).sum() / B
    assert terms["contrast"].item() == pytest.approx(0.5 * expected, rel=1e-4)
    for owner, before in memories.items():
        after = before.copy()
        after[step.index] = normalized(0.7 * before[step.index] + 0.3 * projected[owner])
        np.testing.assert_allclose(getattr(method, f"{owner}_memory"), after, rtol=1e-4, atol=1e-6)


def test_crd_draws_negatives_from_all_samples_of_all_other_classes():
    _, step, method = one_step("crd", negatives=4000, dimensions=4)
    drawn = method._negatives(step.y).numpy()
    for row, y in zip(drawn, step.y.numpy(), strict=True):
        found, counts = np.unique(row, return_counts=True)
        assert set(found) == {i for i in range(N) if i % K != y}
        assert counts.min() > 60 and counts.max() < 200  # 125 expected


def test_review():
    terms, step, method = one_step("review", weight=2.0)
    students, teachers = arrays(step.student_features), arrays(step.teacher_features)
    middle, below, expected = students[-1].shape[1], None, 0.0
    for fusion, student, teacher in zip(method.fusions, students[::-1], teachers[::-1], strict=True):
        side = teacher.shape[2]
        fused = batch_normalized(np.einsum("dc,bchw->bdhw", weights(fusion.project[0])[:, :, 0, 0], student))
        if below is not None:
            below = below.repeat(side // below.shape[2], 2).repeat(side // below.shape[3], 3)
            both = np.concatenate([fused, below], 1)
            attend = fusion.attend[0]
            z = np.einsum("dc,bchw->bdhw", weights(attend)[:, :, 0, 0], both)
            z = 1 / (1 + np.exp(-z - attend.bias.detach().double().numpy()[:, None, None]))
            fused = fused * z[:, :1] + below * z[:, 1:]
        assert fused.shape == (B, middle, side, side)
        padded = np.pad(fused, ((0, 0), (0, 0), (1, 1), (1, 1)))
        kernel = weights(fusion.output[0])
        output = sum(
            np.einsum("dc,bchw->bdhw", kernel[:, :, i, j], padded[:, :, i : i + side, j : j + side])
            for i in range(3)
            for j in range(3)
        )
        output, below = batch_normalized(output), fused
        levels = [((output - teacher) ** 2).mean()]
        levels += [((halved(output, s) - halved(teacher, s)) ** 2).mean() for s in (4, 2, 1) if s < side]
        shares = 0.5 ** np.arange(len(levels))
        expected += (shares * levels).sum() / shares.sum()
    assert terms["review"] == pytest.approx(2.0 * expected, rel=1e-3)


def test_combined_adds_what_each_distils_and_counts_the_labels_once():
    both, *_ = one_step("combined", methods=[{"kd": {"kd_weight": 0.4}}, {"rkd": {"ce_weight": 5.0}}, "dist", "dist"])
    kd, *_ = one_step("kd", kd_weight=0.4)
    rkd, *_ = one_step("rkd")
    dist, *_ = one_step("dist")
    assert both == pytest.approx(
        {
            "ce": kd["ce"], "kd_kd": kd["kd"], "rkd_distance": rkd["distance"], "rkd_angle": rkd["angle"],
            "dist_inter": dist["inter"], "dist_intra": dist["intra"],
            "dist-2_inter": dist["inter"], "dist-2_intra": dist["intra"],
        },
        rel=1e-5,
    )  # fmt: skip


def test_what_changes_over_the_training_is_told():
    kd = {"kd": {"kd_weight": {"linear": [1.0, 0.0]}, "temperature": {"linear": [8.0, 1.0]}}}
    rkd = {"rkd": {"angle_weight": {"step": [1.0, 2.0]}}}
    assert registry.create("method", "kd").scheduled(0.5) == {}
    assert registry.create("method", "kd", options=kd["kd"]).scheduled(0.5) == {"kd_weight": 0.5, "temperature": 4.5}
    together = registry.create("method", "combined", options={"methods": [kd, rkd, kd]})
    assert together.scheduled(0.5) == {
        "kd_kd_weight": 0.5, "kd_temperature": 4.5, "rkd_angle_weight": 2.0, "kd-2_kd_weight": 0.5,
        "kd-2_temperature": 4.5,
    }  # fmt: skip
    in_turn = registry.create("method", "staged", options={"methods": [rkd, kd], "epochs": [1, 3]})
    assert in_turn.scheduled(0.125) == {"angle_weight": 2.0}
    assert in_turn.scheduled(0.625) == {"kd_weight": 0.5, "temperature": 4.5}


@pytest.mark.parametrize(
    ("progress", "name", "own"),
    [(0.0, "kd", 0.0), (0.2, "kd", 0.8), (0.25, "dkd", 0.0), (0.25 - 1e-12, "dkd", 0.0), (1.0, "dkd", 1.0)],
)
def test_staged_takes_turns_and_each_schedule_runs_over_its_own_stage(progress, name, own):
    options = {"kd": {"kd_weight": {"linear": [1.0, 0.0]}}, "dkd": {"beta": {"linear": [4.0, 1.0]}}}
    student, teacher = pair()
    method = registry.create(
        "method", "staged", options={"methods": [{one: given} for one, given in options.items()], "epochs": [1, 3]}
    )
    method.attach(student, teacher, setting(epochs=4))
    terms = {term: value.item() for term, value in method(step_of(method, student, teacher, progress)).items()}
    expected, *_ = one_step(name, progress=own, **options[name])
    assert terms == pytest.approx(expected, rel=1e-5)
